"""What the backends must agree to: the one table of tolerances. They only ever get tighter.

An entry bounds the largest absolute difference over the largest absolute value expected, except for
gradients, which are bounded in the relative norm of their difference, and where said otherwise.
"""

TOLERANCES: dict[str, dict[str, float]] = {
    # The pruner against the float64 reference.
    "scores": {"float64": 1e-12, "float32": 1e-5},
    "straight-through output": {"float64": 1e-11, "float32": 1e-5},
    "straight-through gradient": {"float64": 1e-11, "float32": 1e-5},
    "diagnostics": {"float64": 1e-11, "float32": 2e-5},
    # JAX against PyTorch, same weights.
    "SigLIP": {"float64": 1e-10, "float32": 1e-5},
    "Gemma layer": {"float64": 1e-10, "float32": 1e-5},
    "prefix": {"float64": 1e-10, "float32": 1e-5},
    "loss": {"float64": 1e-10, "float32": 1e-5},
    "parameter gradient": {"float64": 1e-9, "float32": 1e-4},
    "sampled actions": {"float64": 1e-9, "float32": 5e-5},
    # A policy from checkpoint to the robot's units: JAX against PyTorch.
    "policy actions": {"float32": 1e-4},
    # One backend against itself: padding, batching and buckets only change the order of sums.
    "same computation": {"float64": 1e-12, "float32": 1e-5},
    # How far the deployed model is from float32, over how far the plain one is.
    "deployed over plain error": {"bfloat16": 1.1},
    # A product of float8 against float64 of what was rounded, each row over its input's size; and
    # against that of the operands themselves, over the largest number of all: of 41 terms, each
    # of two numbers that are rounded by up to 1/16.
    "float8 product": {"float64": 1e-12, "float32": 1e-6, "bfloat16": 2**-7, "rounding": 0.05},
    # JAX against PyTorch where products are of float8. What differs by rounding may be rounded to
    # another float8, 1/8 away: hardly ever from float64, and here and there from float32.
    "float8 actions": {"float64": 1e-9, "float32": 1e-2},
    # Deployed in float8 against the plain way: the relative distance of actions; 1 - their cosine.
    # A product of float8 is some 4 % off, whatever else is precise.
    "float8 distance": {"float64": 0.05, "float32": 0.05},
    "float8 cosine": {"float64": 2e-3, "float32": 2e-3},
    # A model with adapters against the one with its kernels merged, and against openpi's einsums in
    # float64.
    "adapters": {"float64": 1e-12, "float32": 1e-5},
    # Training against the spec: the schedule and a step relative, images absolute in [-1, 1].
    "learning rate": {"float64": 1e-12},
    "augmentation": {"float64": 1e-12, "float32": 1e-5},
    "training step": {"float64": 1e-10},
    "training metrics": {"float64": 1e-9},
    # JAX against PyTorch over a run, and a backend against itself with the batch cut in parts or
    # the layers computed twice: the loss of every step, the parameters and their average at last.
    "training loss": {"float64": 1e-9, "float32": 1e-4},
    "trained parameters": {"float64": 1e-8},
    # A run on many devices against the run on one: losses, norms, parameters and their average.
    "devices": {"float64": 1e-10, "float32": 1e-5},
    # Spread of queries that are equal but for rounding.
    "collapsed spread": {"float64": 1e-6},
    # Numbers in closed form or by finite differences, relative.
    "statistics": {"float64": 1e-7},
    "finite differences": {"float64": 1e-6},
    # Random streams: JAX and PyTorch against the reference, in units in the last place. Those are
    # fair near 0 too: normals and powers are products of factors with small relative errors.
    "random uniform": {"ulps": 0},
    "random normal": {"ulps": 3},
    "random beta": {"ulps": 1},
    "random flow_matching_time": {"ulps": 2},
    # The same in float64, relative.
    "random numbers": {"float64": 1e-13},
    # XLA's polynomial from the exact quantile, near ±3.76; moments in standard errors.
    "random normal, quantile": {"float32": 2.5e-5},
    "random moments": {"sigmas": 4.0},
    # Mean absolute difference of 8-bit values after lossy compression; metres.
    "video codec": {"uint8": 3.0},
    "inverse kinematics": {"float64": 1e-5},
    # Each backend against openpi's JAX model, absolute; gradients by relative norm.
    "openpi": {"float32": 1e-5},
    "openpi gradient": {"float32": 1e-4},
    # A gradient that is 0 in exact arithmetic, over that of its neighbour.
    "vanishing gradient": {"float32": 1e-4},
    # A kernel against float64: what bfloat16 rounds, of a normalised row and of the result, half a
    # unit each, is 2^-8 twice. Triton's interpreter cuts off where a GPU rounds, whole units.
    "kernel": {"float32": 5e-6, "bfloat16": 2**-7},
    "kernel, interpreted": {"float32": 5e-6, "bfloat16": 2**-6},
    # Its mean error over that of PyTorch's operations.
    "kernel over plain": {"bfloat16": 1.1},
    # Against LightVLA's own pruner, absolute, over the largest value.
    "LightVLA": {"float32": 1e-5},
}


def tolerance(level: str, dtype: str) -> float:
    """The bound for a level of the table in a dtype."""
    return TOLERANCES[level][dtype]

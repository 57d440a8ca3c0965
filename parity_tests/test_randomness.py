"""The streams are `jax.random`'s, bit for bit, whoever draws and however the batch is cut."""

import math
import os
import subprocess
import sys

import numpy as np
import pytest

jax = pytest.importorskip("jax")
torch = pytest.importorskip("torch")

import jax.numpy as jnp

import pruner_jax.randomness as jax_randomness
import pruner_torch.randomness as torch_randomness
from parity_tests.harness import forced_devices
from parity_tests.tolerances import tolerance
from pruner_spec import randomness as spec
from pruner_spec.randomness import Stream

SEEDS = (0, 1, 2**31, 2**32 - 1, 2**32, 2**40 + 3, 2**63 - 1)
SHAPES = ((), (1,), (7,), (3, 5), (33, 31, 3))
INDICES = np.array([0, 1, 5, 2**31 - 1, 2**31, 2**32 - 1])
STEP = 70_001
BACKENDS = {"jax": jax_randomness, "torch": torch_randomness}
CONVERSIONS = {jax_randomness: jnp.asarray, torch_randomness: torch.from_numpy, spec: np.asarray}
ALPHA = 1.5

PINNED_STREAM_IDS = {
    "noise": 0xEFE2A5C0,
    "time": 0x33607480,
    "pruner_noise": 0xCAB7A017,
    "augmentation": 0xBD159F21,
    "debug_data": 0xAFE67F53,
}
PINNED_KEYS = [
    [3316910922, 2653925650],
    [1292171250, 2597762567],
]  # of seed 42, step 7, "noise", samples 0 and 1
PINNED_BITS = [[2527347656, 1336507184], [1932575415, 1858512383]]

backends = pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS.keys())
x64 = pytest.mark.parametrize("x64", [False, True], ids=("x32", "x64"))
GENERATORS = {
    "random_bits": lambda module, keys, shape: module.random_bits(keys, shape),
    "uniform": lambda module, keys, shape: module.uniform(keys, shape),
    "normal": lambda module, keys, shape: module.normal(keys, shape),
    "beta": lambda module, keys, shape: module.beta(keys, shape, alpha=ALPHA),
    "flow_matching_time": lambda module, keys, shape: module.flow_matching_time(keys),
}


def keys_of(backend, seed=0, step=STEP, stream=Stream.NOISE, indices=INDICES):
    return backend.stream_key(seed, step, stream, indices)


def draw_each(module, keys, shape=(3, 5)) -> dict[str, np.ndarray]:
    """A draw of each generator."""
    each = draw_each_jitted if module is jax_randomness else _draw_each
    return {name: np.asarray(drawn) for name, drawn in each(module, keys, shape).items()}


def _draw_each(module, keys, shape) -> dict:
    return {name: draw(module, keys, shape) for name, draw in GENERATORS.items()}


draw_each_jitted = jax.jit(_draw_each, static_argnums=(0, 2))  # or JAX compiles one by one


def assert_draws_agree(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys() == GENERATORS.keys()
    for name, drawn in found.items():
        if name == "random_bits":
            assert_identical(drawn, expected[name])
        else:
            assert ulps(drawn, expected[name]) <= tolerance(f"random {name}", "ulps"), name


def ulps(found, expected) -> int:
    """How many float32 numbers lie between the two, at most."""
    found, expected = (np.asarray(x) for x in (found, expected))
    assert found.dtype == expected.dtype == np.float32
    assert found.shape == expected.shape
    places = [x.view(np.int32).astype(np.int64) for x in (found, expected)]
    ranks = [np.where(place < 0, -(place & 0x7FFFFFFF), place) for place in places]
    return int(np.abs(ranks[0] - ranks[1]).max())


def assert_identical(found, expected) -> None:
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)


def every_uniform() -> np.ndarray:
    return np.arange(2**23, dtype=np.float32) * 2.0**-23


def jax_key(seed: int, index: int) -> jax.Array:
    """What `stream_key` is said to be, said in JAX."""
    with jax.enable_x64(True):
        key = jax.random.key(seed, impl="threefry2x32")
    for number in (STEP, int(spec.stream_id(Stream.NOISE)), index):
        key = jax.random.fold_in(key, number)
    return key


# Known answers


@pytest.mark.parametrize(
    ("key", "count", "expected"),
    [
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ],
)
def test_threefry_gives_the_vectors_of_random123(key, count, expected):
    key, count = np.array([key, count], dtype=np.uint32)
    assert spec.threefry2x32(key, count) == expected


def test_streams_never_change():
    ids = {stream.value: int(spec.stream_id(stream)) for stream in Stream}
    assert ids == PINNED_STREAM_IDS
    keys = spec.stream_key(42, 7, Stream.NOISE, [0, 1])
    assert keys.tolist() == PINNED_KEYS
    assert spec.random_bits(keys, (2,)).tolist() == PINNED_BITS


# The backends and the reference


@x64
@backends
@pytest.mark.parametrize("seed", SEEDS)
def test_keys_are_identical(backend, seed, x64):
    with jax.enable_x64(x64):
        assert_identical(keys_of(backend, seed), keys_of(spec, seed))


@pytest.mark.parametrize("seed", SEEDS)
def test_keys_are_those_of_jax(seed):
    expected = [jax.random.key_data(jax_key(seed, int(index))) for index in INDICES]
    assert_identical(keys_of(spec, seed), np.stack(expected))


@backends
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_draws_agree(backend, shape):
    keys = np.concatenate([keys_of(spec, seed, indices=INDICES[-2:]) for seed in SEEDS])
    found = draw_each(backend, CONVERSIONS[backend](keys), shape)
    assert_draws_agree(found, draw_each(spec, keys, shape))


@pytest.mark.parametrize("shape", [(), (3, 5)], ids=str)
def test_draws_are_those_of_jax(shape):
    keys, key = keys_of(spec)[2:3], jax_key(0, int(INDICES[2]))
    assert_identical(spec.random_bits(keys, shape)[0], jax.random.bits(key, shape, jnp.uint32))
    assert_identical(spec.uniform(keys, shape)[0], jax.random.uniform(key, shape, jnp.float32))
    normal = jax.random.normal(key, shape, jnp.float32)
    assert_identical(jax_randomness.normal(jnp.asarray(keys), shape)[0], normal)
    assert ulps(spec.normal(keys, shape)[0], normal) <= tolerance("random normal", "ulps")


@x64
def test_draws_do_not_heed_x64(x64):
    with jax.enable_x64(x64):
        found = draw_each(jax_randomness, keys_of(jax_randomness))
    assert_draws_agree(found, draw_each(spec, keys_of(spec)))


# Every value there is: a float draw is a function of 23 bits


def draw_all(backend, monkeypatch, name: str) -> np.ndarray:
    """What the generator makes of all uniform numbers, in the place of its random ones."""
    uniforms = CONVERSIONS[backend](every_uniform())
    monkeypatch.setattr(backend, "uniform", lambda keys, shape: uniforms)
    return np.asarray(GENERATORS[name](backend, keys_of(backend), ()))


@backends
@pytest.mark.parametrize("name", ["beta", "flow_matching_time"])
def test_powers_agree_for_every_uniform(backend, name, monkeypatch):
    found, expected = (draw_all(module, monkeypatch, name) for module in (backend, spec))
    assert ulps(found, expected) <= tolerance(f"random {name}", "ulps")
    assert found.min() >= 0.0
    assert found.max() < 1.0


def test_normals_agree_for_every_uniform(monkeypatch):
    modules = (torch_randomness, spec)
    found, expected = (draw_all(module, monkeypatch, "normal") for module in modules)
    symmetric = every_uniform() * 2.0 + spec.LOWEST_ABOVE_MINUS_ONE
    of_jax = jax.jit(lambda x: math.sqrt(2.0) * jax.lax.erf_inv(x))(symmetric)
    assert ulps(found, expected) <= tolerance("random normal", "ulps")
    assert ulps(of_jax, expected) <= tolerance("random normal", "ulps")


def test_normals_are_quantiles(monkeypatch):
    # Φ is exact in float64; what it leaves over, divided by its slope, is the normals' error.
    normals = draw_all(spec, monkeypatch, "normal")[::64]
    symmetric = (every_uniform() * 2.0 + spec.LOWEST_ABOVE_MINUS_ONE)[::64].astype(np.float64)
    halves = normals.astype(np.float64) / math.sqrt(2.0)
    tails = np.array([math.erfc(abs(half)) for half in halves])
    slope = 2.0 * np.exp(-np.square(halves)) / math.sqrt(2.0 * math.pi)
    error = (tails - (1.0 - np.abs(symmetric))) / slope
    assert np.abs(error).max() <= tolerance("random normal, quantile", "float32")


# Samples on their own


@pytest.mark.parametrize("backend", [*BACKENDS.values(), spec], ids=(*BACKENDS, "spec"))
def test_samples_do_not_depend_on_their_batch(backend):
    batch = draw_each(backend, keys_of(backend))
    order = np.array([4, 0, 5, 2, 1, 3])
    for cuts in ((), (1, 2, 3, 4, 5), (5,)):
        parts = [keys_of(backend, indices=part) for part in np.split(INDICES[order], cuts)]
        drawn = [draw_each(backend, part) for part in parts]
        for name in GENERATORS:
            assert_identical(np.concatenate([part[name] for part in drawn]), batch[name][order])


@backends
def test_a_batch_may_be_empty(backend):
    keys = keys_of(backend, indices=INDICES[:0])
    assert tuple(keys.shape) == (0, 2)
    assert tuple(backend.normal(keys, (3,)).shape) == (0, 3)


def test_every_argument_makes_other_numbers():
    variants = [
        keys_of(spec),
        keys_of(spec, seed=1),
        keys_of(spec, seed=2**32),  # its low word is seed 0's
        keys_of(spec, step=STEP + 1),
        *(keys_of(spec, stream=stream) for stream in Stream if stream != Stream.NOISE),
    ]
    words = np.concatenate(variants).astype(np.uint64) @ np.array([2**32, 1], dtype=np.uint64)
    assert len(np.unique(words)) == len(words)


# Under the compilers


@x64
def test_jax_may_be_traced_once_for_all_steps(x64):
    traces = []

    @jax.jit
    def draw(step, indices):
        traces.append(None)
        keys = keys_of(jax_randomness, step=step, indices=indices)
        return jax_randomness.random_bits(keys, (7,))

    with jax.enable_x64(x64):
        for step in (STEP, 3):
            expected = spec.random_bits(keys_of(spec, step=step), (7,))
            assert_identical(draw(np.uint32(step), INDICES.astype(np.uint32)), expected)
    assert len(traces) == 1


def test_jax_sharded_over_devices_draws_the_same():
    program = """
import jax, numpy as np
from pruner_jax import randomness
from pruner_spec import randomness as spec
mesh = jax.make_mesh((4,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
batch = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("batch"))
keys = spec.stream_key(0, 1, spec.Stream.NOISE, np.arange(8))
draw = jax.jit(lambda keys: randomness.random_bits(keys, (5, 3)), out_shardings=batch)
found = draw(jax.device_put(keys, batch))
assert len(found.sharding.device_set) == 4
np.testing.assert_array_equal(found, spec.random_bits(keys, (5, 3)))
"""
    four_devices = forced_devices(4) | {
        "JAX_ENABLE_X64": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    subprocess.run([sys.executable, "-c", program], env=os.environ | four_devices, check=True)


def test_torch_compiles_to_one_graph():
    # "aot_eager" traces and makes the in-place operations functional; it builds no kernels.
    compiled = torch.compile(_draw_each, backend="aot_eager", fullgraph=True)
    keys = keys_of(torch_randomness)
    found, expected = compiled(torch_randomness, keys, (3, 5)), draw_each(torch_randomness, keys)
    for name in GENERATORS:
        assert_identical(found[name], expected[name])
    with torch.compiler.set_stance("fail_on_recompile"):
        compiled(torch_randomness, keys_of(torch_randomness, step=STEP + 1), (3, 5))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint32], ids=str)
def test_torch_indices_may_be_tensors(dtype):
    indices = torch.tensor([0, 7, 2**31 - 1]).to(dtype)
    keys = keys_of(torch_randomness, indices=indices)
    assert_identical(keys, keys_of(spec, indices=[0, 7, 2**31 - 1]))


# Float64: the same bits, rounded later


@backends
@pytest.mark.parametrize("name", ["normal", "beta", "flow_matching_time"])
def test_float64_draws_are_the_references(backend, name):
    alpha = {"alpha": ALPHA} if name == "beta" else {}
    shape = () if name == "flow_matching_time" else ((257, 3),)

    def draws(module):
        drawn = getattr(module, name)(keys_of(module), *shape, **alpha, dtype="float64")
        return np.asarray(drawn)

    with jax.enable_x64(True):
        found, expected = draws(backend), draws(spec)
    assert found.dtype == expected.dtype == np.float64
    bound = tolerance("random numbers", "float64")
    np.testing.assert_allclose(found, expected, rtol=bound, atol=0)


@pytest.mark.parametrize("name", ["normal", "beta", "flow_matching_time"])
def test_float64_draws_are_the_float32_ones_but_for_rounding(name):
    alpha = {"alpha": ALPHA} if name == "beta" else {}
    shape = () if name == "flow_matching_time" else ((257, 3),)
    draw = getattr(spec, name)
    wide, narrow = (
        draw(keys_of(spec), *shape, **alpha, dtype=dtype) for dtype in ("float64", "float32")
    )
    bound = tolerance("random normal, quantile", "float32")
    np.testing.assert_allclose(narrow, wide, rtol=0, atol=bound)


# Distributions


@pytest.mark.parametrize(
    ("name", "mean", "variance", "fourth"),
    [
        ("uniform", 1 / 2, 1 / 12, 1 / 80),
        ("normal", 0.0, 1.0, 3.0),
        ("beta", 3 / 5, 12 / 175, 192 / 21_875),
    ],
)
def test_moments(name, mean, variance, fourth):
    keys = spec.stream_key(3, 0, Stream.NOISE, np.arange(16))
    draw = getattr(spec, name)
    alpha = {"alpha": ALPHA} if name == "beta" else {}
    x = draw(keys, (2**14,), **alpha).astype(np.float64) - mean
    sigma = tolerance("random moments", "sigmas") / math.sqrt(x.size)
    assert abs(x.mean()) <= sigma * math.sqrt(variance)
    assert abs(np.square(x).mean() - variance) <= sigma * math.sqrt(fourth - variance**2)


def test_samples_steps_and_streams_are_uncorrelated():
    keys = [
        spec.stream_key(3, step, stream, np.arange(4)) for step in range(3) for stream in Stream
    ]
    x = spec.normal(np.concatenate(keys), (2**12,)).astype(np.float64)
    correlation = np.corrcoef(x)[np.triu_indices(len(x), k=1)]
    # Of n(n-1)/2 pairs the largest is beyond one pair's bound by √(2 ln pairs).
    bound = tolerance("random moments", "sigmas") + math.sqrt(2 * math.log(len(correlation)))
    assert np.abs(correlation).max() <= bound / math.sqrt(x.shape[1])


# What a user may get wrong

GOOD_ARGUMENTS = {"seed": 0, "step": 0, "stream": "noise", "sample_indices": [0, 1]}
BAD_ARGUMENTS = [
    *(("seed", bad) for bad in (-1, 2**63, 1.0, True, "0", np.array([1]))),
    *(("step", bad) for bad in (-1, 2**32, 2**64, 1.0, True, [1])),
    *(("stream", bad) for bad in ("", None, 3)),
    *(("sample_indices", bad) for bad in (3, [-1], [2**32], [0.0], [True], [[1]], None)),
]


@pytest.mark.parametrize("backend", [*BACKENDS.values(), spec], ids=(*BACKENDS, "spec"))
@pytest.mark.parametrize(("name", "bad"), BAD_ARGUMENTS, ids=str)
def test_bad_arguments_are_named(backend, name, bad):
    with pytest.raises(ValueError, match=rf"^{name}: expected .*, got "):
        backend.stream_key(**GOOD_ARGUMENTS | {name: bad})


@pytest.mark.parametrize("bad", [torch.tensor([0.5]), torch.tensor([True]), torch.tensor(3)])
def test_bad_indices_on_a_device_are_named(bad):
    with pytest.raises(ValueError, match=r"^sample_indices: expected .*, got "):
        keys_of(torch_randomness, indices=bad)
    with pytest.raises(ValueError, match=r"^sample_indices: expected .*, got "):
        keys_of(jax_randomness, indices=jnp.asarray(bad.numpy()))


@pytest.mark.parametrize("backend", [*BACKENDS.values(), spec], ids=(*BACKENDS, "spec"))
def test_bad_draws_are_named(backend):
    keys = keys_of(backend)
    for alpha in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=r"^alpha: expected .*, got "):
            backend.beta(keys, (), alpha=alpha)
    with pytest.raises(ValueError, match=r"^shape: expected .*, got "):
        backend.uniform(keys, (2**16, 2**16 + 1))


def test_jax_must_be_partitionable():
    with jax.threefry_partitionable(False), pytest.raises(ValueError, match="partitionable"):
        keys_of(jax_randomness)

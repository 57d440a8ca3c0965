"""AdamW, its schedule, clipping and averaging, to the last rounding that matters.

Optax and torch.optim agree on Adam's moments and bias correction, and on epsilon outside of the
root. They part in two places, and both backends follow Optax, as openpi's JAX trainer does:

- Clipping divides by the norm itself, and only where it is above the limit. PyTorch's own divides
  by the norm plus 1e-6.
- Weight decay is added to Adam's step and both are scaled by the learning rate, which is what
  PyTorch's decoupled decay comes to.

The learning rate is computed here, in float64 on the host, and handed to both. All functions are
references in NumPy; arrays have any one dtype, and so have the results.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping

import numpy as np


@dataclasses.dataclass(frozen=True)
class CosineDecaySchedule:
    """Linear warm-up, then half a cosine down to `decay_lr`, openpi's and Optax's.

    Attributes:
        warmup_steps: until `peak_lr`.
        peak_lr: the largest learning rate.
        decay_steps: until `decay_lr`, warm-up included.
        decay_lr: the last, and from then on.
    """

    warmup_steps: int = 1_000
    peak_lr: float = 2.5e-5
    decay_steps: int = 30_000
    decay_lr: float = 2.5e-6

    def __post_init__(self) -> None:
        if not 0 <= self.warmup_steps < self.decay_steps:
            raise ValueError(
                f"warmup_steps: expected 0 <= warmup_steps < decay_steps ({self.decay_steps}), "
                f"got {self.warmup_steps}"
            )
        for name in ("peak_lr", "decay_lr"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name}: expected a number >= 0, got {value}")

    def learning_rate(self, step: int) -> float:
        """Of the step with this number, from 0 on."""
        if step < self.warmup_steps:
            first = self.peak_lr / (self.warmup_steps + 1)
            return first + (self.peak_lr - first) * (step / self.warmup_steps)
        length = self.decay_steps - self.warmup_steps
        done = min(step - self.warmup_steps, length) / length
        share = 0.5 * (1 + math.cos(math.pi * done))
        return self.decay_lr + (self.peak_lr - self.decay_lr) * share


@dataclasses.dataclass(frozen=True)
class AdamW:
    """AdamW's settings, openpi's by default.

    Attributes:
        b1, b2: decay of the two moments.
        eps: added to the root of the second moment.
        weight_decay: of every trained parameter.
        clip_gradient_norm: limit of the norm of all gradients together.
    """

    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 1e-10
    clip_gradient_norm: float = 1.0

    def __post_init__(self) -> None:
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: expected 0 <= {name} < 1, got {getattr(self, name)}")
        for name in ("eps", "clip_gradient_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a number > 0, got {getattr(self, name)}")
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay: expected a number >= 0, got {self.weight_decay}")


@dataclasses.dataclass(frozen=True)
class Moments:
    """Adam's running means of the gradients and of their squares, by parameter."""

    first: Mapping[str, np.ndarray]
    second: Mapping[str, np.ndarray]


def global_norm(arrays: Iterable[np.ndarray]) -> float:
    """The Euclidean norm of all numbers of all arrays."""
    return math.sqrt(sum(float(np.square(array, dtype=np.float64).sum()) for array in arrays))


def clipped(
    gradients: Mapping[str, np.ndarray], optimizer: AdamW
) -> tuple[dict[str, np.ndarray], float]:
    """The gradients with their global norm limited, and the norm that it was."""
    norm = global_norm(gradients.values())
    if norm <= optimizer.clip_gradient_norm:
        return dict(gradients), norm
    share = optimizer.clip_gradient_norm / norm
    return {name: g * g.dtype.type(share) for name, g in gradients.items()}, norm


def adamw_step(
    parameters: Mapping[str, np.ndarray],
    gradients: Mapping[str, np.ndarray],
    moments: Moments,
    step: int,
    learning_rate: float,
    optimizer: AdamW,
) -> tuple[dict[str, np.ndarray], Moments]:
    """One step of AdamW with gradients that are clipped already.

    Args:
        parameters: those that are trained, by name.
        gradients: of each.
        moments: of the steps before; zeros at first.
        step: its number, from 0 on.
        learning_rate: see `CosineDecaySchedule`.
        optimizer: the settings.
    """
    b1, b2 = optimizer.b1, optimizer.b2
    first = {name: b1 * moments.first[name] + (1 - b1) * g for name, g in gradients.items()}
    second = {name: b2 * moments.second[name] + (1 - b2) * g * g for name, g in gradients.items()}
    corrections = (1 - b1 ** (step + 1), 1 - b2 ** (step + 1))
    updated = {}
    for name, parameter in parameters.items():
        root = np.sqrt(second[name] / corrections[1])
        direction = first[name] / corrections[0] / (root + optimizer.eps)
        updated[name] = parameter - learning_rate * (direction + optimizer.weight_decay * parameter)
    return updated, Moments(first, second)


def averaged(
    average: Mapping[str, np.ndarray], parameters: Mapping[str, np.ndarray], decay: float
) -> dict[str, np.ndarray]:
    """The exponential moving average after a step, of the parameters after it."""
    return {name: decay * average[name] + (1 - decay) * p for name, p in parameters.items()}

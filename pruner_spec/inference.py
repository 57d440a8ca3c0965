"""How a deployed model computes. None of it changes what is computed, but for rounding.

float8 rounds far more coarsely than the rest.
"""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class InferenceSettings:
    """Ways to the same actions; the fast ones apply where the device has them.

    Attributes:
        graphs: CUDA graphs, captured at the first call of a size and replayed afterwards; in JAX,
            XLA's command buffers, and on Hopper one of its own for the denoising steps.
        max_graphs: that PyTorch keeps; the least recently used goes first. A policy without a
            budget captures some 13 for each bucket of prompts and size of a batch.
        kernels: the project's own kernels, where a library does badly.
        compiled: `torch.compile` of the layers, in the place of their kernels. XLA compiles all
            there is, and JAX refuses it.
        guess: without a budget, the last call's bucket of kept patches is tried before the device
            has counted them; what was guessed wrong is computed again.
        autotune: time a few other tiles of the kernels on this GPU before they are captured, and
            keep the fastest for this process.
        float8: products of the language model's MLPs, of float8 weights and inputs: faster, where
            a GPU multiplies them, and less precise.
    """

    graphs: bool = True
    max_graphs: int = 256
    kernels: bool = True
    compiled: bool = False
    guess: bool = True
    autotune: bool = False
    float8: bool = False

    def __post_init__(self) -> None:
        if self.max_graphs < 1:
            raise ValueError(f"max_graphs: expected at least 1, got {self.max_graphs}")

    def check_for_jax(self) -> None:
        """Raises a ValueError for what only PyTorch has."""
        if self.compiled:
            raise ValueError("compiled: expected False in JAX, where XLA compiles; got True")

    @property
    def changed(self) -> dict[str, Any]:
        """Those that are not the defaults."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        }

"""How a deployed model computes. None of it changes what is computed, but for rounding."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class InferenceSettings:
    """Ways to the same actions; the fast ones apply where the device has them.

    XLA compiles and captures by itself: of these JAX reads `kernels`.

    Attributes:
        graphs: CUDA graphs, captured at the first call of a size and replayed afterwards.
        max_graphs: that are kept; the least recently used goes first. A policy without a budget
            captures some 13 for each bucket of prompts and size of a batch.
        kernels: the project's own kernels, where a library does badly.
        compiled: `torch.compile` in the place of graphs and kernels.
    """

    graphs: bool = True
    max_graphs: int = 256
    kernels: bool = True
    compiled: bool = False

    def __post_init__(self) -> None:
        if self.max_graphs < 1:
            raise ValueError(f"max_graphs: expected at least 1, got {self.max_graphs}")

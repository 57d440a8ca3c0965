"""Flags of the fast way through a model: `InferenceSettings` on the command line."""

import dataclasses

import tyro

from pruner_spec.inference import InferenceSettings


@dataclasses.dataclass(frozen=True, kw_only=True)
class InferenceFlags:
    """How the fast way computes.

    Attributes:
        no_graphs: launch kernel by kernel: no CUDA graphs, and in JAX no command buffers.
        no_kernels: the framework's operations in the place of the project's Triton kernels.
        compiled: torch.compile of the layers, in the place of their kernels. PyTorch only.
        no_guess: wait for the device to count the kept patches, in the place of trying as many as
            in the last call. With a budget there is nothing to guess.
        autotune: time a few other tiles of the Triton kernels at the start, and keep the fastest.
        float8: round the weights of the language model's MLPs to float8, and what they are
            multiplied by: faster on a GPU from Ada on, and less precise.
    """

    no_graphs: tyro.conf.FlagCreatePairsOff[bool] = False
    no_kernels: tyro.conf.FlagCreatePairsOff[bool] = False
    compiled: tyro.conf.FlagCreatePairsOff[bool] = False
    no_guess: tyro.conf.FlagCreatePairsOff[bool] = False
    autotune: tyro.conf.FlagCreatePairsOff[bool] = False
    float8: tyro.conf.FlagCreatePairsOff[bool] = False

    @property
    def settings(self) -> InferenceSettings:
        """What the flags ask for."""
        return InferenceSettings(
            graphs=not self.no_graphs,
            kernels=not self.no_kernels,
            compiled=self.compiled,
            guess=not self.no_guess,
            autotune=self.autotune,
            float8=self.float8,
        )

    def check_flags(self, option: str, way: str) -> None:
        """Raises a ValueError for flags that the way reads none of.

        Args:
            option: that chooses the way.
            way: what it was given; "plain" has no settings.
        """
        given = ", ".join(f"--{name}" for name in FLAGS if getattr(self, name))
        if given and way == "plain":
            raise ValueError(f"{option}: expected the fast way with {given}, got 'plain'")


FLAGS = tuple(field.name for field in dataclasses.fields(InferenceFlags))

"""Checkpoints between openpi's formats and ours, without JAX and without PyTorch."""

from convert.conversion import Conversion, jax_to_pytorch, pytorch_to_jax

__all__ = ["Conversion", "jax_to_pytorch", "pytorch_to_jax"]

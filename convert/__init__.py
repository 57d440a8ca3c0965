"""Checkpoints between openpi's formats and ours, without JAX and without PyTorch."""

"""Kernels in Triton that both backends launch; imports neither of them.

A kernel here knows pointers, strides and constants; `pruner_torch.kernels` and `pruner_jax.kernels`
know what they mean, allocate results, and compute the same with their framework's own operations
where Triton does not apply. One source, so that both compute the same bits.
"""

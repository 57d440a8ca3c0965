"""The application: data, tokenizer, demo and command line.

Nothing here imports JAX or PyTorch, but `backend_jax` and `backend_torch` when they are chosen.
"""

"""Data, prompts, simulation, training and serving: everything around the model, in NumPy.

Nothing here imports JAX or PyTorch; the backends are behind a protocol.
"""

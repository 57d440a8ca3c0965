"""π0 and π0.5 with LightVLA's token pruning, in JAX and Flax NNX. The twin of `pruner_torch`."""

from pruner_jax.checkpoint import load
from pruner_jax.inference import Sampler
from pruner_jax.pi0 import Pi0
from pruner_jax.pruner import ImageTokenPruner, TokenPruner

__all__ = ["ImageTokenPruner", "Pi0", "Sampler", "TokenPruner", "load"]

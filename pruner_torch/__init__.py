"""π0 and π0.5 with LightVLA's token pruning, in PyTorch. The twin of `pruner_jax`."""

from pruner_torch.checkpoint import load
from pruner_torch.inference import Sampler
from pruner_torch.openpi import PI0Pytorch
from pruner_torch.pi0 import Pi0
from pruner_torch.pruner import ImageTokenPruner, TokenPruner

__all__ = ["ImageTokenPruner", "PI0Pytorch", "Pi0", "Sampler", "TokenPruner", "load"]

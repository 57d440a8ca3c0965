"""The contract both backends obey: configs, definitions, names and numbers, in NumPy alone.

Importing this package imports neither JAX nor PyTorch.
"""

from pruner_spec.config import CAMERAS, IMAGE_SIZE, Pi0Config
from pruner_spec.observation import Observation

__all__ = ["CAMERAS", "IMAGE_SIZE", "Observation", "Pi0Config"]

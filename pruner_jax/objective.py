"""A training batch's loss: what is drawn for it, what the model is shown, what is measured.

Dimension letters: B batch, C cameras, H action horizon, A action dim.
"""

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from pruner_jax import randomness
from pruner_jax.augmentation import augment
from pruner_jax.layers import as_float
from pruner_jax.metrics import Measures, measure
from pruner_spec.augmentation import DRAWS
from pruner_spec.config import CAMERAS, Pi0Config
from pruner_spec.observation import Observation
from pruner_spec.randomness import Stream
from pruner_spec.training import Batch, TrainingSettings, master_dtype, pruner_noise_shape

if TYPE_CHECKING:
    from pruner_jax.pi0 import Pi0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Draws:
    """The random numbers of a batch, in the dtype of the master weights.

    Attributes:
        noise: of the actions.
        time: of flow matching.
        pruner_noise: times its scale; None in a model that does not prune.
        augmentation: uniform, of each camera; None where images stay as they are.
    """

    noise: Float[Array, "B H A"]
    time: Float[Array, "B"]
    pruner_noise: Float[Array, "B *pools N N"] | None
    augmentation: Float[Array, "B C draws"] | None


def draw(
    config: Pi0Config,
    settings: TrainingSettings,
    step: int | Int[Array, ""],
    noise_scale: float | Float[Array, ""],
    places: Int[Any, "B"],
) -> Draws:
    """The random numbers of a step for the samples at these places of the global batch.

    Args:
        config: the model's.
        settings: the run's.
        step: its number.
        noise_scale: of the pruner's noise.
        places: of the samples.
    """
    dtype = master_dtype(config)

    def uniform(stream: Stream, shape: tuple[int, ...]) -> Float[Array, "B *shape"]:
        return randomness.uniform(keys(stream), shape).astype(dtype)

    def keys(stream: Stream) -> Shaped[Array, "B 2"]:
        return randomness.stream_key(settings.seed, step, stream, places)

    chunk = (config.action_horizon, config.action_dim)
    pruner_noise = augmentation = None
    if config.token_pruning_enabled:
        pruner_noise = uniform(Stream.PRUNER_NOISE, pruner_noise_shape(config)) * noise_scale
    if settings.augment:
        augmentation = uniform(Stream.AUGMENTATION, (len(CAMERAS), DRAWS))
    return Draws(
        noise=randomness.normal(keys(Stream.NOISE), chunk, dtype),
        time=randomness.flow_matching_time(keys(Stream.TIME), dtype),
        pruner_noise=pruner_noise,
        augmentation=augmentation,
    )


def objective(model: "Pi0", batch: Batch, draws: Draws) -> Measures:
    """The loss of each sample, and how its patches were pruned.

    Args:
        model: its loss has a gradient.
        batch: of JAX arrays.
        draws: of the same samples.
    """
    observation = observe(batch, draws.augmentation, draws.noise.dtype)
    terms = model.loss_terms(
        observation, batch.actions, draws.noise, draws.time, draws.pruner_noise
    )
    return measure(model, terms)


def observe(
    batch: Batch, augmentation: Float[Array, "B C draws"] | None, dtype: jnp.dtype
) -> Observation:
    """What the model sees of a batch: images in [-1, 1], augmented if numbers are drawn for it."""
    images = {camera: as_float(batch.images[camera], dtype) for camera in CAMERAS}
    if augmentation is not None:
        images = {
            camera: augment(image, augmentation[:, place], camera)
            for place, (camera, image) in enumerate(images.items())
        }
    return Observation(
        images=images,
        image_masks=batch.image_masks,
        state=batch.state,
        tokenized_prompt=batch.tokenized_prompt,
        tokenized_prompt_mask=batch.tokenized_prompt_mask,
    )

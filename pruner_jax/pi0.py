"""π0 and π0.5: a vision-language model and an action expert that denoises a chunk of actions.

Randomness is drawn outside and passed in. The way of an observation:
`encode` (images and prompt to tokens) -> `select` or `relax` (the pruner) -> `assemble` (the
prefix) -> Gemma, with the suffix of noisy actions, -> velocities.

Dimension letters: B batch, C cameras, N patches, L prompt tokens, S prefix, H action horizon,
A action dim, D width of the prefix, E width of the suffix.
"""

import dataclasses
import logging
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from pruner_jax import checkpoint, kernels, kernels_plain, sampling
from pruner_jax.gemma import Gemma, KVCache
from pruner_jax.layers import Linear, as_float, constant, wide
from pruner_jax.pruner import ImageTokenPruner, PrunedPatches, Selection, pack
from pruner_jax.siglip import SigLip
from pruner_spec import sequence
from pruner_spec.config import CAMERAS, Pi0Config
from pruner_spec.flow import time_frequencies
from pruner_spec.observation import Observation, check_actions
from pruner_spec.parameters import initial_parameters
from pruner_spec.stats import PrunerRecord
from pruner_spec.training import GradientCheckpointing

logger = logging.getLogger(__name__)


def _observation_leaves(observation: Observation) -> tuple[tuple[Any, ...], None]:
    fields = dataclasses.fields(observation)
    return tuple(getattr(observation, field.name) for field in fields), None


def _observation_of(_: None, leaves: tuple[Any, ...]) -> Observation:
    """Unchecked: JAX puts placeholders in the arrays' place."""
    observation = object.__new__(Observation)
    for field, leaf in zip(dataclasses.fields(Observation), leaves, strict=True):
        object.__setattr__(observation, field.name, leaf)
    return observation


jax.tree_util.register_pytree_node(Observation, _observation_leaves, _observation_of)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Encoded:
    """Images and prompt as tokens, before pruning.

    Attributes:
        patches: [B, C, N, D].
        camera_mask: bool [B, C], the cameras that are there.
        prompt: [B, L, D].
        prompt_mask: bool [B, L].
    """

    patches: Float[Array, "B C N D"]
    camera_mask: Bool[Array, "B C"]
    prompt: Float[Array, "B L D"]
    prompt_mask: Bool[Array, "B L"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prefix:
    """What the language model reads: the patches, then the prompt.

    Attributes:
        tokens: [B, S, D].
        valid: bool [B, S].
        positions: int [B, S], those of the unpruned prefix.
        length: int [B], valid tokens of the unpruned prefix, where the suffix's positions begin.
    """

    tokens: Float[Array, "B S D"]
    valid: Bool[Array, "B S"]
    positions: Int[Array, "B S"]
    length: Int[Array, "B"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Suffix:
    """What the action expert reads.

    Attributes:
        tokens: [B, H, E], in π0 with the state token before them.
        condition: [B, E], of the adaptive norms; None in π0.
    """

    tokens: Float[Array, "B H E"]
    condition: Float[Array, "B E"] | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossTerms:
    """A batch's loss, and what it was computed from.

    Attributes:
        loss: [B, H].
        encoded: the tokens before pruning.
        pruned: the patches that the prefix was made of; None where none were pruned.
    """

    loss: Float[Array, "B H"]
    encoded: Encoded
    pruned: PrunedPatches | None


class Pi0(nnx.Module):
    """π0 or π0.5, with or without token pruning, as its config says.

    Args:
        config: sizes and settings.
        seed: of the initial weights, the same ones in both backends. None leaves the parameters
            zero, or abstract under `nnx.eval_shape`, for `checkpoint.assign`.

    Raises:
        ValueError: the config's dtype is float64, and JAX has not been told to compute in it.
    """

    def __init__(self, config: Pi0Config, *, seed: int | None = 0) -> None:
        if config.dtype == "float64" and not jax.config.jax_enable_x64:  # pyright: ignore[reportAttributeAccessIssue]
            raise ValueError(
                'dtype: float64 needs jax.config.update("jax_enable_x64", True), got it disabled'
            )
        self.config = config
        self.dtype = jnp.dtype(config.dtype)
        self.gradient_checkpointing: GradientCheckpointing = "none"
        self.pruner = ImageTokenPruner(config.keep_budget, config.token_prune_min_keep)
        self.record = PrunerRecord()
        width, action_dim = config.action_expert.width, config.action_dim
        self.vision = SigLip(config.vision, config.paligemma.width)
        self.gemma = Gemma(config)
        self.action_in_proj = Linear(action_dim, width)
        if config.pi05:
            self.time_mlp_in = Linear(width, width)
            self.time_mlp_out = Linear(width, width)
        else:
            self.state_proj = Linear(action_dim, width)
            self.action_time_mlp_in = Linear(2 * width, width)
            self.action_time_mlp_out = Linear(width, width)
        self.action_out_proj = Linear(width, action_dim)
        if seed is not None:
            checkpoint.assign(self, initial_parameters(config, seed))
        if config.token_pruning_enabled:
            logger.info(
                "Enabled LightVLA-style token pruning (hidden_size=%d)", config.paligemma.width
            )

    @property
    def token_pruning_enabled(self) -> bool:
        return self.config.token_pruning_enabled

    @property
    def token_pruner_noise_scale(self) -> float:
        """What the one who draws the pruner's noise multiplies it by."""
        override = self.record.noise_scale
        return self.config.token_prune_noise_scale if override is None else override

    def set_token_pruner_noise_scale(self, noise_scale: float | None) -> None:
        """Overrides the config's noise scale; None goes back to it."""
        self.record.set_noise_scale(noise_scale)

    def get_token_pruning_stats(self) -> dict[str, Any]:
        """How the last sampled batch was pruned; computed only here. See `sampling.stats`."""
        return sampling.stats(self)

    def encode(
        self,
        observation: Observation,
        cameras: Sequence[str] = CAMERAS,
        prompt_length: int | None = None,
    ) -> Encoded:
        """Tokens of the images and of the prompt.

        Args:
            observation: of JAX arrays.
            cameras: those to encode.
            prompt_length: tokens of the prompt to encode; None for all.
        """
        dtype = wide(self.dtype)
        images = [as_float(observation.images[camera], dtype) for camera in cameras]
        masks = [observation.image_masks[camera] for camera in cameras]
        return self.embed(
            jnp.stack(images, axis=1),
            jnp.stack(masks, axis=1),
            observation.tokenized_prompt[:, :prompt_length],
            observation.tokenized_prompt_mask[:, :prompt_length],
        )

    def embed(
        self,
        images: Float[Array, "B C 224 224 3"],
        camera_mask: Bool[Array, "B C"],
        prompt: Int[Array, "B L"],
        prompt_mask: Bool[Array, "B L"],
    ) -> Encoded:
        """Tokens of any number of cameras, all in one vision batch, and of a prompt."""
        patches = self.vision(_merge(images, 0), self.dtype, self.gradient_checkpointing)
        return Encoded(
            patches=patches.reshape(*images.shape[:2], *patches.shape[1:]),
            camera_mask=camera_mask,
            prompt=self.gemma.embedder(prompt, self.dtype),
            prompt_mask=prompt_mask,
        )

    def pools(self, encoded: Encoded) -> tuple[Array, Array, Array, Array]:
        """Patches, task, task mask and patch mask of each pool that is pruned on its own.

        A pool is a camera of a sample, or, in the joint scope, a sample.
        """
        batch, cameras, patches = encoded.patches.shape[:3]
        if self.config.token_prune_scope == "joint":
            patch_mask = encoded.camera_mask.repeat(patches, axis=1)
            return _merge(encoded.patches, 1), encoded.prompt, encoded.prompt_mask, patch_mask
        return (
            _merge(encoded.patches, 0),
            encoded.prompt.repeat(cameras, axis=0),
            encoded.prompt_mask.repeat(cameras, axis=0),
            encoded.camera_mask.reshape(batch * cameras, 1).repeat(patches, axis=1),
        )

    def select(self, encoded: Encoded, operations: ModuleType = kernels_plain) -> Selection:
        """The patches kept at inference, over all cameras: `kept` is bool [B, C*N]."""
        batch, _, patches = encoded.patches.shape[:3]
        if not self.config.prunes_at_inference:
            everything = encoded.camera_mask.repeat(patches, axis=1)
            return Selection.of(everything, jnp.zeros(batch, jnp.int32))
        budget = None
        if self.config.token_prune_scope == "joint" and self.config.keep_budget is not None:
            budget = self.config.keep_budget * encoded.camera_mask.sum(axis=-1)
        pools = self.pools(encoded)
        selection = self.pruner.select(*pools, budget=budget, operations=operations)
        return Selection(
            kept=selection.kept.reshape(batch, -1), counts=selection.counts.reshape(batch, -1, 2)
        )

    def relax(
        self, encoded: Encoded, noise: Float[Array, "*pools N N"] | None = None
    ) -> PrunedPatches:
        """The patches of training, over all cameras: M = C*N of them, with repetitions.

        Args:
            encoded: the tokens.
            noise: added to the scores: [B, C, N, N], or [B, C*N, C*N] in the joint scope.
        """
        pools = self.pools(encoded)
        count, size = pools[0].shape[:2]
        if noise is not None:
            noise = noise.reshape(count, size, size)
        pruned = self.pruner.relax(*pools, noise=noise)
        batch = encoded.patches.shape[0]
        pool_start = jnp.arange(count // batch) * size
        index = pruned.index.reshape(batch, -1, size) + pool_start[:, None]
        return PrunedPatches(
            tokens=pruned.tokens.reshape(batch, -1, pruned.tokens.shape[-1]),
            index=index.reshape(batch, -1),
            valid=pruned.valid.reshape(batch, -1),
        )

    def assemble(self, encoded: Encoded, pruned: PrunedPatches | None = None) -> Prefix:
        """The prefix of the pruned patches, or of all, and the prompt."""
        patches = _merge(encoded.patches, 1)
        patch_mask = encoded.camera_mask.repeat(encoded.patches.shape[2], axis=1)
        valid = jnp.concatenate([patch_mask, encoded.prompt_mask], axis=1)
        positions = sequence.positions(valid)
        length = valid.sum(axis=-1)
        if pruned is None:
            tokens = jnp.concatenate([patches, encoded.prompt], axis=1)
            return Prefix(tokens=tokens, valid=valid, positions=positions, length=length)
        patch_positions = jnp.take_along_axis(positions, pruned.index, axis=1)
        prompt_positions = positions[:, patches.shape[1] :]
        return Prefix(
            tokens=jnp.concatenate([pruned.tokens, encoded.prompt], axis=1),
            valid=jnp.concatenate([pruned.valid, encoded.prompt_mask], axis=1),
            positions=jnp.concatenate([patch_positions, prompt_positions], axis=1),
            length=length,
        )

    def prune(
        self,
        encoded: Encoded,
        selection: Selection,
        capacity: int,
        operations: ModuleType = kernels_plain,
    ) -> Prefix:
        """The prefix of the selected patches, packed to `capacity`, and the prompt."""
        if operations is kernels and kernels.available(encoded.patches):
            from pruner_jax import kernels_pruner  # here, since it imports Triton

            masks = encoded.camera_mask, encoded.prompt_mask
            chosen = selection.kept, selection.counts
            packed = kernels_pruner.pack_prefix(
                encoded.patches, encoded.prompt, *masks, *chosen, capacity
            )
            return Prefix(*packed)
        return self.assemble(encoded, pack(_merge(encoded.patches, 1), selection, capacity))

    def embed_prefix(
        self,
        observation: Observation,
        pruner_noise: Float[Array, "*pools N N"] | None = None,
        train: bool = False,
    ) -> Prefix:
        """The prefix, pruned as the config says; its length is static.

        Args:
            observation: of JAX arrays.
            pruner_noise: in training, added to the scores: uniform in [0, 1) times the noise
                scale; [B, C, N, N], or [B, C*N, C*N] in the joint scope.
            train: soft selection, with a gradient to the scores.
        """
        encoded = self.encode(observation)
        return self.assemble(encoded, self._pruned(encoded, pruner_noise, train))

    def _pruned(
        self, encoded: Encoded, noise: Float[Array, "*pools N N"] | None, train: bool
    ) -> PrunedPatches | None:
        """The patches as the config prunes them, at a static length; None for all."""
        if train and self.config.token_pruning_enabled:
            return self.relax(encoded, noise)
        if noise is not None:
            raise ValueError(
                "pruner_noise: expected None unless token pruning is enabled and train=True"
            )
        if not self.config.prunes_at_inference:
            return None
        cameras, patches = encoded.patches.shape[1:3]
        budget = self.config.keep_budget
        capacity = cameras * (patches if budget is None else budget)
        return pack(_merge(encoded.patches, 1), self.select(encoded), capacity)

    def embed_suffix(
        self,
        state: Float[Array, "B A"],
        noisy_actions: Float[Array, "B H A"],
        time: Float[Array, "B"],
    ) -> Suffix:
        """The action expert's tokens at a flow matching time, 1 for noise and 0 for actions."""
        return self.embed_suffix_at(state, noisy_actions, self.embed_time(time))

    def embed_suffix_at(
        self,
        state: Float[Array, "B A"],
        noisy_actions: Float[Array, "B H A"],
        embedding: Float[Array, "B E"],
    ) -> Suffix:
        """The action expert's tokens for an embedded time."""
        actions = self.action_in_proj(noisy_actions)
        if self.config.pi05:
            condition = nnx.silu(self.time_mlp_out(nnx.silu(self.time_mlp_in(embedding))))
            return Suffix(tokens=actions.astype(self.dtype), condition=condition)
        repeated = jnp.broadcast_to(embedding[:, None], actions.shape)
        timed = jnp.concatenate([actions, repeated], axis=-1)
        actions = self.action_time_mlp_out(nnx.silu(self.action_time_mlp_in(timed)))
        tokens = jnp.concatenate([self.state_proj(state)[:, None], actions], axis=1)
        return Suffix(tokens=tokens.astype(self.dtype), condition=None)

    def embed_time(self, time: Float[Array, "B"]) -> Float[Array, "B E"]:
        """Sines and cosines of the time; see `pruner_spec.flow.time_embedding`."""
        width = self.config.action_expert.width
        angles = time[:, None] * constant(time_frequencies, (width,), time.dtype)
        return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)

    def compute_loss(
        self,
        observation: Observation,
        actions: Float[Array, "B H A"],
        noise: Float[Array, "B H A"],
        time: Float[Array, "B"],
        pruner_noise: Float[Array, "*pools N N"] | None = None,
        train: bool = True,
    ) -> Float[Array, "B H"]:
        """Flow matching's squared error, a mean over the action's dimensions.

        Args:
            observation: of NumPy or JAX arrays.
            actions: normalised, zero-padded to A.
            noise: standard normal.
            time: in (0, 1]; 1 is all noise.
            pruner_noise: see `embed_prefix`.
            train: soft selection of patches; False for the loss of the model as it is deployed.

        Raises:
            ValueError: an argument does not fit the config.
        """
        return self.loss_terms(observation, actions, noise, time, pruner_noise, train).loss

    def loss_terms(
        self,
        observation: Observation,
        actions: Float[Array, "B H A"],
        noise: Float[Array, "B H A"],
        time: Float[Array, "B"],
        pruner_noise: Float[Array, "*pools N N"] | None = None,
        train: bool = True,
    ) -> LossTerms:
        """`compute_loss`, with what it was computed from."""
        observation = self.prepare(observation)
        batch = observation.batch_size
        actions, noise, time = (self._as_wide(x) for x in (actions, noise, time))
        check_actions("actions", actions, batch, self.config)
        check_actions("noise", noise, batch, self.config)
        if pruner_noise is not None:
            pruner_noise = self._as_wide(pruner_noise)
        fraction = time[:, None, None]
        noisy_actions = fraction * noise + (1 - fraction) * actions
        encoded = self.encode(observation)
        pruned = self._pruned(encoded, pruner_noise, train)
        prefix = self.assemble(encoded, pruned)
        suffix = self.embed_suffix(observation.state, noisy_actions, time)
        _, output = self.joint(prefix, suffix)
        loss = jnp.square(self._velocity(output) - (noise - actions)).mean(axis=-1)
        return LossTerms(loss=loss, encoded=encoded, pruned=pruned)

    def attention(self, prefix: Prefix) -> tuple[Bool[Array, "B S+H S+H"], Int[Array, "B S+H"]]:
        """Mask and positions of the whole sequence, prefix and suffix."""
        batch, length = prefix.valid.shape
        place = jnp.arange(length + self.config.suffix_length)
        suffix_valid = jnp.ones((batch, self.config.suffix_length), bool)
        valid = jnp.concatenate([prefix.valid, suffix_valid], axis=1)
        mask = sequence.attention_mask(valid, sequence.block_start(self.config, place, length))
        suffix_positions = prefix.length[:, None] + place[: self.config.suffix_length]
        return mask, jnp.concatenate([prefix.positions, suffix_positions], axis=1)

    def joint(
        self, prefix: Prefix, suffix: Suffix
    ) -> tuple[Float[Array, "B S D"], Float[Array, "B H E"]]:
        """Both experts over the whole sequence, as in training: their outputs."""
        mask, positions = self.attention(prefix)
        return self.gemma(
            prefix.tokens,
            suffix.tokens,
            suffix.condition,
            mask,
            positions,
            self.gradient_checkpointing,
        )

    def prefill(self, prefix: Prefix) -> KVCache:
        """Keys and values of the prefix, for the denoising steps."""
        mask, positions = self.attention(prefix)
        length = prefix.tokens.shape[1]
        _, cache = self.gemma.prefill(
            prefix.tokens, mask[:, :length, :length], positions[:, :length]
        )
        return cache

    def velocity(
        self,
        prefix: Prefix,
        cache: KVCache,
        state: Float[Array, "B A"],
        noisy_actions: Float[Array, "B H A"],
        embedding: Float[Array, "E"],
    ) -> Float[Array, "B H A"]:
        """One denoising step's velocity, from the cached prefix, at an embedded time."""
        repeated = jnp.broadcast_to(embedding, (state.shape[0], *embedding.shape))
        suffix = self.embed_suffix_at(state, noisy_actions, repeated)
        mask, positions = self.attention(prefix)
        length = prefix.tokens.shape[1]
        output = self.gemma.decode(
            suffix.tokens, suffix.condition, mask[:, length:], positions[:, length:], cache
        )
        return self._velocity(output)

    def sample_actions(
        self,
        observation: Observation,
        noise: Float[Array, "B H A"],
        num_steps: int = 10,
    ) -> Float[Array, "B H A"]:
        """Actions, denoised from the noise by Euler steps. See `sampling.sample_actions`."""
        return sampling.sample_actions(self, observation, noise, num_steps)

    def prepare(self, observation: Observation) -> Observation:
        """The observation as arrays of the model's dtypes, checked against the config.

        NumPy's stay NumPy's: a compiled function takes them to the device, in one go. So do images
        of uint8, of which it scales those that it looks at.
        """
        observation.check(self.config)

        def convert(array: Any) -> Array | np.ndarray:
            array = array if isinstance(array, Array | np.ndarray) else jnp.asarray(array)
            is_float = jnp.issubdtype(array.dtype, jnp.floating)
            dtype = wide(self.dtype) if is_float else array.dtype
            return array if array.dtype == dtype else array.astype(dtype)

        return observation.map(convert, checked=False)

    def _as_wide(self, array: Any) -> Array:
        return jnp.asarray(array).astype(wide(self.dtype))

    def _velocity(self, output: Float[Array, "B H E"]) -> Float[Array, "B H A"]:
        return self.action_out_proj(
            output[:, -self.config.action_horizon :].astype(wide(self.dtype))
        )


def _merge(x: Float[Array, "..."], axis: int) -> Float[Array, "..."]:
    """x with `axis` and the axis after it as one."""
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])

"""The fast way from an observation to actions: a model, deployed.

A call is two compiled functions of static shapes, `encode` and `act` (`forward`), and, with the
implicit selection, one read of an integer between them.

Dimension letters: B batch, H action horizon, A action dim.
"""

import dataclasses
import functools
import logging
import math
from types import ModuleType
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from pruner_jax import kernels, kernels_autotune, kernels_plain, sampling, triton_call
from pruner_jax.deployed import Deployed, Schedule, clock_of, deploy, schedule
from pruner_jax.forward import Cache, act, denoise, embed, encode, prefill
from pruner_jax.layers import as_float, wide
from pruner_jax.pruner import Selection
from pruner_jax.tables import Gathered
from pruner_kernels import few_rows
from pruner_spec.inference import InferenceSettings
from pruner_spec.observation import EncodingPlan, Observation

if TYPE_CHECKING:
    from pruner_jax.pi0 import Encoded, Pi0, Prefix

logger = logging.getLogger(__name__)


class Sampler:
    """A deployed model: its `sample_actions` is the model's, and so are the statistics it leaves.

    What it packs are copies: a model that is trained further is deployed anew.

    Args:
        model: whose weights these are.
        settings: None for the defaults.

    Raises:
        ValueError: the settings ask for what only PyTorch has.
    """

    def __init__(self, model: "Pi0", settings: InferenceSettings | None = None) -> None:
        self.settings = InferenceSettings() if settings is None else settings
        self.settings.check_for_jax()
        graph, state = nnx.split(model)
        # Without parameters, so that those of the model may go; the record is the model's.
        self.model = nnx.merge(graph, jax.eval_shape(lambda: state))
        weights = self._weights = deploy(model, self.settings.float8)
        self._clock = clock_of(model)
        # Each array that a function is handed takes its time: none that it does not read, and of
        # many small ones a table.
        nothing = jax.tree.map(lambda _: None, weights.vision)
        self._seeing = Gathered(dataclasses.replace(weights, language=(), action=()))
        self._acting = Gathered(dataclasses.replace(weights, vision=nothing))
        self._schedules: dict[int, Schedule] = {}
        self._rooms: dict[tuple[int, ...], int | None] = {}  # of the last call of these sizes
        self._tuned: set[int] = set()  # lengths of the prefix
        # Kernels depend on compilers and drivers: what launches them is tried once.
        launches = self.settings.kernels and triton_call.available()
        self._untried = {"_encode", "_act"} if launches else set()
        self._compile(kernels if self.settings.kernels else kernels_plain)

    def _compile(self, operations: ModuleType) -> None:
        self._operations = operations
        options: dict[str, Any] = {}
        if jax.default_backend() == "gpu":
            # Products by cuBLAS: XLA's own are split, and their parts summed by launches more. In
            # float64, where accuracy is all there is to gain, cuBLAS adds a bias 3e-10 off.
            if self.model.dtype != jnp.float64:
                options["xla_gpu_enable_triton_gemm"] = False
            if not self.settings.graphs:
                # XLA's CUDA graphs, here of no kind of operation; a `Chain` has its own.
                options["xla_gpu_enable_command_buffer"] = ""
        jit = functools.partial(jax.jit, compiler_options=options)

        def over(function: Any, weights: Gathered[Deployed]) -> Any:
            def call(arrays: tuple[Array, ...], *inputs: Any) -> Any:
                return function(self.model, weights.tree(arrays), *inputs, operations=operations)

            return call

        self._encode = jit(over(_encode, self._seeing), static_argnums=3)
        ways = {"graphs": self.settings.graphs}
        self._act = jit(over(functools.partial(act, **ways), self._acting), static_argnums=6)
        self._embed = jit(over(_embed, self._seeing), static_argnums=3)
        self._select = jit(functools.partial(self.model.select, operations=operations))
        prune = functools.partial(sampling.prune, self.model, operations=operations)
        self._prune = jit(prune, static_argnums=2)
        self._prefill = jit(over(prefill, self._acting))
        self._denoise = jit(over(functools.partial(denoise, **ways), self._acting))

    def sample_actions(
        self,
        observation: Observation,
        noise: Float[Array, "B H A"],
        num_steps: int = 10,
    ) -> Float[Array, "B H A"]:
        """Actions, denoised from the noise. See `sampling.sample_actions`."""
        return sampling.sample_actions(self.model, observation, noise, num_steps, stages=self)

    def warm_up(
        self,
        observation: Observation,
        noise: Float[Array, "B H A"],
        num_steps: int = 10,
    ) -> None:
        """Computes actions once for every number of patches that may be kept.

        Args:
            observation, noise: of the sizes and dtypes to come.
            num_steps: Euler steps.
        """
        plan = sampling.plan_of(observation)
        there = self.model.prepare(observation)
        encoded, selection = self.encode(there, plan)
        for room in sampling.capacities(self.model, len(plan.cameras)):
            self.act(encoded, selection, there.state, noise, room, num_steps)
        self._rooms.clear()  # none of these was an observation's

    def distance(
        self,
        model: "Pi0",
        observation: Observation,
        noise: Float[Array, "B H A"],
        num_steps: int = 10,
    ) -> float:
        """How far this way is from the plain one: in the patches, or in actions from the same ones.

        Args:
            model: that this is a sampler of.
            observation, noise: of a call that has been made before.
            num_steps: Euler steps.

        Returns:
            The larger of the two relative distances; infinite where a number is not finite.
        """
        plain, plan = sampling.PlainStages(model), sampling.plan_of(observation)
        there = model.prepare(observation)
        encoded, selection = plain.encode(there, plan)
        patches = _distance(self.embed(there, plan).patches, encoded.patches)
        room = sampling.capacity(model, encoded, selection)
        inputs = (encoded, selection, there.state, noise, room, num_steps)
        return max(patches, _distance(self.act(*inputs), plain.act(*inputs)))

    def encode(self, observation: Observation, plan: EncodingPlan) -> "tuple[Encoded, Selection]":
        """See `sampling.Stages`."""
        return self._run("_encode", self._seeing.arrays, *_inputs_of(observation, plan))

    def act(
        self,
        encoded: "Encoded",
        selection: Selection,
        state: Float[Array, "B A"],
        noise: Float[Array, "B H A"],
        capacity: int | None,
        num_steps: int,
    ) -> Float[Array, "B H A"]:
        """See `sampling.Stages`."""
        self._rooms[_sizes(encoded)] = capacity
        self._tune(_prefix_length(encoded, capacity))
        steps = self._schedule(num_steps)
        inputs = (self._acting.arrays, steps, encoded, selection, state, noise, capacity)
        return self._run("_act", *inputs)

    def expected(self, encoded: "Encoded") -> int | None:
        """See `sampling.Stages`."""
        return self._rooms.get(_sizes(encoded)) if self.settings.guess else None

    def embed(self, observation: Observation, plan: EncodingPlan) -> "Encoded":
        """See `sampling.Stages`."""
        return self._embed(self._seeing.arrays, *_inputs_of(observation, plan))

    def select(self, encoded: "Encoded") -> Selection:
        """See `sampling.Stages`."""
        return self._select(encoded)

    def prune(self, encoded: "Encoded", selection: Selection, capacity: int | None) -> "Prefix":
        """See `sampling.Stages`."""
        return self._prune(encoded, selection, capacity)

    def prefill(self, prefix: "Prefix") -> Cache:
        """See `sampling.Stages`."""
        return self._prefill(self._acting.arrays, prefix)

    def denoise(
        self,
        prefix: "Prefix",
        cache: Cache,
        state: Float[Array, "B A"],
        noise: Float[Array, "B H A"],
        num_steps: int,
    ) -> Float[Array, "B H A"]:
        """See `sampling.Stages`."""
        self._tune(cache.valid.shape[1])
        return self._denoise(self._acting.arrays, self._schedule(num_steps), cache, state, noise)

    def _tune(self, prefix: int) -> None:
        """Times tiles, if asked to, before what reads so long a prefix is compiled."""
        launches = self._operations is kernels
        if not (self.settings.autotune and launches) or prefix in self._tuned:
            return
        self._tuned.add(prefix)
        config, expert = self.model.config, self.model.config.action_expert
        has_kernel = config.pi05 and expert.num_kv_heads == 1  # see `_attend`
        rows = config.suffix_length
        sizes = rows, self._weights.action[0], expert.head_dim, config.action_dim
        is_chain = few_rows.attends(prefix + rows, expert.head_dim) and kernels.packs(*sizes)
        if config.pi05 and is_chain:
            return  # CUDA C++ has no tiles to choose
        keys = prefix + rows if has_kernel else None
        kernels_autotune.autotune(self._weights.action, rows, keys, expert.head_dim)

    def _run(self, name: str, *inputs: Any) -> Any:
        """A function's result; where the kernels do not run, by XLA alone from then on."""
        if name not in self._untried:
            return getattr(self, name)(*inputs)
        try:
            result = jax.block_until_ready(getattr(self, name)(*inputs))
        except Exception as error:  # a compiler's, a driver's: whatever it is, there is another way
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            logger.warning("the Triton kernels do not run here, %s; XLA's are slower", reason)
            logger.debug("the Triton kernels failed", exc_info=True)
            self._untried.clear()
            self._compile(kernels_plain)
            return getattr(self, name)(*inputs)
        self._untried.discard(name)
        return result

    def _schedule(self, num_steps: int) -> Schedule:
        if num_steps not in self._schedules:
            layers, dtype = self._weights.action, self.model.dtype
            self._schedules[num_steps] = schedule(self._clock, layers, num_steps, dtype)
        return self._schedules[num_steps]


def _inputs_of(observation: Observation, plan: EncodingPlan) -> tuple[Any, ...]:
    """What `encode` reads of an observation, as the host sends it to the device.

    Returns:
        images, a camera each; camera masks, prompt and prompt mask, on the host one array of
        integers, [B, C + 2*L], since each that it sends takes its time; L.
    """
    length = plan.prompt_length
    images = tuple(observation.images[camera] for camera in plan.cameras)
    masks = [observation.image_masks[camera] for camera in plan.cameras]
    prompt = (observation.tokenized_prompt, observation.tokenized_prompt_mask)
    if not all(isinstance(part, np.ndarray) for part in (*masks, *prompt)):
        return images, (*masks, *prompt), length
    parts = (*(mask[:, None] for mask in masks), *(part[:, :length] for part in prompt))
    packed = np.concatenate([part.astype(np.int32) for part in parts], axis=1)
    return images, packed, length


def _encode(
    model: "Pi0",
    weights: Deployed,
    images: tuple[Array, ...],
    rest: Any,
    length: int,
    operations: ModuleType = kernels_plain,
) -> "tuple[Encoded, Any]":
    """`encode`, of what `_inputs_of` gives."""
    return encode(model, weights, *_unpacked(model, images, rest, length), operations)


def _embed(
    model: "Pi0",
    weights: Deployed,
    images: tuple[Array, ...],
    rest: Any,
    length: int,
    operations: ModuleType = kernels_plain,
) -> "Encoded":
    """`embed`, of what `_inputs_of` gives."""
    return embed(model, weights, *_unpacked(model, images, rest, length), operations)


def _unpacked(
    model: "Pi0", images: tuple[Array, ...], rest: Any, length: int
) -> tuple[Array, Array, Array, Array]:
    """Images, camera mask, prompt and prompt mask."""
    images = tuple(as_float(image, wide(model.dtype)) for image in images)
    if isinstance(rest, tuple):
        *masks, prompt, prompt_mask = rest
        camera_mask = jnp.stack(masks, axis=1)
        prompt, prompt_mask = prompt[:, :length], prompt_mask[:, :length]
    else:
        camera_mask, prompt, prompt_mask = jnp.split(rest, [len(images), len(images) + length], 1)
        camera_mask, prompt_mask = camera_mask != 0, prompt_mask != 0
    return jnp.stack(images, axis=1), camera_mask, prompt, prompt_mask


def _sizes(encoded: "Encoded") -> tuple[int, ...]:
    """On which the shapes of a call depend."""
    return *encoded.patches.shape[:2], encoded.prompt.shape[1]


def _prefix_length(encoded: "Encoded", capacity: int | None) -> int:
    """Tokens of the prefix, padding counted."""
    cameras, patches = encoded.patches.shape[1:3]
    return (cameras * patches if capacity is None else capacity) + encoded.prompt.shape[1]


def _distance(found: Float[Array, "*shape"], expected: Float[Array, "*shape"]) -> float:
    """Norm of the difference, over the norm of what is expected; infinite for NaN."""
    wide_found, wide_expected = (np.asarray(x).astype(np.float64) for x in (found, expected))
    apart = np.linalg.norm(wide_found - wide_expected) / np.linalg.norm(wide_expected)
    return float(apart) if math.isfinite(apart) else math.inf

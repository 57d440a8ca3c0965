"""The fast way from an observation to actions: a model, deployed.

A call is two functions of static shapes, `encode` and `act` (`forward`), and, with the implicit
selection, one read of an integer between them. On an NVIDIA GPU both are CUDA graphs.

Dimension letters: B batch, H action horizon, A action dim.
"""

import dataclasses
import logging
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from pruner_kernels import few_rows
from pruner_spec.inference import InferenceSettings
from pruner_spec.observation import EncodingPlan, Observation
from pruner_torch import kernels, kernels_autotune, kernels_plain, sampling
from pruner_torch.deployed import Schedule, clock_of, deploy, schedule
from pruner_torch.forward import Cache, act, denoise, embed, encode, prefill
from pruner_torch.gemma import Rotary
from pruner_torch.graphs import Graphs
from pruner_torch.layers import as_float, wide
from pruner_torch.pruner import Selection

if TYPE_CHECKING:
    from pruner_torch.pi0 import Encoded, Pi0, Prefix

# Two ways that only round differently are a tenth of this apart, also in bfloat16. In float8 it is
# up to a seventh, through as many layers as π0.5 has: of random weights a product is some 4 % off,
# but it is added to what came before. What a compiler gets wrong is farther away.
_APART = 0.25

logger = logging.getLogger(__name__)


class Sampler:
    """A deployed model: its `sample_actions` is the model's, and so are the statistics it leaves.

    What it packs are copies: a model that is trained further is deployed anew.

    Args:
        model: whose weights these are.
        settings: None for the defaults.
    """

    def __init__(self, model: "Pi0", settings: InferenceSettings | None = None) -> None:
        self.model = model
        self.settings = InferenceSettings() if settings is None else settings
        self._weights, self._clock = deploy(model, self.settings.float8), clock_of(model)
        self._schedules: dict[int, Schedule] = {}
        self._rooms: dict[tuple[int, ...], int | None] = {}  # of the last call of these sizes
        self._tuned: set[int] = set()  # lengths of the prefix
        # While something is being traced, `kernels` are `kernels_plain`.
        operations = kernels if self.settings.kernels else kernels_plain
        self._ways: Any = {"compiled": self.settings.compiled, "operations": operations}
        has_graphs = self.settings.graphs and model.device.type == "cuda"
        self._graphs = Graphs(model.device, self.settings.max_graphs) if has_graphs else None

    def sample_actions(
        self,
        observation: Observation,
        noise: Float[Tensor, "B H A"],
        num_steps: int = 10,
    ) -> Float[Tensor, "B H A"]:
        """Actions, denoised from the noise. See `sampling.sample_actions`."""
        return sampling.sample_actions(self.model, observation, noise, num_steps, stages=self)

    @torch.no_grad()
    def warm_up(
        self,
        observation: Observation,
        noise: Float[Tensor, "B H A"],
        num_steps: int = 10,
    ) -> None:
        """Computes actions once for every number of patches that may be kept.

        Args:
            observation, noise: of the sizes and dtypes to come.
            num_steps: Euler steps.
        """
        plan = sampling.plan_of(observation)
        dtype = wide(self.model.dtype)
        state, noise = (torch.as_tensor(x).to(dtype) for x in (observation.state, noise))
        encoded, selection = self.encode(observation, plan)
        for room in sampling.capacities(self.model, len(plan.cameras)):
            self.act(encoded, selection, state, noise, room, num_steps)
        self._rooms.clear()  # none of these was an observation's

    @torch.no_grad()
    def distance(
        self,
        model: "Pi0",
        observation: Observation,
        noise: Float[Tensor, "B H A"],
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

        def call(*inputs: Tensor) -> "tuple[Encoded, Selection]":
            return encode(self.model, self._weights, *self._read(inputs), **self._ways)

        return self._replayed(call, self._inputs_of(observation, plan), (), "encode")

    def act(
        self,
        encoded: "Encoded",
        selection: Selection,
        state: Float[Tensor, "B A"],
        noise: Float[Tensor, "B H A"],
        capacity: int | None,
        num_steps: int,
    ) -> Float[Tensor, "B H A"]:
        """See `sampling.Stages`."""
        self._rooms[_sizes(encoded)] = capacity
        self._tune(_prefix_length(encoded, capacity))
        steps = self._schedule(num_steps)

        def call(state: Tensor, noise: Tensor, *standing: Tensor) -> Tensor:
            read, chosen = type(encoded)(*standing[:4]), Selection(*standing[4:])
            inputs = (steps, read, chosen, state, noise, capacity)
            return act(self.model, self._weights, *inputs, **self._ways)

        standing = (*_tensors(encoded), *_tensors(selection))
        actions = self._replayed(call, (state, noise), standing, "act", capacity, num_steps)
        return actions if self._graphs is None else actions.clone()

    def expected(self, encoded: "Encoded") -> int | None:
        """See `sampling.Stages`."""
        return self._rooms.get(_sizes(encoded)) if self.settings.guess else None

    def embed(self, observation: Observation, plan: EncodingPlan) -> "Encoded":
        """See `sampling.Stages`."""

        def call(*inputs: Tensor) -> "Encoded":
            return embed(self.model, self._weights, *self._read(inputs), **self._ways)

        return self._replayed(call, self._inputs_of(observation, plan), (), "embed")

    def select(self, encoded: "Encoded") -> Selection:
        """See `sampling.Stages`."""

        def call(*standing: Tensor) -> Selection:
            return self.model.select(type(encoded)(*standing), self._ways["operations"])

        return self._replayed(call, (), _tensors(encoded), "select")

    def prune(self, encoded: "Encoded", selection: Selection, capacity: int | None) -> "Prefix":
        """See `sampling.Stages`."""

        def call(*standing: Tensor) -> "Prefix":
            read, chosen = type(encoded)(*standing[:4]), Selection(*standing[4:])
            operations = self._ways["operations"]
            return sampling.prune(self.model, read, chosen, capacity, operations)

        standing = (*_tensors(encoded), *_tensors(selection))
        return self._replayed(call, (), standing, "prune", capacity)

    def prefill(self, prefix: "Prefix") -> Cache:
        """See `sampling.Stages`."""

        def call(*standing: Tensor) -> Cache:
            read = type(prefix)(*standing)
            return prefill(self.model, self._weights, read, **self._ways)

        return self._replayed(call, (), _tensors(prefix), "prefill")

    def denoise(
        self,
        prefix: "Prefix",
        cache: Cache,
        state: Float[Tensor, "B A"],
        noise: Float[Tensor, "B H A"],
        num_steps: int,
    ) -> Float[Tensor, "B H A"]:
        """See `sampling.Stages`."""
        self._tune(cache.valid.shape[1])
        steps, layers = self._schedule(num_steps), len(cache.key)

        def call(state: Tensor, noise: Tensor, *standing: Tensor) -> Tensor:
            valid, cos, sin = standing[2 * layers :]
            key, value = standing[:layers], standing[layers : 2 * layers]
            read = Cache(key, value, valid, Rotary(cos, sin))
            return denoise(self.model, self._weights, steps, read, state, noise, **self._ways)

        standing = (*cache.key, *cache.value, cache.valid, *_tensors(cache.suffix))
        return self._replayed(call, (state, noise), standing, "denoise", num_steps)

    def _replayed(
        self,
        call: Callable[..., Any],
        fresh: tuple[Tensor, ...],
        standing: tuple[Tensor, ...],
        stage: str,
        *choices: int | None,
    ) -> Any:
        """The result of a stage; of a graph's, which the next call of that stage overwrites."""
        if self._graphs is None:
            return call(*(x.to(self.model.device) for x in fresh), *standing)
        kinds = tuple((x.shape, x.dtype) for x in (*fresh, *standing))
        return self._graphs(stage, (choices, kinds), call, fresh, standing)

    @staticmethod
    def _inputs_of(observation: Observation, plan: EncodingPlan) -> tuple[Tensor, ...]:
        """What `encode` reads of an observation, each a transfer, or a copy, a call.

        Returns:
            images, a camera each; the masks of cameras and prompt in one, [B, C + L]; the prompt.
        """
        images = (observation.images[camera] for camera in plan.cameras)
        masks = sampling.joined_masks(observation, plan.cameras, plan.prompt_length)
        prompt = observation.tokenized_prompt[:, : plan.prompt_length]
        return tuple(map(torch.as_tensor, (*images, masks, prompt)))

    def _read(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Images, camera mask, prompt and prompt mask, of what `_inputs_of` gives."""
        *given, masks, prompt = inputs
        images = as_float(torch.stack(given, dim=1), wide(self.model.dtype))
        return images, masks[:, : len(given)], prompt, masks[:, len(given) :]

    def _tune(self, prefix: int) -> None:
        """Times tiles, if asked to, before what reads so long a prefix is captured."""
        launches = self.settings.kernels and not self.settings.compiled
        if not (self.settings.autotune and launches) or prefix in self._tuned:
            return
        self._tuned.add(prefix)
        config, expert = self.model.config, self.model.config.action_expert
        has_kernel = config.pi05 and expert.num_kv_heads == 1  # see `_attend`
        rows = config.suffix_length
        sizes = rows, self._weights.action[0], expert.head_dim, config.action_dim
        is_packed = few_rows.attends(prefix + rows, expert.head_dim) and kernels.packs(*sizes)
        if config.pi05 and is_packed:
            return  # CUDA C++ has no tiles to choose
        keys = prefix + rows if has_kernel else None
        kernels_autotune.autotune(self._weights.action, rows, keys, expert.head_dim)

    def _schedule(self, num_steps: int) -> Schedule:
        if num_steps not in self._schedules:
            self._schedules[num_steps] = schedule(
                self._clock, self._weights.action, num_steps, self.model.dtype
            )
        return self._schedules[num_steps]


def tried(
    model: "Pi0",
    observation: Observation,
    noise: Float[Tensor, "B H A"],
    num_steps: int = 10,
    settings: InferenceSettings | None = None,
) -> sampling.Stages:
    """A sampler, if it gives the plain way's actions here; and else the plain way.

    It depends on the GPU and on what is installed, and a robot must not be the one to find out.

    Args:
        model: whose weights these are.
        observation, noise: to try it with.
        num_steps: Euler steps.
        settings: of the sampler.
    """
    try:
        sampler = Sampler(model, settings)
        sampler.sample_actions(observation, noise, num_steps)
        there = torch.as_tensor(noise, device=model.device).to(wide(model.dtype))
        apart = sampler.distance(model, observation, there, num_steps)
        if apart <= _APART:
            return sampler
        reason = f"its actions are {apart:.1e} from the plain way's"
    except Exception as error:  # a compiler's, a driver's: whatever it is, there is another way
        logger.debug("the fast way failed", exc_info=True)
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
    logger.warning("the fast way is not taken, %s; the plain one is slower", reason)
    return sampling.PlainStages(model)


def _tensors(record: Any) -> tuple[Tensor, ...]:
    """The fields of a dataclass."""
    return tuple(getattr(record, field.name) for field in dataclasses.fields(record))


def _sizes(encoded: "Encoded") -> tuple[int, ...]:
    """On which the shapes of a call depend."""
    return *encoded.patches.shape[:2], encoded.prompt.shape[1]


def _prefix_length(encoded: "Encoded", capacity: int | None) -> int:
    """Tokens of the prefix, padding counted."""
    cameras, patches = encoded.patches.shape[1:3]
    return (cameras * patches if capacity is None else capacity) + encoded.prompt.shape[1]


def _distance(found: Float[Tensor, "*shape"], expected: Float[Tensor, "*shape"]) -> float:
    """Norm of the difference, over the norm of what is expected; infinite for NaN."""
    found, expected = found.double(), expected.double()
    apart = float((found - expected).norm() / expected.norm())
    return apart if math.isfinite(apart) else math.inf

"""`pruner_jax` as the application sees it."""

import dataclasses
import functools
import math
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pruner_jax import checkpoint, sampling, sharding
from pruner_jax.inference import Sampler
from pruner_jax.pi0 import Pi0
from pruner_jax.pruner import Selection
from pruner_jax.training import Trainer
from pruner_run.backend import Pruned, Weights, stage_times
from pruner_spec.config import Pi0Config
from pruner_spec.inference import InferenceSettings
from pruner_spec.observation import EncodingPlan, Observation
from pruner_spec.parameters import Parameter, parameter_dtype, parameter_table, random_scale
from pruner_spec.training import TrainingSettings

_ADDRESS = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_COMPILED = pathlib.Path("~/.cache/pi05-pruner/jax")
_DRAWN_HERE = 1 << 20  # numbers of an array that the host draws before a function is compiled
_TASKS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")


class JaxBackend:
    """JAX, on its default device."""

    name = "jax"
    title = "JAX"

    @property
    def device(self) -> str:
        return jax.default_backend()

    def model(
        self,
        config: Pi0Config,
        weights: Weights | None,
        *,
        fast: bool | None = False,
        settings: InferenceSettings | None = None,
    ) -> "JaxModel":
        if settings is not None:
            settings.check_for_jax()  # before minutes of reading
        if self.device != "cpu":
            _keep_compiled()
        fast = self.device != "cpu" if fast is None else fast
        model = _random_model(config) if weights is None else checkpoint.load(weights, config)
        return JaxModel(model, fast=fast, settings=settings)

    def devices(self, fsdp_devices: int = 1) -> "JaxDevices":
        return JaxDevices(fsdp_devices)


def _random_model(config: Pi0Config) -> Pi0:
    """Drawn on the device, where 3 billion numbers take no time."""
    table = parameter_table(config)
    # The device's own generator: quick to compile, and nobody asks for these numbers again.
    keys = jax.random.split(jax.random.key(0, impl="rbg"), len(table))
    generator = np.random.default_rng(0)

    def draw(key: jax.Array, family: Parameter) -> jax.Array | np.ndarray:
        shape, (mean, deviation) = family.stacked_shape, random_scale(family)
        if math.prod(shape) > _DRAWN_HERE:
            dtype = jnp.dtype(parameter_dtype(family.name, config.dtype))
            return _normal(key, shape, dtype, mean, deviation)
        values = generator.standard_normal(shape, dtype=np.float32)
        return np.float32(mean) + np.float32(deviation) * values

    model = nnx.eval_shape(lambda: Pi0(config, seed=None))
    named = ((name, draw(key, table[name])) for key, name in zip(keys, table, strict=True))
    checkpoint.assign(model, named)  # type: ignore[arg-type]  # arrays of JAX do as well
    jax.block_until_ready(nnx.state(model))
    return model


@functools.partial(jax.jit, static_argnums=(1, 2))
def _normal(
    key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype, mean: float, deviation: float
) -> jax.Array:
    return (mean + deviation * jax.random.normal(key, shape)).astype(dtype)


def _keep_compiled() -> None:
    """What XLA compiles here the next process need not, unless JAX was told of a place for it."""
    if jax.config.jax_compilation_cache_dir is None:  # pyright: ignore[reportAttributeAccessIssue]
        jax.config.update("jax_compilation_cache_dir", str(_COMPILED.expanduser()))
        # Small functions too: there are hundreds of them at a start.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


class JaxDevices:
    """All devices of this process, and of those that were started with it."""

    def __init__(self, fsdp_devices: int) -> None:
        _join()
        self.process, self.processes = jax.process_index(), jax.process_count()
        self.count = jax.device_count()
        is_one = self.count == fsdp_devices == 1
        self._mesh = None if is_one else sharding.make_mesh(fsdp_devices)

    def trainer(
        self,
        config: Pi0Config,
        settings: TrainingSettings,
        weights: Weights | None,
        compiled: bool | None = None,
    ) -> Trainer:
        if config.dtype == "float64":  # in the whole process, which is the run's
            jax.config.update("jax_enable_x64", True)
        return Trainer(config, settings, weights, mesh=self._mesh)

    def largest(self, number: int) -> Any:
        return number if self._mesh is None else sharding.largest(number, self._mesh)

    def close(self) -> None:
        if self.processes > 1:
            jax.distributed.shutdown()


def _join() -> None:
    """Meets the other processes of a run; before JAX looks for devices.

    Of Slurm and Open MPI it knows itself how many there are; elsewhere the environment says so.
    """
    given = {name: os.environ[name] for name in _ADDRESS if name in os.environ}
    if len(given) == len(_ADDRESS):
        address, count, number = given.values()
        jax.distributed.initialize(address, int(count), int(number))
    elif given:
        raise ValueError(f"expected all or none of {', '.join(_ADDRESS)} to be set, got {given}")
    elif any(int(os.environ.get(name, "1")) > 1 for name in _TASKS):
        jax.distributed.initialize()


class JaxModel:
    """A `Pi0`, NumPy in and out."""

    def __init__(
        self, model: Pi0, *, fast: bool = False, settings: InferenceSettings | None = None
    ) -> None:
        self._stages: sampling.Stages = (
            Sampler(model, settings) if fast else sampling.PlainStages(model)
        )
        # The sampler has its own arrays, and does without the model's.
        self._model = self._stages.model if isinstance(self._stages, Sampler) else model

    def sample_actions(
        self, observation: Observation, noise: np.ndarray, num_steps: int
    ) -> np.ndarray:
        return np.asarray(self._sample(observation, noise, num_steps))

    def warm_up(self, observation: Observation, noise: np.ndarray, num_steps: int) -> None:
        # For every number of patches that may be kept XLA would compile for minutes.
        self.sample_actions(observation, noise, num_steps)

    def loss(
        self, observation: Observation, actions: np.ndarray, noise: np.ndarray, time: np.ndarray
    ) -> np.ndarray:
        graph, weights = nnx.split(self._model)

        @jax.jit
        def loss(weights: Any, *arrays: Any) -> jax.Array:
            return nnx.merge(graph, weights).compute_loss(*arrays, train=False)

        return np.asarray(loss(weights, observation, actions, noise, time))

    def pruned(self) -> Pruned:
        _, encoded, selection = self._model.record.last
        return Pruned(
            patches=np.asarray(encoded.patches),
            prompt=np.asarray(encoded.prompt),
            prompt_mask=np.asarray(encoded.prompt_mask),
            kept=np.asarray(selection.kept).reshape(encoded.patches.shape[:3]),
        )

    def kept(self) -> dict[str, np.ndarray]:
        cameras, encoded, selection = self._model.record.last
        kept = np.asarray(selection.kept).reshape(encoded.patches.shape[:3])
        return dict(zip(cameras, kept.swapaxes(0, 1), strict=True))

    def prepared(
        self, observation: Observation, noise: np.ndarray, num_steps: int
    ) -> Callable[[], jax.Array]:
        there = self._model.prepare(observation).map(jnp.asarray)
        noise_there = jnp.asarray(noise, there.state.dtype)
        # The host looks at masks before anything else; on the device it would have to wait.
        there = dataclasses.replace(
            there,
            image_masks=observation.image_masks,
            tokenized_prompt_mask=observation.tokenized_prompt_mask,
        )

        def call() -> jax.Array:
            return self._sample(there, noise_there, num_steps).block_until_ready()

        return call

    def prefix_length(self, observation: Observation) -> int:
        plan, model = sampling.plan_of(observation), self._model
        patches = len(plan.cameras) * model.config.vision.num_patches
        if model.config.prunes_at_inference:
            _, encoded, selection = model.record.last
            patches = sampling.capacity(model, encoded, selection) or patches
        return patches + plan.prompt_length

    def stages(
        self, observation: Observation, noise: np.ndarray, num_steps: int
    ) -> dict[str, float]:
        there = self._model.prepare(observation).map(jnp.asarray)
        return stage_times(
            self._stages,
            there,
            sampling.plan_of(observation),
            jnp.asarray(noise, there.state.dtype),
            num_steps,
            capacity=functools.partial(sampling.capacity, self._model),
            finish=jax.block_until_ready,
        )

    def sample_kept(
        self,
        observation: Observation,
        noise: np.ndarray,
        num_steps: int,
        kept: Mapping[str, np.ndarray],
    ) -> np.ndarray:
        model, chosen = self._model, np.concatenate(list(kept.values()), axis=1)
        stages = _ChosenStages(model, jnp.asarray(chosen))
        actions = self._sample(observation, noise, num_steps, stages)
        cameras, encoded, _ = model.record.last
        model.record.last = (cameras, encoded, stages.own)
        return np.asarray(actions)

    def widened(self) -> "JaxModel":
        config = dataclasses.replace(self._model.config, dtype="float32")
        model = nnx.eval_shape(lambda: Pi0(config, seed=None))

        def widen(array: jax.Array) -> jax.Array:
            wide = array.astype(jnp.float32)
            if array.dtype != jnp.float32:
                array.delete()  # never all of both at once
            return wide

        nnx.update(model, jax.tree.map(widen, nnx.state(self._model, nnx.Param)))
        return _WideModel(model)

    def _sample(
        self,
        observation: Observation,
        noise: Any,
        num_steps: int,
        stages: sampling.Stages | None = None,
    ) -> jax.Array:
        stages = self._stages if stages is None else stages
        return sampling.sample_actions(self._model, observation, noise, num_steps, stages)

    def stats(self) -> dict[str, Any]:
        return self._model.get_token_pruning_stats()


class _WideModel(JaxModel):
    """A float32 model as a reference: on a GPU JAX would compute its products in TF32."""

    def _sample(self, *arguments: Any) -> jax.Array:
        with jax.default_matmul_precision("highest"):
            return super()._sample(*arguments)


class _ChosenStages(sampling.PlainStages):
    """The plain way, with patches that were chosen elsewhere; `own` are those it would keep."""

    def __init__(self, model: Pi0, kept: jax.Array) -> None:
        super().__init__(model)
        self._kept = kept
        self.own: Selection | None = None

    def encode(self, observation: Observation, plan: EncodingPlan) -> tuple[Any, Selection]:
        encoded, self.own = super().encode(observation, plan)
        return encoded, Selection.of(self._kept, self.own.nonfinite)


create = JaxBackend

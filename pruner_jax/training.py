"""The training step, as `pruner_spec.training` and `pruner_spec.optimization` define it.

Parameters and moments are float32 (float64 in a float64 model), by our names; the model computes in
its own dtype. What changes with the step, its number, the learning rate and the noise's scale, goes
into the compiled function as arrays, so that it is compiled once.

Over several processes each has a trainer, calls it when the others do, and gives it its own share
of the batch; see `sharding`.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float

from pruner_jax import checkpoint, sharding
from pruner_jax.metrics import Measures, summarize
from pruner_jax.objective import draw, objective
from pruner_jax.pi0 import Pi0
from pruner_spec.config import Pi0Config
from pruner_spec.optimization import AdamW
from pruner_spec.parameters import completed, initial_parameters, parameter_table
from pruner_spec.stats import PrunerRecord
from pruner_spec.training import (
    Batch,
    TrainingSettings,
    TrainState,
    check_divisible,
    master_dtype,
    trained_names,
)

_Arrays = dict[str, Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _State:
    """`TrainState` on the device; the average is of trained parameters alone."""

    trained: _Arrays
    frozen: _Arrays
    average: _Arrays | None
    first: _Arrays
    second: _Arrays


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Now:
    """What the host knows of a step."""

    step: Any
    learning_rate: Any
    noise_scale: Any


class Trainer:
    """A run's state, and its steps.

    Args:
        config: the model's; it computes in `config.dtype`.
        settings: the run's.
        weights: to begin with, anything that `checkpoint.load` takes; None for
            `initial_parameters` by the settings' seed.
        mesh: of `sharding.make_mesh`, to train over several devices.

    Raises:
        ValueError: nothing is to be trained; or as `checkpoint.load`.
    """

    def __init__(
        self,
        config: Pi0Config,
        settings: TrainingSettings,
        weights: str | os.PathLike[str] | Mapping[str, Any] | None = None,
        *,
        mesh: Mesh | None = None,
    ) -> None:
        self.config = config
        self.settings = dataclasses.replace(settings, freeze=tuple(settings.freeze))
        _outline(config)  # raises where JAX cannot compute in the config's dtype
        self._names = trained_names(config, settings)
        self._record = PrunerRecord()
        self._step = 0
        self._mesh = mesh
        parameters = self._arrays(_named(config, settings, weights))
        trained = {name: parameters.pop(name) for name in self._names}
        self._state = _State(
            trained=trained,
            frozen=parameters,
            average=None if settings.ema_decay is None else jax.tree.map(jnp.copy, trained),
            first=jax.tree.map(jnp.zeros_like, trained),
            second=jax.tree.map(jnp.zeros_like, trained),
        )

    @property
    def step_count(self) -> int:
        """How many steps were made; the next step's number."""
        return self._step

    def set_token_pruner_noise_scale(self, noise_scale: float | None) -> None:
        """Overrides the settings' noise schedule; None goes back to it."""
        self._record.set_noise_scale(noise_scale)

    def step(self, batch: Batch) -> dict[str, Float[Array, ""]]:
        """Makes a step, and gives its metrics; nobody waits for the device here.

        Args:
            batch: of NumPy or JAX arrays.

        Raises:
            ValueError: `accumulation` does not divide the batch, or an array does not fit.
        """
        batch = self._shared(batch)
        self._state, metrics = _step(
            self.config, self.settings, self._mesh, self._state, batch, self._now()
        )
        self._step += 1
        return metrics

    def evaluate(self, batch: Batch) -> dict[str, Float[Array, ""]]:
        """The metrics that the next step would have on a batch, without a step and its norms."""
        batch = self._shared(batch)
        return _evaluate(self.config, self.settings, self._state, batch, self._now())

    def state(self, *, everywhere: bool = True) -> TrainState | None:
        """All that is needed to go on, in this backend or the other; a copy.

        Args:
            everywhere: in all processes, which all must ask for it; or else in the first alone,
                and None in the others. Weights that no other device has a part of are then no
                copy, but read as they are taken, which has to be before the next step.
        """
        keeps = everywhere or self._mesh is None or jax.process_index() == 0
        state, average = self._state, self._state.average
        copies = everywhere or self._mesh is not None
        stack = checkpoint.stacked if copies else checkpoint.lazily_stacked

        def stacked(arrays: _Arrays) -> dict[str, Any]:
            return self._stacked(arrays, stack if keeps else None)

        given = TrainState(
            step=self._step,
            parameters=stacked(state.frozen | state.trained),
            average=None if average is None else stacked(state.frozen | average),
            first=stacked(state.first),
            second=stacked(state.second),
        )
        return given if keeps else None

    def restore(self, state: TrainState) -> None:
        """Goes on from a state, of this backend or the other.

        Raises:
            ValueError: it is not of a run with this model and these settings.
        """
        state.check(self.config, self.settings)
        del self._state  # before the other is there: there may be no room for both
        frozen = self._arrays(state.parameters.items())
        trained = {name: frozen.pop(name) for name in self._names}
        average = None
        if state.average is not None:
            average = self._arrays((name, state.average[name]) for name in self._names)
        self._state = _State(
            trained=trained,
            frozen=frozen,
            average=average,
            first=self._arrays(state.first.items()),
            second=self._arrays(state.second.items()),
        )
        self._step = state.step

    def _now(self) -> _Now:
        """Arrays of NumPy: JAX would compile a function anew for every other number."""
        dtype, override = master_dtype(self.config), self._record.noise_scale
        scale = self.settings.noise_scale(self._step) if override is None else override
        rate = self.settings.schedule.learning_rate(self._step)
        return _Now(np.array(self._step, np.uint32), np.array(rate, dtype), np.array(scale, dtype))

    def _shared(self, batch: Batch) -> Batch:
        devices = 1 if self._mesh is None else self._mesh.local_mesh.size
        check_divisible(batch, self.settings.accumulation, devices)
        return sharding.share(batch, self._mesh)

    def _arrays(self, named: Iterable[tuple[str, Any]]) -> _Arrays:
        """Arrays on the devices, copied and cast to the master's dtype."""
        dtype = master_dtype(self.config)
        return {name: sharding.place(np.asarray(array, dtype), self._mesh) for name, array in named}

    def _stacked(self, arrays: _Arrays, stack: Callable[..., Any] | None) -> dict[str, Any]:
        """Arrays by our names, in the order of the model's parameters.

        Args:
            arrays: by our names.
            stack: makes a family's array; None in a process that only gives its parts.
        """
        found = {}
        for name, parameter in parameter_table(self.config).items():
            if name in arrays:
                array = sharding.whole(arrays[name])
                if stack is not None:
                    found[name] = stack({name: array}, parameter)
        return found


def _named(
    config: Pi0Config, settings: TrainingSettings, weights: Any
) -> Iterator[tuple[str, np.ndarray]]:
    """The parameters that a run begins with."""
    if weights is None:
        return initial_parameters(config, settings.seed)
    given = checkpoint.read(
        weights, config, missing=settings.weight_missing, ignored=settings.weight_ignored
    )
    return completed(given, config, settings.seed)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=3)
def _step(
    config: Pi0Config,
    settings: TrainingSettings,
    mesh: Mesh | None,
    state: _State,
    batch: Batch,
    now: _Now,
) -> tuple[_State, dict[str, Float[Array, ""]]]:
    gradients, measures = _gradients(config, settings, state, batch, now)
    state = sharding.kept(_updated(settings, state, gradients, now), mesh)
    norms = {
        "grad_norm": optax.tree.norm(gradients),
        "param_norm": optax.tree.norm(state.trained),
    }
    return state, summarize(measures) | norms


@functools.partial(jax.jit, static_argnums=(0, 1))
def _evaluate(
    config: Pi0Config, settings: TrainingSettings, state: _State, batch: Batch, now: _Now
) -> dict[str, Float[Array, ""]]:
    def of_part(part: Batch) -> Measures:
        return _measures(config, settings, state.frozen | state.trained, part, now)

    return summarize(_joined(jax.lax.map(of_part, _parts(batch, settings.accumulation))))


def _gradients(
    config: Pi0Config, settings: TrainingSettings, state: _State, batch: Batch, now: _Now
) -> tuple[_Arrays, Measures]:
    """Of the mean loss with respect to what is trained, part by part."""

    @functools.partial(jax.grad, has_aux=True)
    def gradient(trained: _Arrays, part: Batch) -> tuple[Float[Array, ""], Measures]:
        measures = _measures(config, settings, state.frozen | trained, part, now)
        return measures.loss.mean(), measures

    def add(total: _Arrays, part: Batch) -> tuple[_Arrays, Measures]:
        found, measures = gradient(state.trained, part)
        return jax.tree.map(jnp.add, total, found), measures

    count = settings.accumulation
    if count == 1:
        return gradient(state.trained, batch)
    zeros = jax.tree.map(jnp.zeros_like, state.trained)
    total, measures = jax.lax.scan(add, zeros, _parts(batch, count))
    return jax.tree.map(lambda each: each / count, total), _joined(measures)


def _parts(batch: Batch, count: int) -> Batch:
    """The batch as [count, B / count, ...]; a device that holds some samples has some of each."""
    return jax.tree.map(
        lambda each: jnp.moveaxis(each.reshape(-1, count, *each.shape[1:]), 1, 0), batch
    )


def _joined(measures: Measures) -> Measures:
    """Measures of all parts as of one batch."""
    return jax.tree.map(lambda each: each.reshape(-1, *each.shape[2:]), measures)


def _updated(settings: TrainingSettings, state: _State, gradients: _Arrays, now: _Now) -> _State:
    """The state after a step of AdamW."""
    rule = _adamw(settings.optimizer)
    adam = optax.ScaleByAdamState(count=now.step.astype(jnp.int32), mu=state.first, nu=state.second)
    empty = optax.EmptyState()
    after: Any
    directions, after = rule.update(gradients, (empty, adam, empty), state.trained)
    trained = jax.tree.map(lambda p, d: p - now.learning_rate * d, state.trained, directions)
    average, decay = state.average, settings.ema_decay
    if average is not None and decay is not None:
        average = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, average, trained)
    return _State(trained, state.frozen, average, first=after[1].mu, second=after[1].nu)


def _adamw(optimizer: AdamW) -> optax.GradientTransformation:
    """All but the learning rate, which is another each step."""
    return optax.chain(
        optax.clip_by_global_norm(optimizer.clip_gradient_norm),
        optax.scale_by_adam(optimizer.b1, optimizer.b2, optimizer.eps),
        optax.add_decayed_weights(optimizer.weight_decay),
    )


@functools.cache
def _outline(config: Pi0Config) -> tuple[Any, Any, tuple[str, ...]]:
    """A model's graph, the structure of its parameters, and their names in its order."""
    graph, abstract = nnx.split(nnx.eval_shape(lambda: Pi0(config, seed=None)))
    leaves, structure = jax.tree.flatten(abstract)
    names = tuple(".".join(map(str, path)) for path, _ in nnx.to_flat_state(abstract))
    table = parameter_table(config)
    assert [leaf.shape for leaf in leaves] == [table[name].stacked_shape for name in names]
    return graph, structure, names


def _measures(
    config: Pi0Config, settings: TrainingSettings, parameters: _Arrays, batch: Batch, now: _Now
) -> Measures:
    """The loss of a batch in this step, and how it was pruned."""
    graph, structure, names = _outline(config)
    leaves = [parameters[name] for name in names]
    model = nnx.merge(graph, jax.tree.unflatten(structure, leaves))
    model.gradient_checkpointing = settings.gradient_checkpointing
    draws = draw(config, settings, now.step, now.noise_scale, batch.places)
    return objective(model, batch, draws)

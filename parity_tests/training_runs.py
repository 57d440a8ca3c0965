"""The training runs that the tests make and `docs/training-parity.md` tables, in either backend."""

import dataclasses
import functools

import numpy as np

from parity_tests.cases import PRUNING, TINY_ADAPTED, tiny_config
from parity_tests.harness import BACKENDS, DEVICE, parameters
from pruner_spec.config import CAMERAS, Pi0Config
from pruner_spec.optimization import AdamW, CosineDecaySchedule
from pruner_spec.training import Batch, TrainingSettings, TrainState, lora_freeze, master_dtype

SIZE = 4  # of a batch
PLACES = np.array([5, 0, 3, 1])  # of its samples in the global batch
SETTINGS = TrainingSettings(
    seed=7,
    num_train_steps=60,
    schedule=CosineDecaySchedule(warmup_steps=5, peak_lr=1e-3, decay_steps=60, decay_lr=1e-4),
)
PRUNED = tiny_config(vision_variant="tiny/56", **PRUNING["implicit"])
ADAPTED = tiny_config(
    vision_variant="tiny/56", pi05=False, **PRUNING["implicit, joint"], **TINY_ADAPTED
)


@dataclasses.dataclass(frozen=True)
class Run:
    """A model, the settings it is trained with, and how many steps are made."""

    config: Pi0Config
    settings: TrainingSettings
    steps: int


def varied(run: Run, steps: int, **changes: object) -> Run:
    """The run with other settings."""
    return Run(run.config, dataclasses.replace(run.settings, **changes), steps)


def computed_in(run: Run, dtype: str, **changes: object) -> Run:
    """The run in another dtype."""
    return dataclasses.replace(run, config=dataclasses.replace(run.config, dtype=dtype, **changes))


THE_RUN = Run(PRUNED, SETTINGS, steps=50)
RUNS = {
    "pruned": THE_RUN,
    # Adapters alone are trained in both experts; gradients are too small to be clipped.
    "adapted": varied(
        Run(ADAPTED, SETTINGS, 10),
        steps=10,
        freeze=lora_freeze(paligemma=True, action_expert=True),
        optimizer=AdamW(clip_gradient_norm=1e3, weight_decay=0.1),
        ema_decay=None,
        noise_schedule="constant",
    ),
    "accumulated": varied(THE_RUN, steps=10, accumulation=2),
    "checkpointed": varied(THE_RUN, steps=10, gradient_checkpointing="full"),
    "unpruned": computed_in(THE_RUN, "float64", token_pruning_enabled=False),
    "float32": computed_in(THE_RUN, "float32", token_pruning_enabled=False),
    "float32, pruned": computed_in(THE_RUN, "float32"),
    "bfloat16": dataclasses.replace(computed_in(THE_RUN, "bfloat16"), steps=15),
    "bfloat16, another seed": varied(computed_in(THE_RUN, "bfloat16"), steps=15, seed=8),
}


class Trained:
    """A backend's trainer: NumPy in, NumPy out."""

    def __init__(self, backend, run, weights=None):
        self.backend, self.dtype = backend, run.config.dtype
        device = {"device": DEVICE} if backend.name == "torch" else {}
        weights = parameters(run.config) if weights is None else weights
        with backend.precision(self.dtype):
            module = backend.module("training")
            self.trainer = module.Trainer(run.config, run.settings, weights, **device)

    def step(self, batch):
        with self.backend.precision(self.dtype):
            return {name: float(value) for name, value in self.trainer.step(batch).items()}

    def evaluate(self, batch):
        with self.backend.precision(self.dtype):
            return {name: float(value) for name, value in self.trainer.evaluate(batch).items()}

    def votes(self, batch):
        """How the patches vote in the next step, computed as the backend computes it."""
        with self.backend.precision(self.dtype):
            found = _scoring(self.backend.name)(self.trainer, batch)
        return Votes(*map(self.backend.numpy, found))

    def state(self):
        with self.backend.precision(self.dtype):
            return self.trainer.state()

    def restore(self, state):
        with self.backend.precision(self.dtype):
            self.trainer.restore(state)


def draw_batch(config, step):
    """The batch of a step, of images in large fields of colour."""
    generator = np.random.default_rng(step)
    wide = master_dtype(config)
    lengths = generator.integers(1, config.max_token_len, SIZE)
    mask = np.arange(config.max_token_len) < lengths[:, None]
    tokens = generator.integers(2, config.paligemma.vocab_size, mask.shape)
    fields = generator.integers(0, 256, (len(CAMERAS), SIZE, 8, 8, 3), dtype=np.uint8)
    images = fields.repeat(28, axis=2).repeat(28, axis=3)
    present = np.array([[True] * SIZE, [True] * SIZE, [True, False, True, False]])
    chunk = (SIZE, config.action_horizon, config.action_dim)
    return Batch(
        images=dict(zip(CAMERAS, images, strict=True)),
        image_masks=dict(zip(CAMERAS, present, strict=True)),
        state=generator.uniform(-1, 1, (SIZE, config.action_dim)).astype(wide),
        tokenized_prompt=np.where(mask, tokens, 0).astype(np.int32),
        tokenized_prompt_mask=mask,
        actions=generator.standard_normal(chunk).astype(wide),
        places=PLACES,
    )


@dataclasses.dataclass(frozen=True)
class Votes:
    """By which scores the patches of a step vote.

    Attributes:
        scores: [P, N, N] of all pools, with the step's noise.
        valid: bool [P, N].
    """

    scores: np.ndarray
    valid: np.ndarray

    def choices(self) -> np.ndarray:
        """The patch that each votes for, [P, N]; -1 where there is no patch."""
        eligible = np.where(self.valid[:, None, :], self.scores, -np.inf)
        return np.where(self.valid, eligible.argmax(axis=-1), -1)

    def kept(self) -> np.ndarray:
        """How many different patches a sample's pools keep, [B]."""
        choices = self.choices().reshape(SIZE, len(self.valid) // SIZE, -1)
        return np.array([sum(len(set(p[p >= 0])) for p in pools) for pools in choices])


@functools.cache
def _scoring(backend_name):
    """A function of a trainer and its next batch: the scores, and which patches are valid."""
    backend = BACKENDS[backend_name]
    objective, pruner = backend.module("objective"), backend.module("pruner")

    def scored(model, batch, draws):
        seen = objective.observe(batch, draws.augmentation, draws.noise.dtype)
        patches, task, task_mask, valid = model.pools(model.encode(model.prepare(seen)))
        scores = pruner.importance_score(patches, task, task_mask)
        return scores + draws.pruner_noise.reshape(scores.shape), valid

    if backend_name == "torch":
        import torch

        def by_torch(trainer, batch):
            (part,) = trainer._parts(batch)
            draws = objective.draw(
                trainer.config, trainer.settings, trainer.step_count, trainer._noise_scale(),
                part.places,
            )  # fmt: skip
            with torch.no_grad():
                return scored(trainer._model, part, draws)

        return by_torch

    import jax
    from flax import nnx

    training = backend.module("training")

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def compiled(config, settings, parameters, batch, now):
        graph, structure, names = training._outline(config)
        leaves = [parameters[name] for name in names]
        model = nnx.merge(graph, jax.tree.unflatten(structure, leaves))
        draws = objective.draw(config, settings, now.step, now.noise_scale, batch.places)
        return scored(model, batch, draws)

    def by_jax(trainer, batch):
        parameters = trainer._state.frozen | trainer._state.trained
        return compiled(trainer.config, trainer.settings, parameters, batch, trainer._now())

    return by_jax


@dataclasses.dataclass(frozen=True)
class Course:
    """What came of a run: every step's metrics and votes, and the state after 10 steps and at last.

    Of votes there are none unless they are asked for.
    """

    metrics: list[dict[str, float]]
    votes: list[Votes]
    after_10: TrainState | None
    final: TrainState

    def losses(self) -> np.ndarray:
        return np.array([each["loss"] for each in self.metrics])


@functools.cache
def course(backend_name, run_name, steps=None, votes=False):
    """Trains a run in a backend, once for all tests.

    Args:
        backend_name: of `BACKENDS`.
        run_name: of `RUNS`.
        steps: in the place of the run's.
        votes: looks at what every step selects.
    """
    run = RUNS[run_name]
    trained = Trained(BACKENDS[backend_name], run)
    metrics, seen, after_10 = [], [], None
    for step in range(run.steps if steps is None else steps):
        batch = draw_batch(run.config, step)
        if votes:
            seen.append(trained.votes(batch))
        metrics.append(trained.step(batch))
        if step == 9:
            after_10 = trained.state()
    return Course(metrics, seen, after_10, trained.state())


@dataclasses.dataclass(frozen=True)
class Flip:
    """A step in which patches vote otherwise in the one backend than in the other.

    Attributes:
        step: its number.
        count: how many patches do, of `of`.
        gap: by how much the two choices' scores differ, where they are nearer to a tie; the widest
            of the step.
        apart: the largest difference between the backends' scores in that step.
    """

    step: int
    count: int
    of: int
    gap: float
    apart: float


def flips(found: Course, expected: Course) -> list[Flip]:
    """The steps in which two runs' votes differ."""
    steps = []
    for step, (ours, theirs) in enumerate(zip(found.votes, expected.votes, strict=True)):
        np.testing.assert_array_equal(ours.valid, theirs.valid)
        chosen, other = ours.choices(), theirs.choices()
        if (flipped := np.argwhere(chosen != other)).size:
            gaps = [
                min(abs(each.scores[p, n, chosen[p, n]] - each.scores[p, n, other[p, n]])
                    for each in (ours, theirs))
                for p, n in flipped
            ]  # fmt: skip
            apart = np.abs(ours.scores - theirs.scores)[ours.valid].max()
            count = int(ours.valid.sum())
            steps.append(Flip(step, len(flipped), count, float(max(gaps)), float(apart)))
    return steps


def until_flip(found: list[Flip], steps: int) -> int:
    """How many steps were made before the first flip."""
    return found[0].step if found else steps

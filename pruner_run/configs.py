"""Training configs by name: what a run is, with openpi's names for what openpi has."""

import dataclasses
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import tyro

from pruner_run.assets import DEMO_EPISODE, DEMO_TOKENIZER
from pruner_run.data.config import DataConfig
from pruner_spec.config import GemmaVariant, Pi0Config, VisionVariant
from pruner_spec.openpi_configs import OPENPI_CONFIGS
from pruner_spec.optimization import AdamW, CosineDecaySchedule
from pruner_spec.training import (
    ADAPTERS,
    GradientCheckpointing,
    NoiseSchedule,
    TrainingSettings,
    lora_freeze,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run.

    Attributes:
        name: of the config.
        exp_name: of the run; its folder is <checkpoint_base_dir>/<name>/<exp_name>.
        backend: the framework; the run is the same in either.
        model: the model. Its dtype is that of the computation; weights are trained in float32.
        data: the dataset and what becomes of it.
        weight_path: a checkpoint to start from, openpi's JAX one, a PyTorch folder or one of ours;
            random weights if not given.
        pytorch_weight_path: the same, for the backend torch alone, as openpi has it.
        weight_missing: regular expressions over our names; such parameters start at random where
            the checkpoint has none. Adapters, so that LoRA starts from a base model.
        weight_ignored: the same; such parameters start at random whatever the checkpoint has.
        tokenizer_path: PaliGemma's SentencePiece model.
        seed: of everything random.
        batch_size: samples a step, on all devices together.
        num_train_steps: of the run.
        lr_schedule: of the learning rate.
        optimizer: AdamW's settings and the clipping.
        ema_decay: of the average of the weights, which is what a checkpoint is used with.
        freeze: regular expressions; parameters in whose names one is found are not trained. An
            expert with adapters trains them alone whatever is here.
        augment: augments images as openpi does.
        accumulation: parts of a batch that are computed one after the other.
        gradient_checkpointing: what is computed again in the backward pass, to save memory: none,
            all but the results of products and attention, or full layers.
        pytorch_compile: compiles layers in the backend torch; on a GPU, if not given.
        token_prune_noise_schedule: of the noise on the pruner's scores: linear from 1 to 0,
            constant 1, or none. It takes the place of the model's token_prune_noise_scale.
        num_workers: that prepare batches.
        log_interval: steps between lines on the screen.
        save_interval: steps between checkpoints.
        keep_period: checkpoints of steps divisible by it are kept; of others the last alone.
        checkpoint_base_dir: for checkpoints.
        assets_base_dir: for normalisation statistics.
        fsdp_devices: over how many devices weights are split.
        tensorboard_enabled: writes TensorBoard's files beside metrics.jsonl.
        wandb_enabled: sends metrics to Weights & Biases.
        project_name: Weights & Biases' project.
        policy_metadata: what a policy server tells its clients, such as ALOHA's pose to start from.
        resume: goes on with the run's last checkpoint.
        overwrite: deletes what the run has, and starts again.
    """

    name: tyro.conf.Suppress[str]
    exp_name: str = tyro.MISSING
    backend: Literal["jax", "torch"] = "jax"
    model: tyro.conf.FlagConversionOff[Pi0Config] = Pi0Config()  # noqa: RUF009  # frozen
    data: tyro.conf.FlagConversionOff[DataConfig] = dataclasses.field(default_factory=DataConfig)
    weight_path: str | None = None
    pytorch_weight_path: str | None = None
    weight_missing: tuple[str, ...] = (ADAPTERS,)
    weight_ignored: tuple[str, ...] = ()
    tokenizer_path: Path | None = None
    seed: int = 42
    batch_size: int = 32
    num_train_steps: int = 30_000
    lr_schedule: CosineDecaySchedule = dataclasses.field(default_factory=CosineDecaySchedule)
    optimizer: AdamW = dataclasses.field(default_factory=AdamW)
    ema_decay: float | None = 0.99
    freeze: tuple[str, ...] = ()
    augment: tyro.conf.FlagConversionOff[bool] = True
    accumulation: int = 1
    gradient_checkpointing: GradientCheckpointing = "none"
    pytorch_compile: bool | None = None
    token_prune_noise_schedule: NoiseSchedule = "linear"
    num_workers: int = 2
    log_interval: int = 100
    save_interval: int = 1000
    keep_period: int | None = 5000
    checkpoint_base_dir: Path = Path("checkpoints")
    assets_base_dir: Path = Path("assets")
    fsdp_devices: int = 1
    tensorboard_enabled: bool = False
    wandb_enabled: bool = False
    project_name: str = "pi05-pruner"
    policy_metadata: tyro.conf.Suppress[Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    resume: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        counts = ("batch_size", "num_train_steps", "accumulation", "log_interval", "save_interval")
        for field in (*counts, "keep_period"):
            count = getattr(self, field)
            if count is not None and count < 1:
                raise ValueError(f"{field}: expected at least 1, got {count}")
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"batch_size: expected a multiple of accumulation={self.accumulation}, got "
                f"{self.batch_size}"
            )

    @property
    def run_dir(self) -> Path:
        """The run's folder."""
        return self.checkpoint_base_dir / self.name / self.exp_name

    @property
    def assets_dirs(self) -> Path:
        """Where the config's normalisation statistics are."""
        return self.assets_base_dir / self.name

    @property
    def settings(self) -> TrainingSettings:
        """What a backend needs to know.

        Raises:
            ValueError: a setting is not valid.
        """
        if scale := self.model.token_prune_noise_scale:
            raise ValueError(
                "token_prune_noise_scale: expected 0 in training, where "
                f"--token_prune_noise_schedule takes its place; got {scale}"
            )
        adapted = [
            variant.lora is not None for variant in (self.model.paligemma, self.model.action_expert)
        ]
        return TrainingSettings(
            seed=self.seed,
            num_train_steps=self.num_train_steps,
            optimizer=self.optimizer,
            schedule=self.lr_schedule,
            ema_decay=self.ema_decay,
            freeze=(*self.freeze, *lora_freeze(*adapted)),
            weight_missing=self.weight_missing,
            weight_ignored=self.weight_ignored,
            augment=self.augment,
            accumulation=self.accumulation,
            gradient_checkpointing=self.gradient_checkpointing,
            noise_schedule=self.token_prune_noise_schedule,
        )

    @property
    def weights(self) -> str | None:
        """The checkpoint to start from."""
        if self.backend == "torch" and self.pytorch_weight_path is not None:
            return self.pytorch_weight_path
        return self.weight_path


def _debug(name: str, backend: Literal["jax", "torch"] = "jax") -> TrainConfig:
    """openpi's smallest model on generated data; the vision tower has its full size."""
    return TrainConfig(
        name=name,
        exp_name=name,
        backend=backend,
        model=OPENPI_CONFIGS[name],
        data=DataConfig(fake=True),
        tokenizer_path=DEMO_TOKENIZER,
        batch_size=2,
        num_train_steps=10,
        lr_schedule=CosineDecaySchedule(warmup_steps=2, decay_steps=10),
        log_interval=1,
        save_interval=100,
    )


# openpi's LIBERO schedule: warm-up, then as good as constant.
_LIBERO: dict[str, Any] = {
    "data": DataConfig(
        repo_id="physical-intelligence/libero", robot="libero", prompt_from_task=True
    ),
    "lr_schedule": CosineDecaySchedule(
        warmup_steps=10_000, peak_lr=5e-5, decay_steps=1_000_000, decay_lr=5e-5
    ),
    "ema_decay": 0.999,
    "num_train_steps": 30_000,
}

_ALOHA_KEYS = {
    "images/cam_high": "observation.images.cam_high",
    "images/cam_left_wrist": "observation.images.cam_left_wrist",
    "images/cam_right_wrist": "observation.images.cam_right_wrist",
    "state": "observation.state",
    "actions": "action",
}

_PICK_PLACE: dict[str, Any] = {
    "data": DataConfig(
        repo_id="pick_place",
        robot="aloha",
        repack=_ALOHA_KEYS,
        default_prompt="pick up the object and place it in the container",
    ),
    "backend": "torch",
    "batch_size": 32,
    "num_train_steps": 20_000,
}

# Small enough for two cores, with images of the full size.
_TINY: dict[str, Any] = {
    "model": Pi0Config(
        dtype="float32",
        paligemma_variant="tiny",
        action_expert_variant="tiny_expert",
        vision_variant="tiny/14",
        action_horizon=10,
        max_token_len=96,
        pi05=True,
        token_pruning_enabled=True,
    ),
    "tokenizer_path": DEMO_TOKENIZER,
    "batch_size": 8,
    "num_train_steps": 100,
    "lr_schedule": CosineDecaySchedule(
        warmup_steps=10, peak_lr=1e-3, decay_steps=100, decay_lr=1e-4
    ),
    "log_interval": 10,
    "save_interval": 50,
}


def _pruned(model: Pi0Config) -> Pi0Config:
    return dataclasses.replace(model, token_pruning_enabled=True)


_CONFIGS = (
    _debug("debug"),
    _debug("debug_pi05"),
    TrainConfig(
        name="pi05_aloha",
        model=OPENPI_CONFIGS["pi05_aloha"],
        data=DataConfig(robot="aloha", asset_id="trossen", repack=_ALOHA_KEYS),
        policy_metadata={"reset_pose": [0, -1.5, 1.5, 0, 0, 0]},
    ),
    TrainConfig(
        name="pi05_droid",
        model=OPENPI_CONFIGS["pi05_droid"],
        data=DataConfig(robot="droid", asset_id="droid", prompt_from_task=True),
    ),
    TrainConfig(name="pi05_libero", model=OPENPI_CONFIGS["pi05_libero"], batch_size=256, **_LIBERO),
    TrainConfig(
        name="pi05_libero_pytorch",
        model=OPENPI_CONFIGS["pi05_libero"],
        backend="torch",
        batch_size=64,
        **_LIBERO,
    ),
    TrainConfig(
        name="pi05_libero_pytorch_lightvla",
        model=_pruned(OPENPI_CONFIGS["pi05_libero"]),
        backend="torch",
        batch_size=64,
        **_LIBERO,
    ),
    TrainConfig(name="pi05_pick_place_pytorch", model=Pi0Config(pi05=True), **_PICK_PLACE),
    TrainConfig(
        name="pi05_pick_place_pytorch_pruning", model=_pruned(Pi0Config(pi05=True)), **_PICK_PLACE
    ),
    TrainConfig(
        name="pi0_libero_low_mem_finetune",
        model=OPENPI_CONFIGS["pi0_libero_low_mem_finetune"],
        data=DataConfig(
            repo_id="physical-intelligence/libero",
            robot="libero",
            prompt_from_task=True,
            extra_delta_transform=True,
        ),
        ema_decay=None,
    ),
    TrainConfig(
        name="pi05_transfer_cube_tiny",
        exp_name="transfer_cube",
        data=DataConfig(repo_id=str(DEMO_EPISODE), prompt_from_task=True),
        **_TINY,
    ),
    TrainConfig(
        name="pi05_metaworld_tiny",
        data=DataConfig(
            repack={
                "image/base_0_rgb": "observation.images.base_0_rgb",
                "image/left_wrist_0_rgb": "observation.images.left_wrist_0_rgb",
                "state": "observation.state",
                "actions": "action",
            },
            prompt_from_task=True,
        ),
        **_TINY,
    ),
)

CONFIGS: Mapping[str, TrainConfig] = {config.name: config for config in _CONFIGS}


def get(name: str) -> TrainConfig:
    """A config by name.

    Raises:
        ValueError: there is none; names the nearest ones.
    """
    if name in CONFIGS:
        return CONFIGS[name]
    nearest = difflib.get_close_matches(name, CONFIGS, n=3, cutoff=0.4)
    known = f"; did you mean {' or '.join(nearest)}?" if nearest else ""
    raise ValueError(f"config: expected one of {', '.join(CONFIGS)}; got {name!r}{known}")


def parse(arguments: list[str], prog: str) -> TrainConfig:
    """A config by name, with what the command line changes of it.

    Raises:
        ValueError: there is no such config.
        SystemExit: an option cannot be read.
    """
    if arguments and not arguments[0].startswith("-"):
        get(arguments[0])
    with _registry():
        return tyro.extras.overridable_config_cli(
            {name: (_summary(config), config) for name, config in CONFIGS.items()},
            args=arguments,
            prog=prog,
            config=(tyro.conf.AvoidSubcommands,),
            use_underscores=True,
        )


def _summary(config: TrainConfig) -> str:
    model = "π0.5" if config.model.pi05 else "π0"
    pruned = ", pruned" if config.model.token_pruning_enabled else ""
    adapted = ", LoRA" if config.model.has_lora else ""
    data = "generated data" if config.data.fake else config.data.repo_id or "--data.repo_id"
    return f"{model}{pruned}{adapted}, {data}, batch {config.batch_size}, {config.backend}"


def _registry() -> Any:
    """Variants are chosen by name; sizes of one's own are for configs written in Python."""
    registry = tyro.constructors.ConstructorRegistry()

    @registry.primitive_rule
    def variant(info: Any) -> Any:
        if info.type not in (str | GemmaVariant, str | VisionVariant):
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar="VARIANT",
            instance_from_str=lambda given: given[0],
            is_instance=lambda value: isinstance(value, str | GemmaVariant | VisionVariant),
            str_from_instance=lambda value: [str(value)],
        )

    return registry

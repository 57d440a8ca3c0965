"""`pruner plan CONFIG`: on paper, what a run needs on each device, and how fast it can be at best.

Counted, not measured: what has to be in memory, and the products that have to be computed. A real
run needs some more of both; benchmarks/train_speed.py measures one.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import get_args

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from pruner_run import configs, roofline
from pruner_run.configs import TrainConfig
from pruner_spec.config import CAMERAS, Pi0Config
from pruner_spec.parameters import parameter_table
from pruner_spec.training import GradientCheckpointing

_GIB = 2**30
_MASTER = 4  # bytes of a float32
_KEPT: Mapping[GradientCheckpointing, str] = {
    "none": "activations, all kept",
    "products": "activations, products kept",
    "full": "activations, layers computed again",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Say on paper what fits: memory on a device, and the floor of a step's time.

    Attributes:
        config_name: a training config, of those that `pruner configs` lists.
        devices: how many there are.
        memory: GB of each.
        fsdp_devices: over how many of them weights are split; all, if not given.
        batch_size: samples a step on all devices; the config's, if not given.
        teraflops: bfloat16 products a second that a device reaches: 794 was measured on an H200.
    """

    config_name: tyro.conf.Positional[str]
    devices: int = 1
    memory: float = 80.0
    fsdp_devices: int | None = None
    batch_size: int | None = None
    teraflops: float = 794.0


@dataclasses.dataclass(frozen=True)
class Plan:
    """Of one device, in bytes; times in seconds.

    Attributes:
        parameters, gradients, moments, average: shares of what is split over `fsdp_devices`.
        activations: kept for the backward pass, by what is computed again.
        floor: the products of a step, once.
        recomputed: the same, where layers are computed again.
    """

    parameters: float
    gradients: float
    moments: float
    average: float
    activations: Mapping[GradientCheckpointing, float]
    floor: float
    recomputed: float

    @property
    def state(self) -> float:
        """What is there whatever the batch."""
        return self.parameters + self.gradients + self.moments + self.average


def run(options: Options) -> None:
    """Prints the plan.

    Raises:
        ValueError: there is no such config, or devices and batch do not go together.
    """
    config = configs.get(options.config_name)
    found = plan(config, options)
    console = Console(highlight=False)
    console.print(_table(found, config, options))
    console.print(verdict(found, options.memory * 1e9))


def plan(config: TrainConfig, options: Options) -> Plan:
    """What a config needs.

    Raises:
        ValueError: devices and batch do not go together.
    """
    batch = config.batch_size if options.batch_size is None else options.batch_size
    split = options.devices if options.fsdp_devices is None else options.fsdp_devices
    if options.devices % split:
        raise ValueError(f"fsdp_devices: expected a divisor of {options.devices}, got {split}")
    if batch % options.devices:
        raise ValueError(f"batch_size: expected a multiple of {options.devices}, got {batch}")
    samples = batch // options.devices / config.accumulation
    numbers, trained = _count(config)
    width = 2 if config.model.dtype == "bfloat16" else _MASTER
    work = 3 * forward_flops(config.model) * batch / options.devices / (options.teraflops * 1e12)
    return Plan(
        parameters=numbers * _MASTER / split,
        gradients=trained * _MASTER / split,
        moments=2 * trained * _MASTER / split,
        average=0 if config.ema_decay is None else trained * _MASTER / split,
        activations={
            policy: numbers * samples * width
            for policy, numbers in _activations(config.model).items()
        },
        floor=work,
        recomputed=work * 4 / 3,
    )


def forward_flops(model: Pi0Config) -> float:
    """Operations of the products in one sample's forward pass, its prompt in full length."""
    prefix = len(CAMERAS) * model.vision.num_patches + model.max_token_len
    suffix, depth = model.suffix_length, model.paligemma.depth
    return (
        roofline.vision_operations(model, len(CAMERAS))
        + roofline.expert_operations(model.paligemma, prefix, prefix, depth)
        + roofline.expert_operations(model.action_expert, suffix, prefix + suffix, depth)
    )


def verdict(found: Plan, memory: float) -> str:
    """What fits, in words."""
    for policy in get_args(GradientCheckpointing):  # from the fastest to the smallest
        if found.state + found.activations[policy] <= memory:
            return f"Fits with --gradient_checkpointing {policy}."
    parts = math.ceil(found.activations["full"] / max(memory - found.state, 1))
    if found.state < memory:
        return f"Does not fit; with --gradient_checkpointing full --accumulation {parts} it does."
    return "Does not fit: the state alone is larger. More --fsdp_devices, or adapters (LoRA)."


def _count(config: TrainConfig) -> tuple[int, int]:
    """Numbers in all parameters, and in those that are trained."""
    sizes = {
        name: math.prod(parameter.stacked_shape)
        for name, parameter in parameter_table(config.model).items()
    }
    settings = config.settings
    trained = sum(size for name, size in sizes.items() if settings.is_trained(name))
    return sum(sizes.values()), trained


def _activations(model: Pi0Config) -> dict[GradientCheckpointing, float]:
    """Numbers kept for a sample's backward pass; with layers computed again, one of them at a
    time is there in full."""
    patches = len(CAMERAS) * model.vision.num_patches
    prefix, suffix = patches + model.max_token_len, model.suffix_length
    tower, largest = model.vision, 0.0
    found: dict[GradientCheckpointing, float] = {"none": 0.0, "products": 0.0, "full": 0.0}
    # Depth, tokens, and a token's numbers in a layer: its input, its products' results, all.
    layers = [
        (
            tower.depth,
            patches,
            tower.width,
            6 * tower.width + tower.mlp_dim,
            8 * tower.width + 2 * tower.mlp_dim,
        )
    ]
    for expert, tokens in ((model.paligemma, prefix), (model.action_expert, suffix)):
        heads = 2 * (expert.num_heads + expert.num_kv_heads) * expert.head_dim
        products = 2 * expert.width + heads + 2 * expert.mlp_dim
        everything = 4 * expert.width + heads + 3 * expert.mlp_dim
        layers.append((expert.depth, tokens, expert.width, products, everything))
    for depth, tokens, width, products, everything in layers:
        found["none"] += depth * tokens * everything
        found["products"] += depth * tokens * (width + products)
        found["full"] += depth * tokens * width
        largest = max(largest, tokens * everything)
    found["products"] += largest
    found["full"] += largest
    return found


def _table(found: Plan, config: TrainConfig, options: Options) -> Table:
    title = f"{config.name} on {options.devices} x {options.memory:g} GB"
    table = Table(title=title, box=box.SIMPLE_HEAD, show_header=False)
    table.add_column("")
    table.add_column("", justify="right")
    for name, size in (
        ("parameters (float32)", found.parameters),
        ("gradients", found.gradients),
        ("Adam's moments", found.moments),
        ("average", found.average),
        *((_KEPT[policy], size) for policy, size in found.activations.items()),
    ):
        table.add_row(name, f"{size / _GIB:.1f} GiB")
    table.add_row("floor of a step", f"{found.floor:.3f} s")
    table.add_row("the same, layers computed again", f"{found.recomputed:.3f} s")
    return table

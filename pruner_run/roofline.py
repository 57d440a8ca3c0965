"""The floor of a call: what has to be computed and read, at the machine's measured ceilings.

Counted as `docs/speed.md` says: the products' operations, and the bytes of weights (once a phase,
once a step of denoising) and of cached keys and values. Activations, norms, embeddings and the
pruner are free. A call computes no more than it must: no padding, keys and values alone in the last
layer of the prefix, and the adaptive norms' modulation tabulated for the fixed times.
"""

import dataclasses

from pruner_spec.config import CAMERAS, GemmaVariant, Pi0Config

PHASES = ("vision", "prefix", "denoising")


@dataclasses.dataclass(frozen=True)
class Work:
    """What a phase has to do at least.

    Attributes:
        operations: multiplications and additions of its products.
        bytes: that it has to read.
    """

    operations: float
    bytes: float


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """What the device was measured to reach.

    Attributes:
        bandwidth: bytes a second of a copy, read and written.
        rate: operations a second of a large product.
    """

    bandwidth: float
    rate: float

    def milliseconds(self, work: Work) -> float:
        """The longer of computing and reading."""
        return 1e3 * max(work.operations / self.rate, work.bytes / self.bandwidth)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Load:
    """One call's sizes.

    Attributes:
        kept: patches a sample in the prefix, of all cameras; a mean may be a fraction.
        prompt: its tokens.
        cameras: that are encoded.
        batch: samples.
        num_steps: of denoising.
        width: bytes of a number.
    """

    kept: float
    prompt: float
    cameras: int = len(CAMERAS)
    batch: int = 1
    num_steps: int = 10
    width: int = 2

    @property
    def prefix(self) -> float:
        """Tokens of the prefix, a sample."""
        return self.kept + self.prompt


def work(config: Pi0Config, load: Load) -> dict[str, Work]:
    """What a call has to do, by phase."""
    return {
        "vision": _vision(config, load),
        "prefix": _prefix(config.paligemma, load),
        "denoising": _denoising(config, load),
    }


def floor(phases: dict[str, Work], ceilings: Ceilings) -> dict[str, float]:
    """Milliseconds of each phase at least, and "total"."""
    each = {name: ceilings.milliseconds(phase) for name, phase in phases.items()}
    return each | {"total": sum(each.values())}


def vision_operations(config: Pi0Config, cameras: int) -> float:
    """Operations of the tower over one sample's cameras, with its projection to the prefix."""
    tower = config.vision
    attention = 2 * tower.num_patches * tower.width  # a token's logits and values
    token = tower.depth * attention + _vision_weights(config)
    return 2.0 * cameras * tower.num_patches * token


def expert_operations(expert: GemmaVariant, tokens: float, seen: float, layers: int) -> float:
    """Operations of some layers of an expert.

    Args:
        expert: whose.
        tokens: that it computes.
        seen: tokens that each of them attends to.
        layers: how many.
    """
    attention = 2 * seen * expert.num_heads * expert.head_dim
    return 2.0 * tokens * layers * (layer_weights(expert) + attention)


def layer_weights(expert: GemmaVariant) -> int:
    """Numbers in the kernels of an expert's layer."""
    projections = 2 * expert.num_heads + 2 * expert.num_kv_heads
    return expert.width * (projections * expert.head_dim + 3 * expert.mlp_dim)


def _vision(config: Pi0Config, load: Load) -> Work:
    operations = load.batch * vision_operations(config, load.cameras)
    return Work(operations, float(load.width * _vision_weights(config)))


def _prefix(expert: GemmaVariant, load: Load) -> Work:
    """All layers but the last, of which the suffix needs keys and values alone."""
    last = 2 * expert.width * expert.num_kv_heads * expert.head_dim
    operations = expert_operations(expert, load.prefix, load.prefix, expert.depth - 1)
    operations += 2 * load.prefix * last
    weights = (expert.depth - 1) * layer_weights(expert) + last
    return Work(load.batch * operations, float(load.width * weights))


def _denoising(config: Pi0Config, load: Load) -> Work:
    expert, tokens = config.action_expert, config.suffix_length
    seen = load.prefix + tokens
    operations = expert_operations(expert, tokens, seen, expert.depth)
    cache = 2 * expert.depth * load.batch * load.prefix * expert.num_kv_heads * expert.head_dim
    numbers = expert.depth * layer_weights(expert) + cache
    return Work(load.num_steps * load.batch * operations, load.num_steps * load.width * numbers)


def _vision_weights(config: Pi0Config) -> int:
    """Numbers in the kernels of the tower, of the patches' embedding and of the projection."""
    tower = config.vision
    block = 4 * tower.width**2 + 2 * tower.width * tower.mlp_dim
    around = 3 * tower.patch_size**2 + config.paligemma.width
    return tower.depth * block + around * tower.width

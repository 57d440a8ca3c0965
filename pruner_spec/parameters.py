"""The model's parameters: one set of names, shapes and dtypes for both backends.

Names are the attribute paths of the modules, joined by dots. Layers are stacked on the first axis
in JAX, where the name stands for all of them; PyTorch has one module a layer, and the layer's
number stands in the name, after the `{layer}` mark of `Parameter.torch_name`. Nothing else differs:
kernels are [in, out] in both.
"""

import dataclasses
import hashlib
import logging
import math
from collections.abc import Collection, Iterable, Iterator

import numpy as np

from pruner_spec import lora
from pruner_spec.config import GemmaVariant, Pi0Config

logger = logging.getLogger(__name__)

# Kept in float32 in a bfloat16 model, as openpi does: projections of actions, time and state, all
# norms of Gemma with the adaptive norms' linear maps, the patch embedding, position embedding.
_FLOAT32_PREFIXES = (
    "action_in_proj",
    "action_out_proj",
    "time_mlp_in",
    "time_mlp_out",
    "state_proj",
    "action_time_mlp_in",
    "action_time_mlp_out",
    "vision.patch_embedding",
    "vision.position_embedding",
)


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One parameter family.

    Attributes:
        name: dotted path, without the layer.
        shape: of one layer's array.
        layers: how many of them there are; None where the parameter stands alone.
    """

    name: str
    shape: tuple[int, ...]
    layers: int | None = None

    @property
    def stacked_shape(self) -> tuple[int, ...]:
        """The shape in JAX, with the layer axis first."""
        return self.shape if self.layers is None else (self.layers, *self.shape)

    @property
    def torch_name(self) -> str:
        """The name in PyTorch, with `{layer}` where the layer's number goes."""
        for stack in ("layers", "blocks"):
            name = self.name.replace(f".{stack}.", f".{stack}.{{layer}}.")
            if name != self.name:
                return name
        return self.name

    @property
    def torch_names(self) -> tuple[str, ...]:
        """The name of every layer's array in PyTorch."""
        return tuple(self.torch_name.format(layer=layer) for layer in range(self.layers or 1))


def parameter_table(config: Pi0Config) -> dict[str, Parameter]:
    """Every parameter of a model by name, in the order in which the modules hold them."""
    parameters = [*_vision(config), *_gemma(config), *_heads(config)]
    return {parameter.name: parameter for parameter in parameters}


def parameter_dtype(name: str, dtype: str) -> str:
    """The dtype in which a model of `dtype` stores the parameter `name` (the family's name)."""
    is_gemma_norm = name.startswith("gemma.") and "norm" in name
    if dtype == "bfloat16" and (name.startswith(_FLOAT32_PREFIXES) or is_gemma_norm):
        return "float32"
    return dtype


def initial_parameters(
    config: Pi0Config, seed: int, *, without: Collection[str] = ()
) -> Iterator[tuple[str, np.ndarray]]:
    """Weights to train from scratch: pairs of name and float32 array [layers, ...].

    Kernels are normal with variance 1/fan-in, biases 0, norms the identity; the adaptive norms
    start at 0, as in openpi, so that the action expert starts as the identity too. Both factors of
    an adapter are normal with deviation 0.01, as in openpi.

    Args:
        config: the model's.
        seed: of the numbers; those of a parameter depend on it and the name alone.
        without: names of parameters that are left out.
    """
    for parameter in parameter_table(config).values():
        if parameter.name not in without:
            yield parameter.name, _draw(parameter, seed, _initial_scale(parameter.name))


def completed(
    named: Iterable[tuple[str, np.ndarray]], config: Pi0Config, seed: int
) -> Iterator[tuple[str, np.ndarray]]:
    """Some of a model's parameters, and then the others as `initial_parameters` has them."""
    given = set()
    for name, array in named:
        given.add(name)
        yield name, array
    if absent := [name for name in parameter_table(config) if name not in given]:
        logger.info(
            "%d parameters start at random, not from the checkpoint: %s",
            len(absent),
            ", ".join([*absent[:2], "..."] if len(absent) > 2 else absent),
        )
        yield from initial_parameters(config, seed, without=given)


def random_parameters(config: Pi0Config, seed: int) -> Iterator[tuple[str, np.ndarray]]:
    """Weights for tests and demonstrations, in which no array is constant.

    With `initial_parameters` the actions of an untrained model do not depend on its prefix; with
    these every parameter shows in every output.
    """
    for parameter in parameter_table(config).values():
        yield parameter.name, _draw(parameter, seed, _random_scale(parameter.name))


def random_scale(parameter: Parameter) -> tuple[float, float]:
    """Mean and standard deviation of `random_parameters`, for who draws them on a device."""
    scale = _random_scale(parameter.name)
    return scale.mean, _deviation(parameter, scale)


def _vision(config: Pi0Config) -> Iterator[Parameter]:
    variant, layers = config.vision, config.vision.depth
    width = variant.width
    yield from _linear("vision.patch_embedding", variant.patch_size**2 * 3, width)
    yield Parameter("vision.position_embedding", (variant.num_patches, width))
    block = "vision.blocks"
    yield from _layer_norm(f"{block}.attention_norm", width, layers)
    for projection in ("query", "key", "value", "out"):
        yield from _linear(f"{block}.attention.{projection}", width, width, layers)
    yield from _layer_norm(f"{block}.mlp_norm", width, layers)
    yield from _linear(f"{block}.mlp.up", width, variant.mlp_dim, layers)
    yield from _linear(f"{block}.mlp.down", variant.mlp_dim, width, layers)
    yield from _layer_norm("vision.final_norm", width)
    yield from _linear("vision.head", width, config.paligemma.width)


def _gemma(config: Pi0Config) -> Iterator[Parameter]:
    table = (config.paligemma.vocab_size, config.paligemma.width)
    yield Parameter("gemma.embedder.embedding", table)
    yield from _expert("gemma.language", config.paligemma, adaptive=False)
    yield from _expert("gemma.action", config.action_expert, adaptive=config.pi05)


def _expert(name: str, variant: GemmaVariant, *, adaptive: bool) -> Iterator[Parameter]:
    width, layers, layer = variant.width, variant.depth, f"{name}.layers"
    heads, kv_heads = (
        count * variant.head_dim for count in (variant.num_heads, variant.num_kv_heads)
    )
    yield from _rms_norm(f"{layer}.attention_norm", width, adaptive, layers)
    yield from _kernel(layer, "attention.query", (width, heads), variant)
    yield from _kernel(layer, "attention.key", (width, kv_heads), variant)
    yield from _kernel(layer, "attention.value", (width, kv_heads), variant)
    yield from _kernel(layer, "attention.out", (heads, width), variant)
    yield from _rms_norm(f"{layer}.mlp_norm", width, adaptive, layers)
    yield from _kernel(layer, "mlp.gate", (width, variant.mlp_dim), variant)
    yield from _kernel(layer, "mlp.up", (width, variant.mlp_dim), variant)
    yield from _kernel(layer, "mlp.down", (variant.mlp_dim, width), variant)
    yield from _rms_norm(f"{name}.final_norm", width, adaptive)


def _kernel(
    layer: str, projection: str, shape: tuple[int, int], variant: GemmaVariant
) -> Iterator[Parameter]:
    """A kernel without a bias, and the factors of its adapter if the expert has any."""
    yield Parameter(f"{layer}.{projection}.kernel", shape, variant.depth)
    if variant.lora is not None:
        for part, factor in lora.adapter_shapes(projection, variant).items():
            yield Parameter(f"{layer}.{projection}.{part}", factor, variant.depth)


def _heads(config: Pi0Config) -> Iterator[Parameter]:
    width, action_dim = config.action_expert.width, config.action_dim
    yield from _linear("action_in_proj", action_dim, width)
    if config.pi05:
        yield from _linear("time_mlp_in", width, width)
        yield from _linear("time_mlp_out", width, width)
    else:
        yield from _linear("state_proj", action_dim, width)
        yield from _linear("action_time_mlp_in", 2 * width, width)
        yield from _linear("action_time_mlp_out", width, width)
    yield from _linear("action_out_proj", width, action_dim)


def _linear(name: str, inputs: int, outputs: int, layers: int | None = None) -> Iterator[Parameter]:
    yield Parameter(f"{name}.kernel", (inputs, outputs), layers)
    yield Parameter(f"{name}.bias", (outputs,), layers)


def _layer_norm(name: str, width: int, layers: int | None = None) -> Iterator[Parameter]:
    yield Parameter(f"{name}.scale", (width,), layers)
    yield Parameter(f"{name}.bias", (width,), layers)


def _rms_norm(
    name: str, width: int, adaptive: bool, layers: int | None = None
) -> Iterator[Parameter]:
    if adaptive:
        yield from _linear(f"{name}.modulation", width, 3 * width, layers)
    else:
        yield Parameter(f"{name}.scale", (width,), layers)


@dataclasses.dataclass(frozen=True)
class _Scale:
    """Mean and standard deviation of an array; None for 1/sqrt(fan-in)."""

    mean: float = 0.0
    deviation: float | None = None


def _initial_scale(name: str) -> _Scale:
    if lora.is_adapter(name):
        return _Scale(deviation=0.01)
    if ".modulation." in name or name.endswith(".bias"):
        return _Scale(deviation=0.0)
    if name.endswith("norm.scale"):
        return _Scale(mean=_identity_scale(name), deviation=0.0)
    return _Scale(deviation=0.02) if "embedding" in name.split(".")[-1] else _Scale()


def _random_scale(name: str) -> _Scale:
    if lora.is_adapter(name):
        return _Scale(deviation=0.1)
    if name.endswith(".bias"):
        return _Scale(deviation=0.02)
    if name.endswith("norm.scale"):
        return _Scale(mean=_identity_scale(name), deviation=0.1)
    return _Scale(deviation=0.02) if "embedding" in name.split(".")[-1] else _Scale()


def _identity_scale(name: str) -> float:
    """SigLIP's norms multiply by the scale, Gemma's by one plus it."""
    return 1.0 if name.startswith("vision.") else 0.0


def _deviation(parameter: Parameter, scale: _Scale) -> float:
    return 1 / math.sqrt(parameter.shape[0]) if scale.deviation is None else scale.deviation


def _draw(parameter: Parameter, seed: int, scale: _Scale) -> np.ndarray:
    """One family's array, a function of the seed and its name alone."""
    deviation = _deviation(parameter, scale)
    if deviation == 0:
        return np.full(parameter.stacked_shape, scale.mean, dtype=np.float32)
    digest = hashlib.sha256(f"{seed}/{parameter.name}".encode()).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "big")))
    values = generator.standard_normal(parameter.stacked_shape, dtype=np.float32)
    values *= np.float32(deviation)
    values += np.float32(scale.mean)
    return values

"""Adapters in each backend: against openpi's einsums, and against kernels merged with them."""

import dataclasses

import numpy as np
import pytest

from parity_tests.cases import ADAPTERS, TINY_ADAPTED, tiny_config
from parity_tests.harness import BACKENDS, draw_batch, error, parameters
from parity_tests.record import check
from pruner_spec import layout, lora
from pruner_spec.layout import OPENPI_JAX
from pruner_spec.parameters import parameter_table

# openpi's equations: of a kernel, and the two that its `Einsum` makes of that for an adapter. C
# stands for openpi's 2, key and value.
EINSUMS = {
    "q_einsum": ("BTD,NDH->BTNH", "BTD,NDL->BTNL", "BTNL,NLH->BTNH"),
    "kv_einsum": ("BSD,CKDH->CBSKH", "BSD,CKDL->CBSKL", "CBSKL,CKLH->CBSKH"),
    "attn_vec_einsum": ("BTNH,NHD->BTD", "BTNH,NHL->BTL", "BTL,NLD->BTD"),
}
# openpi's mark of the expert in its modules' names, and alpha over rank.
EXPERTS = {"language": ("", 4.5 / 9), "action": ("_1", 3.5 / 14)}
LAYER = 1

backends = pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
dtypes = pytest.mark.parametrize("dtype", ["float64", "float32"])
experts = pytest.mark.parametrize("expert", EXPERTS)


def openpis_weights(config, expert):
    """One layer's weights of an expert by openpi's names, in float64."""
    mark, _ = EXPERTS[expert]
    tensors = dict(layout.from_named(parameters(config), config, OPENPI_JAX))

    def weight(name):
        return tensors[f"PaliGemma/llm/layers/{name.format(mark)}"][LAYER].astype(np.float64)

    return weight


def openpis_einsum(weight, einsum, x, scale):
    """A product of openpi's attention."""
    of_kernel, of_a, of_b = EINSUMS[einsum]
    w, a, b = (weight(f"attn/{einsum}{{}}/{part}") for part in ("w", "lora_a", "lora_b"))
    return np.einsum(of_kernel, x, w) + np.einsum(of_b, np.einsum(of_a, x, a), b) * scale


def openpis_dot(weight, name, x, place=...):
    """A product of openpi's MLP, without a scale; `place` says which of gate and up."""
    w, a, b = (weight(f"mlp{{}}/{name}{part}")[place] for part in ("", "_lora_a", "_lora_b"))
    return x @ w + x @ a @ b


@backends
@dtypes
@experts
def test_projections_are_openpis(backend, dtype, expert):
    """The attention's by its einsums, written out, on arrays as openpi stores them."""
    config = tiny_config(dtype=dtype, **TINY_ADAPTED)
    variant = getattr(config, "paligemma" if expert == "language" else "action_expert")
    sizes = (variant.width, variant.num_heads * variant.head_dim, variant.mlp_dim)
    generator = np.random.default_rng(0)
    x, heads, hidden = (generator.standard_normal((2, 3, size)).astype(dtype) for size in sizes)

    def project(module, x, heads, hidden):
        layer = backend.layer(getattr(module.gemma, expert).layers, LAYER)
        attention, mlp = layer.attention, layer.mlp
        outputs = (attention.out(heads), mlp.gate(x), mlp.up(x), mlp.down(hidden))
        return (*attention.project(x), *outputs)

    found = backend.model(config, parameters(config)).compiled(project)(x, heads, hidden)
    weight, scale = openpis_weights(config, expert), EXPERTS[expert][1]
    x, heads, hidden = (array.astype(np.float64) for array in (x, heads, hidden))
    expected = (
        openpis_einsum(weight, "q_einsum", x, scale),
        *openpis_einsum(weight, "kv_einsum", x, scale),
        openpis_einsum(
            weight, "attn_vec_einsum", heads.reshape(2, 3, variant.num_heads, -1), scale
        ),
        openpis_dot(weight, "gating_einsum", x, 0),
        openpis_dot(weight, "gating_einsum", x, 1),
        openpis_dot(weight, "linear", hidden),
    )
    for y, want in zip(found, expected, strict=True):
        check("adapters", dtype, f"{backend.name} | openpi's einsums", error(y, want))


@backends
@pytest.mark.parametrize(("stored", "dtype"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_adapters_compute_in_the_dtype_of_their_input(backend, stored, dtype):
    """Whatever the dtype of their factors."""
    config = tiny_config(dtype=stored, **TINY_ADAPTED)
    module = backend.model(config, parameters(config)).module
    layer = backend.layer(module.gemma.action.layers, LAYER)
    for linear in (layer.attention.query, layer.attention.out, layer.mlp.down):
        x = backend.array(np.ones((2, linear.kernel.shape[0])), dtype)
        assert linear.lora.a.dtype != x.dtype
        assert linear(x).dtype == linear.lora(x).dtype == x.dtype


def adapters_of(config):
    """The adapters' variant by the name of their kernel, for every kernel that has one."""
    experts = {"language": config.paligemma.lora, "action": config.action_expert.lora}
    kernels = {name.rpartition(".lora.")[0] for name in parameter_table(config) if ".lora." in name}
    return {f"{name}.kernel": experts[name.split(".")[1]] for name in sorted(kernels)}


def deltas(name, a, b, variant):
    """What a kernel's adapter adds, all layers."""
    scale = lora.adapter_scale(name, variant)
    return np.stack([lora.delta(name, *layer, scale) for layer in zip(a, b, strict=True)])


def merged(config, weights):
    """The model without adapters: its config, and its weights with theirs added to the kernels."""
    plain = dataclasses.replace(
        config, paligemma_variant="tiny", action_expert_variant="tiny_expert"
    )
    kernels = {name: array for name, array in weights.items() if not lora.is_adapter(name)}
    for name, variant in adapters_of(config).items():
        a, b = (weights[factor] for factor in lora.adapter_names(name))
        kernels[name] = kernels[name] + deltas(name, a, b, variant)
    return plain, kernels


def wide_parameters(config):
    """`parameters` in float64, that merging may round as little as it can."""
    return {name: array.astype(np.float64) for name, array in parameters(config).items()}


@backends
@pytest.mark.parametrize(
    ("pi05", "adapters", "dtype"),
    [
        (False, "both", "float64"),
        (False, "both", "float32"),
        (True, "language", "float64"),
        (True, "action", "float64"),
    ],
)
def test_adapters_are_their_kernels_merged(backend, pi05, adapters, dtype):
    """Loss and actions: over the whole sequence, over the prefix, and over the cache."""
    config = tiny_config(dtype=dtype, pi05=pi05, **ADAPTERS[adapters])
    weights = wide_parameters(config)
    model, plain = backend.model(config, weights), backend.model(*merged(config, weights))
    batch = draw_batch(config)
    who = f"{backend.name}, merged"
    check("adapters", dtype, who, error(model.loss(batch), plain.loss(batch)))
    found, expected = (each.sample(batch.observation, batch.noise) for each in (model, plain))
    check("adapters", dtype, who, error(found, expected))


@backends
def test_the_gradient_of_a_factor_is_its_kernels_gradient_through_the_delta(backend):
    """Which is linear in each factor: shown along one direction a factor."""
    config = tiny_config(**TINY_ADAPTED)
    weights = wide_parameters(config)
    gradients = backend.model(config, weights).gradients(draw_batch(config))
    generator = np.random.default_rng(0)
    for name, variant in adapters_of(config).items():
        factors = lora.adapter_names(name)
        for place, factor in enumerate(factors):
            direction = generator.standard_normal(weights[factor].shape)
            turned = [weights[each] for each in factors]
            turned[place] = direction
            found = np.sum(gradients[factor] * direction)
            expected = np.sum(gradients[name] * deltas(name, *turned, variant))
            size = np.linalg.norm(gradients[factor]) * np.linalg.norm(direction)
            measured = abs(found - expected) / size
            check("adapters", "float64", f"{backend.name}, gradient", measured, factor)

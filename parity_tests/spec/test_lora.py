"""Adapters: what they add to a kernel, against openpi's einsums, and as PEFT's matrices."""

import re

import numpy as np
import pytest

from parity_tests.cases import TINY_ADAPTED, tiny_config
from pruner_spec import layout, lora
from pruner_spec.layout import OPENPI_JAX, OPENPI_TORCH
from pruner_spec.parameters import parameter_table

CONFIG = tiny_config(**TINY_ADAPTED)
EXPERTS = {"language": CONFIG.paligemma, "action": CONFIG.action_expert}
LAYERS = {
    "language": "paligemma_with_expert.paligemma.model.language_model.layers.",
    "action": "paligemma_with_expert.gemma_expert.model.layers.",
}
# Our kernel, PEFT's module, and the equation of openpi's einsum where the kernel has heads.
KERNELS = {
    "attention.query": ("self_attn.q_proj", "BTD,NDH->BTNH"),
    "attention.key": ("self_attn.k_proj", "BTD,NDH->BTNH"),
    "attention.value": ("self_attn.v_proj", "BTD,NDH->BTNH"),
    "attention.out": ("self_attn.o_proj", "BTNH,NHD->BTD"),
    "mlp.gate": ("mlp.gate_proj", None),
    "mlp.up": ("mlp.up_proj", None),
    "mlp.down": ("mlp.down_proj", None),
}

experts = pytest.mark.parametrize("expert", EXPERTS)
kernels = pytest.mark.parametrize("kernel", KERNELS)


def openpis_equations(equation):
    """The two that openpi's `Einsum` derives for its factors: the last two axes, L for the rank."""
    tokens, weight, out = re.match("(.*),(.*)->(.*)", equation).groups()
    first, second = weight[-2], weight[-1]
    summed = out.replace(second, "L")
    return (
        f"{tokens},{weight.replace(second, 'L')}->{summed}",
        f"{summed},{weight.replace(first, 'L')}->{out}",
    )


def integers():
    """Parameters of small integers, of which products and sums are exact."""
    generator = np.random.default_rng(0)
    table = parameter_table(CONFIG)
    return {name: generator.integers(-4, 5, p.stacked_shape) for name, p in table.items()}


def factors(named, expert, kernel):
    """The kernel's name and one layer's two factors."""
    name = f"gemma.{expert}.layers.{kernel}.kernel"
    return name, *(named[factor][1] for factor in lora.adapter_names(name))


@experts
@kernels
def test_delta_is_what_openpi_adds(expert, kernel):
    name, a, b = factors(integers(), expert, kernel)
    equation, variant = KERNELS[kernel][1], EXPERTS[expert]
    tokens = np.random.default_rng(1).integers(-4, 5, (2, 3, a.shape[-2]))
    if equation is None:
        expected = tokens @ a @ b
    else:
        if kernel == "attention.out":
            tokens = np.random.default_rng(1).integers(-4, 5, (2, 3, *a.shape[:2]))
        first, second = openpis_equations(equation)
        expected = np.einsum(second, np.einsum(first, tokens, a), b).reshape(2, 3, -1)
    delta = lora.delta(name, a, b, 1)
    assert delta.shape == parameter_table(CONFIG)[name].shape
    np.testing.assert_array_equal(tokens.reshape(2, 3, -1) @ delta, expected)
    assert variant.lora is not None
    scale = lora.adapter_scale(name, variant.lora)
    assert scale == (variant.lora.alpha / variant.lora.rank if equation else 1.0)
    np.testing.assert_array_equal(lora.delta(name, 1.0 * a, 1.0 * b, scale), delta * scale)


def test_the_equations_of_the_output_sum_the_heads_away():
    assert openpis_equations("BTNH,NHD->BTD") == ("BTNH,NHL->BTL", "BTL,NLD->BTD")
    assert openpis_equations("BTD,NDH->BTNH") == ("BTD,NDL->BTNL", "BTNL,NLH->BTNH")


@experts
@kernels
def test_pefts_product_is_the_same(expert, kernel):
    named = integers()
    tensors = dict(layout.from_named(named, CONFIG, OPENPI_TORCH))
    name, a, b = factors(named, expert, kernel)
    module = f"{LAYERS[expert]}1.{KERNELS[kernel][0]}"
    product = tensors[f"{module}.lora_B.weight"] @ tensors[f"{module}.lora_A.weight"]
    np.testing.assert_array_equal(product.T, lora.delta(name, a, b, 1))


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        ("self_attn.q_proj.lora_B.weight", "zeros outside the 6 blocks on its diagonal"),
        ("self_attn.o_proj.lora_A.weight", "6 equal blocks of rows"),
    ],
)
def test_other_matrices_than_openpis_are_refused(tensor, message):
    tensors = dict(layout.from_named(integers(), CONFIG, OPENPI_TORCH))
    name = f"{LAYERS['action']}2.{tensor}"
    tensors[name] = tensors[name] + 1
    tensors[name][0, 0] += 1
    with pytest.raises(ValueError, match=f"{re.escape(tensor)}: expected {message}"):
        dict(layout.to_named(tensors, CONFIG))


def test_adapters_of_jax_are_the_arrays_themselves():
    named = integers()
    tensors = dict(layout.from_named(named, CONFIG, OPENPI_JAX))
    q = "PaliGemma/llm/layers/attn/q_einsum_1/lora_a"
    np.testing.assert_array_equal(tensors[q], named["gemma.action.layers.attention.query.lora.a"])
    gating = tensors["PaliGemma/llm/layers/mlp/gating_einsum_lora_b"]
    np.testing.assert_array_equal(gating[:, 1], named["gemma.language.layers.mlp.up.lora.b"])

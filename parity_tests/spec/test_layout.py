"""The weight map: against openpi's own tables, against its converter's arithmetic, and errors."""

import collections
import dataclasses
import pathlib
import re

import numpy as np
import pytest

from parity_tests import reference
from parity_tests.cases import TINY_ADAPTED, tiny_config
from parity_tests.convert.checkpoints import nested
from parity_tests.spec.openpi_converter import openpi_convert
from pruner_spec import layout
from pruner_spec.config import Pi0Config
from pruner_spec.layout import JAX, LAYOUTS, OPENPI_JAX, OPENPI_TORCH, TORCH
from pruner_spec.layout_row import LEGEND
from pruner_spec.parameters import parameter_dtype, parameter_table, random_parameters

FULL_SIZE = {
    "dummy": Pi0Config(paligemma_variant="dummy", action_expert_variant="dummy", pi05=True),
    "pi0_full": Pi0Config(pi05=False),
    "pi05_full": Pi0Config(pi05=True),
}
ADAPTED = {"paligemma_variant": "gemma_2b_lora", "action_expert_variant": "gemma_300m_lora"}
WITH_ADAPTERS = {
    "pi0_full_lora": Pi0Config(pi05=False, **ADAPTED),
    "pi05_full_lora": Pi0Config(pi05=True, **ADAPTED),
}
TINY = {
    "π0": tiny_config(pi05=False),
    "π0.5": tiny_config(pi05=True),
    "π0, adapters": tiny_config(pi05=False, **TINY_ADAPTED),
    "π0.5, adapters": tiny_config(pi05=True, **TINY_ADAPTED),
    "π0.5, one adapted expert": tiny_config(pi05=True, paligemma_variant="tiny_lora"),
}

full_size = pytest.mark.parametrize("table", FULL_SIZE)
PLAIN = {name: config for name, config in TINY.items() if not config.has_lora}

tiny = pytest.mark.parametrize("config", TINY.values(), ids=TINY)
plain = pytest.mark.parametrize("config", PLAIN.values(), ids=PLAIN)
layouts = pytest.mark.parametrize("target", LAYOUTS, ids=[known.name for known in LAYOUTS])

EMBEDDING = "paligemma_with_expert.paligemma.lm_head.weight"
ALIAS = "paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"
UNUSED = "paligemma_with_expert.gemma_expert.lm_head.weight"


@dataclasses.dataclass
class Shaped:
    """An array that must not be read."""

    shape: tuple[int, ...]


def weights(config, target=OPENPI_JAX):
    """Tensors in which no number comes twice, as far as float32 can tell them apart."""
    generator = np.random.default_rng(0)
    shapes = target.shapes(config)
    return {name: generator.random(shape, np.float32) for name, shape in shapes.items()}


def integers(config, generator):
    """Tensors of small integers, of which products and sums are exact."""
    shapes = OPENPI_JAX.shapes(config)
    return {name: generator.integers(-4, 5, shape) for name, shape in shapes.items()}


def assert_identical(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        np.testing.assert_array_equal(found[name], array, err_msg=name)


@pytest.mark.parametrize("table", FULL_SIZE | WITH_ADAPTERS)
def test_jax_names_and_shapes_are_openpis(table):
    config = (FULL_SIZE | WITH_ADAPTERS)[table]
    assert OPENPI_JAX.shapes(config) == reference.shapes(f"jax_params_{table}")


@full_size
def test_torch_names_and_shapes_are_openpis(table):
    expected = reference.shapes(f"torch_params_{table}")
    found = OPENPI_TORCH.shapes(FULL_SIZE[table])
    assert found == {name: shape for name, shape in expected.items() if name in found}
    assert expected.keys() - found.keys() <= {UNUSED, ALIAS}
    assert (OPENPI_TORCH.aliases, OPENPI_TORCH.unused) == ({ALIAS: EMBEDDING}, (UNUSED,))


@full_size
@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_full_size_checkpoints_are_accepted(table, framework):
    shapes = reference.shapes(f"{framework}_params_{table}")
    layout.to_named({name: Shaped(shape) for name, shape in shapes.items()}, FULL_SIZE[table])


@tiny
@layouts
def test_every_parameter_is_in_one_row(config, target):
    written = collections.Counter(name for row in target.rows_of(config) for name in row.ours)
    assert written == collections.Counter(parameter_table(config).keys())


@layouts
def test_every_row_is_used_and_its_axes_are_in_the_legend(target):
    used = {row for config in TINY.values() for row in target.rows_of(config)}
    assert used == set(target.rows)
    for row in target.rows:
        assert set(re.findall(r"[a-z]+", row.pattern)) <= LEGEND.keys(), row.theirs


@tiny
@layouts
def test_round_trip_is_exact(config, target):
    named = dict(random_parameters(config, seed=0))
    tensors = dict(layout.from_named(named, config, target))
    assert tensors.keys() == target.shapes(config).keys() | target.aliases.keys()
    assert layout.detect(layout.flatten(tensors)) is target
    assert_identical(dict(layout.to_named(tensors, config)), named)


@plain
@pytest.mark.parametrize("target", [OPENPI_JAX, OPENPI_TORCH], ids=["jax", "torch"])
def test_round_trip_of_openpis_tensors_is_exact(config, target):
    tensors = weights(config, target)
    named = dict(layout.to_named(tensors, config))
    back = dict(layout.from_named(named, config, target))
    assert_identical(back, tensors | {alias: back[name] for alias, name in target.aliases.items()})


@plain
def test_openpis_layouts_agree(config):
    tree = weights(config)
    converted = openpi_convert(tree, config)
    assert converted.keys() == OPENPI_TORCH.shapes(config).keys()
    assert_identical(dict(layout.to_named(converted, config)), dict(layout.to_named(tree, config)))


@pytest.mark.parametrize(("x", "expert"), [("", "language"), ("_1", "action")])
def test_gemma_kernels_do_what_openpis_einsums_do(x, expert):
    config, generator = TINY["π0.5"], np.random.default_rng(1)
    tree = integers(config, generator)
    named = dict(layout.to_named(tree, config))
    kernels = {name: named[f"gemma.{expert}.layers.{name}.kernel"][2] for name in GEMMA_KERNELS}
    q, kv, out = (
        tree[f"PaliGemma/llm/layers/attn/{name}{x}/w"][2]
        for name in ("q_einsum", "kv_einsum", "attn_vec_einsum")
    )
    tokens = generator.integers(-4, 5, (5, q.shape[1]))
    heads = np.einsum("td,kdh->tkh", tokens, q)
    key, value = np.einsum("td,zgdh->ztgh", tokens, kv)
    for name, expected in {"query": heads, "key": key, "value": value}.items():
        np.testing.assert_array_equal(
            tokens @ kernels[f"attention.{name}"], expected.reshape(5, -1)
        )
    np.testing.assert_array_equal(
        heads.reshape(5, -1) @ kernels["attention.out"], np.einsum("tkh,khd->td", heads, out)
    )
    gate, up = tree[f"PaliGemma/llm/layers/mlp{x}/gating_einsum"][2]
    np.testing.assert_array_equal(kernels["mlp.gate"], gate)
    np.testing.assert_array_equal(kernels["mlp.up"], up)


GEMMA_KERNELS = (
    *(f"attention.{name}" for name in ("query", "key", "value", "out")),
    *(f"mlp.{name}" for name in ("gate", "up", "down")),
)


def test_patch_embedding_is_openpis_convolution():
    config, generator = TINY["π0.5"], np.random.default_rng(1)
    tree = integers(config, generator)
    kernel = tree["PaliGemma/img/embedding/kernel"]
    patch = generator.integers(-4, 5, kernel.shape[:3])
    ours = dict(layout.to_named(tree, config))["vision.patch_embedding.kernel"]
    np.testing.assert_array_equal(patch.reshape(-1) @ ours, np.tensordot(patch, kernel, axes=3))


@tiny
def test_rows_take_one_layer_at_a_time(config):
    tree = weights(config)
    for row in OPENPI_JAX.rows_of(config):
        if "l" in row.pattern.split():
            whole, one = tree[row.theirs], row.of_one_layer()
            parts = [row.split(whole, config), one.split(whole[1], config)]
            for stacked, layer in zip(*parts, strict=True):
                np.testing.assert_array_equal(stacked[1], layer)
            np.testing.assert_array_equal(one.merge(parts[1], config), whole[1])
            assert one.shape(config) == whole.shape[1:]


WRAPPED = {
    "flat": lambda flat: flat,
    "nested": nested,
    "params": lambda flat: {"params": nested(flat)},
    "params and value": lambda flat: nested(
        {f"params/{name}/value": leaf for name, leaf in flat.items()}
    ),
    "tuples": lambda flat: {tuple(name.split("/")): leaf for name, leaf in flat.items()},
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
@pytest.mark.parametrize("target", [OPENPI_JAX, JAX], ids=["openpi", "ours"])
def test_trees_may_be_nested_and_wrapped(wrap, target):
    config = TINY["π0.5"]
    tree = weights(config, target)
    wrapped = wrap({name.replace(".", "/"): leaf for name, leaf in tree.items()})
    assert_identical(dict(layout.to_named(wrapped, config)), dict(layout.to_named(tree, config)))


def test_lerobots_prefix():
    config = TINY["π0.5"]
    tree = weights(config, OPENPI_TORCH)
    prefixed = {f"model.{name}": leaf for name, leaf in tree.items()}
    assert_identical(dict(layout.to_named(prefixed, config)), dict(layout.to_named(tree, config)))


@pytest.mark.parametrize("names", [{ALIAS}, {EMBEDDING}, {ALIAS, EMBEDDING}], ids=len)
def test_embedding_table_may_have_either_name(names):
    config = TINY["π0.5"]
    tree = weights(config, OPENPI_TORCH)
    table = tree.pop(EMBEDDING)
    unused = {UNUSED: np.zeros((1024, 56))}
    named = dict(layout.to_named(tree | dict.fromkeys(names, table) | unused, config))
    np.testing.assert_array_equal(named["gemma.embedder.embedding"], table)


def test_the_alias_counts_where_both_names_are_stored():
    """LeRobot trains `embed_tokens` and leaves `lm_head` as it was."""
    config = TINY["π0.5"]
    tree = weights(config, OPENPI_TORCH)
    trained = tree[EMBEDDING] + 1
    named = dict(layout.to_named(tree | {ALIAS: trained}, config))
    np.testing.assert_array_equal(named["gemma.embedder.embedding"], trained)


def test_errors_are_all_listed_before_anything_is_read():
    config = TINY["π0.5"]
    tree = {name: Shaped(shape) for name, shape in OPENPI_TORCH.shapes(config).items()}
    del tree["time_mlp_in.bias"], tree["action_out_proj.weight"]
    tree["action_in_proj.weight"] = Shaped((7, 56))
    tree[ALIAS] = Shaped((1024, 71))
    tree["critic.weight"] = Shaped((3,))
    with pytest.raises(ValueError, match="not those of this config's model") as raised:
        layout.to_named(tree, config)
    assert str(raised.value).splitlines() == [
        "the weights, read in openpi's PyTorch layout, are not those of this config's model",
        "missing: action_out_proj.weight: expected (7, 56), got none",
        "missing: time_mlp_in.bias: expected (56,), got none",
        "extra: critic.weight: expected none, got (3,)",
        "shape: action_in_proj.weight: expected (56, 7), got (7, 56)",
        f"shape: {ALIAS}: expected (1024, 72), got (1024, 71)",
    ]


@pytest.mark.parametrize(("source", "config"), [("π0", "π0.5"), ("π0.5", "π0")])
@layouts
def test_weights_of_the_other_model(source, config, target):
    tree = {name: Shaped(shape) for name, shape in target.shapes(TINY[source]).items()}
    with pytest.raises(ValueError, match=rf"hint: .*{source}, and pi05=\w+ means {config}\n"):
        layout.to_named(tree, TINY[config])


def test_adapters_are_not_dropped():
    shapes = reference.shapes("jax_params_pi05_full_lora")
    adapters = [name for name in shapes if "lora" in name]
    with pytest.raises(ValueError, match="hint: these are LoRA adapters") as raised:
        layout.to_named(
            {name: Shaped(shape) for name, shape in shapes.items()}, Pi0Config(pi05=True)
        )
    assert all(f"extra: {name}: " in str(raised.value) for name in adapters)
    assert str(raised.value).count("\n") == len(adapters) + 1


@pytest.mark.parametrize("tree", [{}, {"resnet/conv/kernel": np.zeros(3)}], ids=["empty", "other"])
def test_unknown_weights(tree):
    with pytest.raises(ValueError, match="none with a known name"):
        layout.to_named(tree, TINY["π0.5"])


def test_layers_beyond_the_depth_are_extra():
    config = TINY["π0.5"]
    tree = {name: Shaped(shape) for name, shape in TORCH.shapes(config).items()}
    tree["vision.blocks.5.mlp.up.bias"] = Shaped((88,))
    with pytest.raises(ValueError, match=r"extra: vision\.blocks\.5\.mlp\.up\.bias"):
        layout.to_named(tree, config)


def test_from_named_checks_what_it_is_given():
    config = TINY["π0.5"]
    named = dict(random_parameters(config, seed=0))
    del named["vision.head.bias"]
    with pytest.raises(ValueError, match=r"missing: vision\.head\.bias: expected \(72,\)"):
        layout.from_named(named, config, OPENPI_JAX)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stored_casts_to_the_dtypes_of_the_model(dtype):
    config = dataclasses.replace(TINY["π0.5"], dtype=dtype)
    for parameter, array in layout.stored(random_parameters(config, seed=0), config):
        assert array.dtype == np.dtype(parameter_dtype(parameter.name, dtype)), parameter.name


def test_stored_wants_every_parameter():
    config = TINY["π0.5"]
    pairs = [pair for pair in random_parameters(config, seed=0) if pair[0] != "vision.head.bias"]
    with pytest.raises(ValueError, match=r"missing: vision\.head\.bias"):
        list(layout.stored(pairs, config))


def test_page_is_current():
    page = pathlib.Path(__file__).parents[2] / "docs/layout.md"
    assert page.read_text() == layout.markdown(), "python -m pruner_spec.layout > docs/layout.md"

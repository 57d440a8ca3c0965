"""The parameters: number, names and dtypes against openpi's, and the two ways to draw them."""

import pathlib

import numpy as np
import pytest

from parity_tests import reference
from parity_tests.cases import tiny_config
from pruner_spec.config import Pi0Config
from pruner_spec.layout import OPENPI_TORCH
from pruner_spec.parameters import (
    Parameter,
    initial_parameters,
    parameter_dtype,
    parameter_table,
    random_parameters,
)

TINY = {"π0": tiny_config(pi05=False), "π0.5": tiny_config(pi05=True)}

tiny = pytest.mark.parametrize("config", TINY.values(), ids=TINY)
draws = pytest.mark.parametrize("draw", [initial_parameters, random_parameters])


def openpi_dtypes(table):
    """The third column of a table such as "torch_params_pi05_full", by name."""
    path = pathlib.Path(reference.__file__).parent / f"{table}.tsv"
    lines = [line.split("\t") for line in path.read_text().splitlines()]
    return {name: dtype for name, *_, dtype in lines if not name.startswith("#")}


@pytest.mark.parametrize(("pi05", "count"), [(True, 3_353_433_872), (False, 3_238_048_528)])
def test_the_models_have_as_many_numbers_as_openpis(pi05, count):
    table = parameter_table(Pi0Config(pi05=pi05))
    assert sum(int(np.prod(parameter.stacked_shape)) for parameter in table.values()) == count


@pytest.mark.parametrize("pi05", [True, False], ids=["pi05_full", "pi0_full"])
def test_dtypes_of_a_bfloat16_model_are_openpis(pi05):
    config = Pi0Config(dtype="bfloat16", pi05=pi05)
    expected = openpi_dtypes("torch_params_pi05_full" if pi05 else "torch_params_pi0_full")
    found = {
        name: {parameter_dtype(ours, config.dtype) for ours in row.ours}
        for row in OPENPI_TORCH.rows_of(config)
        for name in row.names(config)
    }
    assert found == {name: {expected[name]} for name in found}
    both = {dtype for dtypes in found.values() for dtype in dtypes}
    assert both == {"bfloat16", "float32"}


@tiny
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_other_models_have_one_dtype(config, dtype):
    assert {parameter_dtype(name, dtype) for name in parameter_table(config)} == {dtype}


def test_pi0_and_pi05_differ_in_their_heads_and_in_the_action_experts_norms():
    pi0, pi05 = (set(parameter_table(config)) for config in TINY.values())
    linear = ("kernel", "bias")
    norms = [f"gemma.action.{name}" for name in ("layers.attention_norm", "layers.mlp_norm")]
    norms.append("gemma.action.final_norm")
    heads = ("state_proj", "action_time_mlp_in", "action_time_mlp_out")
    times = ("time_mlp_in", "time_mlp_out")
    assert pi0 - pi05 == {f"{head}.{part}" for head in heads for part in linear} | {
        f"{norm}.scale" for norm in norms
    }
    assert pi05 - pi0 == {f"{head}.{part}" for head in times for part in linear} | {
        f"{norm}.modulation.{part}" for norm in norms for part in linear
    }


@pytest.mark.parametrize(
    ("name", "shape", "layers"),
    [
        ("vision.patch_embedding.kernel", (3072, 48), None),
        ("vision.position_embedding", (49, 48), None),
        ("vision.blocks.attention.query.bias", (48,), 5),
        ("vision.blocks.mlp.down.kernel", (88, 48), 5),
        ("vision.head.kernel", (48, 72), None),
        ("gemma.embedder.embedding", (1024, 72), None),
        ("gemma.language.layers.attention.query.kernel", (72, 120), 3),
        ("gemma.language.layers.attention.value.kernel", (72, 40), 3),
        ("gemma.language.layers.mlp_norm.scale", (72,), 3),
        ("gemma.language.final_norm.scale", (72,), None),
        ("gemma.action.layers.attention.out.kernel", (120, 56), 3),
        ("gemma.action.layers.mlp.gate.kernel", (56, 104), 3),
        ("gemma.action.layers.mlp_norm.modulation.kernel", (56, 168), 3),
        ("gemma.action.final_norm.modulation.bias", (168,), None),
        ("action_in_proj.kernel", (7, 56), None),
        ("action_out_proj.kernel", (56, 7), None),
    ],
)
def test_shapes(name, shape, layers):
    found = parameter_table(TINY["π0.5"])[name]
    assert found == Parameter(name, shape, layers)
    assert found.stacked_shape == (shape if layers is None else (layers, *shape))


def test_shapes_of_pi0s_heads():
    table = parameter_table(TINY["π0"])
    assert table["action_time_mlp_in.kernel"].shape == (112, 56)
    assert table["state_proj.kernel"].shape == (7, 56)


@pytest.mark.parametrize(
    ("parameter", "family", "names"),
    [
        (Parameter("state_proj.bias", (7,)), "state_proj.bias", ("state_proj.bias",)),
        (
            Parameter("gemma.action.layers.mlp.up.kernel", (4, 5), 3),
            "gemma.action.layers.{layer}.mlp.up.kernel",
            tuple(f"gemma.action.layers.{layer}.mlp.up.kernel" for layer in (0, 1, 2)),
        ),
        (
            Parameter("vision.blocks.mlp_norm.scale", (4,), 2),
            "vision.blocks.{layer}.mlp_norm.scale",
            ("vision.blocks.0.mlp_norm.scale", "vision.blocks.1.mlp_norm.scale"),
        ),
    ],
)
def test_names_in_torch(parameter, family, names):
    assert parameter.torch_name == family
    assert parameter.torch_names == names


@tiny
def test_a_mark_for_the_layer_is_where_there_are_layers(config):
    for parameter in parameter_table(config).values():
        assert ("{layer}" in parameter.torch_name) == (parameter.layers is not None)
        assert len(parameter.torch_names) == (parameter.layers or 1)


@tiny
@draws
def test_drawn_are_the_models_parameters_in_order(config, draw):
    found = [(name, array.shape, array.dtype) for name, array in draw(config, 0)]
    expected = [
        (name, parameter.stacked_shape, np.float32)
        for name, parameter in parameter_table(config).items()
    ]
    assert found == expected


@tiny
@draws
def test_the_same_seed_draws_the_same_and_another_does_not(config, draw):
    first, again, other = (dict(draw(config, seed)) for seed in (3, 3, 4))
    for name, array in first.items():
        np.testing.assert_array_equal(array, again[name], err_msg=name)
        assert np.array_equal(array, other[name]) == (np.ptp(array) == 0), name


@tiny
def test_no_random_parameter_is_constant(config):
    """Nor do two of one shape, or two layers, hold the same numbers."""
    layers = [
        layer
        for name, array in random_parameters(config, 0)
        for layer in (array if parameter_table(config)[name].layers else [array])
    ]
    assert all(np.ptp(layer) > 0 for layer in layers)
    assert len({layer.tobytes() for layer in layers}) == len(layers)


def test_random_parameters_are_the_same_in_every_process():
    """Unlike anything that goes through Python's `hash`."""
    found = dict(random_parameters(TINY["π0.5"], 0))["action_in_proj.kernel"][0, :3]
    assert [f"{value:.3f}" for value in found] == ["0.509", "-0.480", "-0.880"]


@tiny
def test_initial_norms_are_the_identity_and_biases_are_zero(config):
    constant = {
        name: set(np.unique(array).tolist())
        for name, array in initial_parameters(config, 0)
        if np.ptp(array) == 0
    }
    for name, values in constant.items():
        is_siglips_norm = name.startswith("vision.") and name.endswith("norm.scale")
        assert values == ({1.0} if is_siglips_norm else {0.0}), name
    assert constant.keys() == {
        name
        for name in parameter_table(config)
        if name.endswith(("norm.scale", ".bias")) or ".modulation." in name
    }


@pytest.mark.parametrize(
    ("name", "fan_in"),
    [
        ("vision.patch_embedding.kernel", 3072),
        ("vision.blocks.mlp.up.kernel", 48),
        ("vision.blocks.mlp.down.kernel", 88),
        ("gemma.language.layers.attention.out.kernel", 120),
        ("gemma.action.layers.mlp.down.kernel", 104),
        ("time_mlp_in.kernel", 56),
    ],
)
@draws
def test_kernels_have_the_variance_of_one_over_their_inputs(draw, name, fan_in):
    array = dict(draw(TINY["π0.5"], 0))[name]
    assert round(float(array.var()) * fan_in, 1) == 1.0


@draws
def test_embeddings_are_small(draw):
    table = dict(draw(TINY["π0.5"], 0))
    for name in ("gemma.embedder.embedding", "vision.position_embedding"):
        assert round(float(table[name].std()), 3) == 0.02

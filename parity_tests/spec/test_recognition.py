"""What a checkpoint is recognised as, from names and shapes alone."""

import dataclasses

import pytest

from parity_tests import reference
from parity_tests.cases import TINY_ADAPTED, tiny_config
from pruner_spec.config import GemmaVariant, LoraVariant, Pi0Config, VisionVariant
from pruner_spec.layout import LAYOUTS, OPENPI_JAX, OPENPI_TORCH
from pruner_spec.openpi_configs import OPENPI_CONFIGS, openpi_config
from pruner_spec.recognition import recognise

TABLES = {
    "jax_params_dummy": "debug_pi05",
    "jax_params_pi0_full": "pi0_aloha",
    "jax_params_pi05_full": "pi05_aloha",
    "jax_params_pi0_full_lora": "pi0_libero_low_mem_finetune",
    "torch_params_dummy": "debug_pi05",
    "torch_params_pi0_full": "pi0_aloha",
    "torch_params_pi05_full": "pi05_aloha",
}
OPEN = {"action_horizon": 11, "max_token_len": 40, "discrete_state_input": True}
TINY = {
    "π0": tiny_config(pi05=False, dtype="bfloat16", discrete_state_input=True),
    "π0.5": tiny_config(dtype="bfloat16"),
    "π0.5, adapters": tiny_config(dtype="bfloat16", **TINY_ADAPTED),
}
UNNAMED = Pi0Config(
    paligemma_variant=GemmaVariant(
        width=26,
        depth=3,
        mlp_dim=46,
        num_heads=6,
        num_kv_heads=2,
        head_dim=10,
        vocab_size=99,
        lora=LoraVariant(rank=4, alpha=1.0),
    ),
    action_expert_variant=GemmaVariant(
        width=34, depth=3, mlp_dim=54, num_heads=6, num_kv_heads=2, head_dim=10, vocab_size=99
    ),
    vision_variant=VisionVariant(width=30, depth=5, mlp_dim=44, num_heads=15, patch_size=56),
    action_dim=13,
    pi05=True,
)
VARIANTS = ("paligemma_variant", "action_expert_variant", "vision_variant")
TOLD = {name: getattr(UNNAMED, name) for name in VARIANTS}

layouts = pytest.mark.parametrize("known", LAYOUTS, ids=[known.name for known in LAYOUTS])


def without_alpha(config):
    """What shapes can say of adapters: alpha is taken to be the rank."""
    language = config.paligemma
    lora = LoraVariant(rank=language.lora.rank, alpha=float(language.lora.rank))
    return dataclasses.replace(config, paligemma_variant=dataclasses.replace(language, lora=lora))


@pytest.mark.parametrize("table", TABLES)
def test_openpis_checkpoints(table):
    found = recognise(reference.shapes(table))
    assert found.config == OPENPI_CONFIGS[TABLES[table]]
    assert found.layout is (OPENPI_JAX if table.startswith("jax") else OPENPI_TORCH)
    assert found.assumed == ("action_horizon", "max_token_len", "discrete_state_input")


@layouts
@pytest.mark.parametrize("config", TINY.values(), ids=TINY)
def test_every_layout(known, config):
    found = recognise(known.shapes(config), OPEN)
    assert (found.layout, found.config, found.assumed) == (known, config, ())


def test_sizes_without_a_name():
    assert recognise(OPENPI_JAX.shapes(UNNAMED)).config == without_alpha(UNNAMED)
    assert recognise(OPENPI_JAX.shapes(UNNAMED), TOLD).config == UNNAMED


@pytest.mark.parametrize("known", LAYOUTS[1:], ids=[known.name for known in LAYOUTS[1:]])
def test_heads_have_to_be_told_where_no_shape_says_them(known):
    shapes = known.shapes(UNNAMED)
    with pytest.raises(ValueError, match=r"_variant: expected sizes .* that says num_heads"):
        recognise(shapes)
    assert recognise(shapes, TOLD).config == UNNAMED


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"pi05": False}, "pi05: expected False as it was told, got True"),
        ({"action_dim": 7}, "action_dim: expected 7 as it was told, got 32"),
        (
            {"paligemma_variant": "gemma_2b_lora"},
            "paligemma_variant: expected 'gemma_2b_lora' as it was told, got 'gemma_2b'",
        ),
        ({"vision_variant": "So400m/16"}, "expected 'So400m/16' as it was told, got 'So400m/14'"),
    ],
)
def test_what_was_told_is_held_to_what_is_found(told, message):
    with pytest.raises(ValueError, match=message):
        recognise(reference.shapes("jax_params_pi05_full"), told)


def test_all_differences_are_listed_although_sizes_are_missing():
    shapes = reference.shapes("jax_params_pi05_full")
    del shapes["PaliGemma/llm/layers/attn/q_einsum/w"], shapes["time_mlp_in/bias"]
    shapes["PaliGemma/img/head/bias"] = (2047,)
    shapes["wrong/kernel"] = (3,)
    with pytest.raises(ValueError, match="not those of this config's model") as raised:
        recognise(shapes)
    assert sorted(str(raised.value).splitlines()[1:]) == [
        "extra: wrong/kernel: expected none, got (3,)",
        "missing: PaliGemma/llm/layers/attn/q_einsum/w: expected (18, 8, 2048, 256), got none",
        "missing: time_mlp_in/bias: expected (1024,), got none",
        "shape: PaliGemma/img/head/bias: expected (2048,), got (2047,)",
    ]


@pytest.mark.parametrize("layer", [0, 9, 17])
def test_a_missing_layer_is_found(layer):
    shapes = reference.shapes("torch_params_pi05_full")
    gone = f"paligemma_with_expert.gemma_expert.model.layers.{layer}."
    kept = {name: shape for name, shape in shapes.items() if not name.startswith(gone)}
    with pytest.raises(ValueError, match="not those of this config's model") as raised:
        recognise(kept)
    expected = {
        f"missing: {name}: expected {shapes[name]}, got none"
        for name in shapes.keys() - kept.keys()
    }
    assert set(str(raised.value).splitlines()[1:]) == expected


def test_pi0_fast_is_refused():
    shapes = reference.shapes("jax_params_pi0_full")
    fast = {
        name: shape
        for name, shape in shapes.items()
        if "_1" not in name and name.startswith("PaliGemma")
    }
    with pytest.raises(ValueError, match=r"none of an action expert's.*π0-FAST"):
        recognise(fast)


def test_config_names():
    assert openpi_config("pi05_libero").action_horizon == 10
    assert not openpi_config("pi05_libero").discrete_state_input
    with pytest.raises(ValueError, match=r"got 'pi05_liberoo'\. did you mean pi05_libero"):
        openpi_config("pi05_liberoo")
    with pytest.raises(ValueError, match=r"got 'pi0_fast_droid', of π0-FAST"):
        openpi_config("pi0_fast_droid")

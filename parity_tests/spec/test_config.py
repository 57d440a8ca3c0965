"""The config: openpi's names and defaults, what follows from them, and what is refused."""

import dataclasses
import types

import pytest

from parity_tests.cases import tiny_config
from pruner_spec import config as spec
from pruner_spec.config import GemmaVariant, Pi0Config, VisionVariant

OPENPI_DEFAULTS = {
    "dtype": "bfloat16",
    "paligemma_variant": "gemma_2b",
    "action_expert_variant": "gemma_300m",
    "action_dim": 32,
    "action_horizon": 50,
    "max_token_len": 48,
    "pi05": False,
    "discrete_state_input": False,
}
LORA = {  # rank, scale
    "gemma_2b": (16, 1.0),
    "gemma_300m": (32, 1.0),
    "tiny": (9, 0.5),
    "tiny_expert": (14, 0.25),
}

OUR_DEFAULTS = {
    "vision_variant": "So400m/14",
    "token_pruning_enabled": False,
    "token_prune_noise_scale": 0.0,
    "token_prune_keep_tokens": None,
    "token_prune_keep_ratio": None,
    "token_prune_scope": "camera",
    "token_prune_min_keep": 1,
}

# Width, depth, MLP width, heads, key/value heads, head dim, vocabulary.
GEMMA_SIZES = {
    "gemma_2b": (2048, 18, 16384, 8, 1, 256, 257152),
    "gemma_300m": (1024, 18, 4096, 8, 1, 256, 257152),
    "dummy": (64, 4, 128, 8, 1, 16, 257152),
    "tiny": (72, 3, 136, 6, 2, 20, 1024),
    "tiny_expert": (56, 3, 104, 6, 2, 20, 1024),
}

# (the field that the error must name, settings)
REFUSED = [
    ("dtype", {"dtype": "float16"}),
    ("dtype", {"dtype": None}),
    ("paligemma_variant", {"paligemma_variant": "gemma_7b"}),
    ("action_expert_variant", {"action_expert_variant": "gemma_7b"}),
    ("action_expert_variant", {"action_expert_variant": "dummy"}),
    ("action_expert_variant", {"paligemma_variant": "tiny"}),
    ("vision_variant", {"vision_variant": "So400m"}),
    ("vision_variant", {"vision_variant": "So400m/"}),
    ("vision_variant", {"vision_variant": "B/16"}),
    ("vision_variant", {"vision_variant": "So400m/0"}),
    ("vision_variant", {"vision_variant": "So400m/-14"}),
    ("vision_variant", {"vision_variant": "So400m/225"}),
    ("action_dim", {"action_dim": 0}),
    ("action_dim", {"action_dim": 32.0}),
    ("action_dim", {"action_dim": True}),
    ("action_horizon", {"action_horizon": 0}),
    ("action_horizon", {"action_horizon": "50"}),
    ("max_token_len", {"max_token_len": 0}),
    ("token_prune_noise_scale", {"token_prune_noise_scale": -0.1}),
    ("token_prune_noise_scale", {"token_prune_noise_scale": float("nan")}),
    ("token_prune_noise_scale", {"token_prune_noise_scale": float("inf")}),
    ("token_prune_scope", {"token_prune_scope": "global"}),
    ("token_prune_keep_ratio", {"token_prune_keep_ratio": 0.0}),
    ("token_prune_keep_ratio", {"token_prune_keep_ratio": 1.01}),
    ("token_prune_keep_ratio", {"token_prune_keep_ratio": float("nan")}),
    ("token_prune_keep_ratio", {"token_prune_keep_ratio": 0.5, "token_prune_keep_tokens": 128}),
    ("token_prune_keep_tokens", {"token_prune_keep_tokens": 0}),
    ("token_prune_keep_tokens", {"token_prune_keep_tokens": 12.5}),
    ("token_prune_keep_tokens", {"token_prune_keep_tokens": True}),
    ("token_prune_keep_tokens", {"token_prune_keep_tokens": 257}),
    ("token_prune_keep_tokens", {"token_prune_keep_tokens": 257, "token_prune_scope": "joint"}),
    ("token_prune_min_keep", {"token_prune_min_keep": 0}),
    ("token_prune_min_keep", {"token_prune_min_keep": 257}),
    ("token_prune_min_keep", {"token_prune_min_keep": 769, "token_prune_scope": "joint"}),
    ("token_prune_min_keep", {"token_prune_min_keep": 6, "token_prune_keep_tokens": 5}),
    (
        "token_prune_min_keep",
        {
            "token_prune_min_keep": 16,
            "token_prune_keep_tokens": 5,
            "token_prune_scope": "joint",
        },
    ),
]

ACCEPTED = [
    {"paligemma_variant": "dummy", "action_expert_variant": "dummy"},
    {"vision_variant": "So400m/224"},
    {"action_dim": 1, "action_horizon": 1, "max_token_len": 1},
    {"token_prune_noise_scale": 0},
    {"token_prune_keep_tokens": 256},
    {"token_prune_keep_ratio": 1.0},
    {"token_prune_min_keep": 256},
    {"token_prune_min_keep": 768, "token_prune_scope": "joint"},
    {"token_prune_min_keep": 5, "token_prune_keep_tokens": 5},
    {"token_prune_min_keep": 15, "token_prune_keep_tokens": 5, "token_prune_scope": "joint"},
]


def test_defaults_are_openpis():
    assert dataclasses.asdict(Pi0Config()) == OPENPI_DEFAULTS | OUR_DEFAULTS


@pytest.mark.parametrize(("pi05", "length"), [(False, 48), (True, 200)])
def test_prompt_length_and_state_input_follow_the_model(pi05, length):
    config = Pi0Config(pi05=pi05)
    assert (config.max_token_len, config.discrete_state_input) == (length, pi05)


@pytest.mark.parametrize("pi05", [False, True])
def test_prompt_length_and_state_input_may_be_set(pi05):
    config = Pi0Config(pi05=pi05, max_token_len=77, discrete_state_input=not pi05)
    assert (config.max_token_len, config.discrete_state_input) == (77, not pi05)


@pytest.mark.parametrize(("pi05", "length"), [(False, 12), (True, 11)])
def test_pi0_has_a_state_token(pi05, length):
    assert Pi0Config(pi05=pi05, action_horizon=11).suffix_length == length


@pytest.mark.parametrize("name", GEMMA_SIZES)
def test_gemma_variants(name):
    width, depth, mlp_dim, num_heads, num_kv_heads, head_dim, vocab_size = GEMMA_SIZES[name]
    assert spec.gemma_variant(name) == GemmaVariant(
        width=width,
        depth=depth,
        mlp_dim=mlp_dim,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=vocab_size,
    )


def test_these_are_all_variants():
    adapted = {f"{name}_lora" for name in LORA}
    assert spec.GEMMA_VARIANTS.keys() == GEMMA_SIZES.keys() | adapted


@pytest.mark.parametrize("name", LORA)
def test_variants_with_adapters(name):
    rank, scale = LORA[name]
    adapted = spec.gemma_variant(f"{name}_lora")
    assert dataclasses.replace(adapted, lora=None) == spec.gemma_variant(name)
    assert adapted.lora is not None
    assert (adapted.lora.rank, adapted.lora.scale) == (rank, scale)


def test_sizes_stand_for_a_variant():
    sizes = GemmaVariant(
        width=24, depth=2, mlp_dim=40, num_heads=3, num_kv_heads=1, head_dim=10, vocab_size=99
    )
    vision = spec.VisionVariant(width=30, depth=3, mlp_dim=44, num_heads=5, patch_size=56)
    config = Pi0Config(paligemma_variant=sizes, action_expert_variant=sizes, vision_variant=vision)
    assert (config.paligemma, config.action_expert, config.vision) == (sizes, sizes, vision)
    assert not config.has_lora


def test_the_vision_tower_is_so400m():
    tower = Pi0Config().vision
    assert tower == VisionVariant(width=1152, depth=27, mlp_dim=4304, num_heads=16, patch_size=14)
    assert (tower.head_dim, tower.num_patches) == (72, 256)


@pytest.mark.parametrize(("patch", "patches"), [(14, 256), (15, 196), (32, 49), (224, 1)])
def test_patches_are_whole(patch, patches):
    """As of a convolution without padding: what does not fill a patch is left out."""
    assert spec.vision_variant(f"tiny/{patch}").num_patches == patches


def test_no_axis_of_the_tiny_model_can_be_taken_for_another():
    config = tiny_config()
    prefix, suffix, tower = config.paligemma, config.action_expert, config.vision
    sizes = [prefix.width, suffix.width, tower.width]
    sizes += [prefix.mlp_dim, suffix.mlp_dim, tower.mlp_dim]
    sizes += [prefix.num_heads * prefix.head_dim, prefix.num_kv_heads * prefix.head_dim]
    sizes += [prefix.depth, tower.depth, tower.num_patches, tower.patch_size**2 * 3]
    sizes += [config.action_dim, config.action_horizon, prefix.num_heads, prefix.num_kv_heads]
    assert sorted(sizes) == sorted(set(sizes))


@pytest.mark.parametrize(
    ("vision", "settings", "budget"),
    [
        ("So400m/14", {}, None),
        ("So400m/14", {"token_prune_keep_tokens": 60}, 60),
        ("So400m/14", {"token_prune_keep_ratio": 0.25}, 64),
        ("So400m/14", {"token_prune_keep_ratio": 0.1}, 26),
        ("So400m/14", {"token_prune_keep_ratio": 0.001}, 1),
        ("So400m/14", {"token_prune_keep_ratio": 1}, 256),
        ("tiny/32", {"token_prune_keep_ratio": 0.25}, 13),
        ("tiny/32", {"token_prune_keep_ratio": 0.25, "token_prune_scope": "joint"}, 13),
        ("tiny/32", {"token_prune_keep_ratio": 3 / 49}, 3),
    ],
)
def test_the_budget_is_a_cameras(vision, settings, budget):
    assert Pi0Config(vision_variant=vision, **settings).keep_budget == budget


@pytest.mark.parametrize(
    ("settings", "prunes"),
    [
        ({}, False),
        ({"token_prune_keep_tokens": 60}, False),
        ({"token_pruning_enabled": True}, True),
        ({"token_pruning_enabled": True, "token_prune_keep_tokens": 255}, True),
        ({"token_pruning_enabled": True, "token_prune_keep_tokens": 256}, False),
        ({"token_pruning_enabled": True, "token_prune_keep_ratio": 0.99}, True),
        ({"token_pruning_enabled": True, "token_prune_keep_ratio": 0.999}, False),
        ({"token_pruning_enabled": True, "token_prune_scope": "joint"}, True),
    ],
)
def test_a_budget_of_all_patches_does_not_prune(settings, prunes):
    assert Pi0Config(**settings).prunes_at_inference is prunes


@pytest.mark.parametrize(("field", "settings"), REFUSED, ids=str)
def test_refused(field, settings):
    with pytest.raises(ValueError, match=rf"^{field}: .*expected .*got "):
        Pi0Config(**settings)


@pytest.mark.parametrize("settings", ACCEPTED, ids=str)
def test_accepted(settings):
    config = Pi0Config(**settings)
    assert {name: getattr(config, name) for name in settings} == settings


def test_an_error_shows_what_was_expected_and_what_was_found():
    expected = r"^token_prune_min_keep: expected at most the 15 patches .*, got 16$"
    with pytest.raises(ValueError, match=expected):
        Pi0Config(token_prune_min_keep=16, token_prune_keep_tokens=5, token_prune_scope="joint")


@pytest.mark.parametrize("name", ["depth", "num_heads", "num_kv_heads", "head_dim"])
def test_experts_that_cannot_attend_jointly_are_refused(monkeypatch, name):
    expert = dataclasses.replace(spec.GEMMA_VARIANTS["tiny_expert"], **{name: 7})
    monkeypatch.setitem(spec.GEMMA_VARIANTS, "tiny_expert", expert)
    with pytest.raises(ValueError, match=rf"^action_expert_variant: .*the {name} of 'tiny' .* 7$"):
        tiny_config()


def test_from_an_openpi_config():
    """Its fields are taken, what only openpi has is ignored, and what it lacks is the default."""
    theirs = types.SimpleNamespace(
        dtype="float32",
        paligemma_variant="dummy",
        action_expert_variant="dummy",
        action_dim=14,
        action_horizon=25,
        max_token_len=180,
        pi05=True,
        discrete_state_input=False,
        pytorch_compile_mode="max-autotune",
        model_type="pi05",
    )
    assert Pi0Config.from_fields(theirs) == Pi0Config(
        dtype="float32",
        paligemma_variant="dummy",
        action_expert_variant="dummy",
        action_dim=14,
        action_horizon=25,
        max_token_len=180,
        pi05=True,
        discrete_state_input=False,
    )


def test_from_an_object_with_few_fields():
    assert Pi0Config.from_fields(object()) == Pi0Config()
    unset = types.SimpleNamespace(dtype=None, max_token_len=None, pi05=True)
    assert Pi0Config.from_fields(unset) == Pi0Config(dtype="bfloat16", max_token_len=200, pi05=True)


def test_from_fields_of_a_config_is_that_config():
    config = tiny_config(token_pruning_enabled=True, token_prune_keep_ratio=0.3)
    assert Pi0Config.from_fields(config) == config


def test_from_fields_refuses_what_the_constructor_refuses():
    with pytest.raises(ValueError, match=r"^action_dim: expected an integer >= 1, got -1$"):
        Pi0Config.from_fields(types.SimpleNamespace(action_dim=-1))


def test_a_config_is_a_value():
    config = Pi0Config(pi05=True)
    assert {config: "found"}[Pi0Config(pi05=True, max_token_len=200)] == "found"
    assert config != Pi0Config(pi05=True, max_token_len=201)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.action_dim = 7
    with pytest.raises(TypeError):
        Pi0Config("float32")

"""Conversions to LeRobot's folder and back, with sizes that LeRobot would have."""

import json

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load, load_file

from convert import jax_to_pytorch, lerobot, pytorch_to_jax
from parity_tests.cases import TINY_ADAPTED, tiny_config
from parity_tests.convert.checkpoints import (
    STATS,
    jax_tensors,
    save_jax,
    torch_tensors,
)
from parity_tests.convert.test_conversion import assert_identical, orbax_arrays
from parity_tests.harness import BACKENDS
from pruner_spec.layout import OPENPI_TORCH

pytestmark = pytest.mark.skipif("jax" not in BACKENDS, reason="Orbax needs JAX")

CONFIGS = {
    "π0": tiny_config(pi05=False, action_horizon=50, max_token_len=None),
    "π0.5": tiny_config(action_horizon=50, max_token_len=None),
}
PI05 = CONFIGS["π0.5"]
configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
PRE = "policy_preprocessor_step_{}_normalizer_processor.safetensors"
POST = "policy_postprocessor_step_0_unnormalizer_processor.safetensors"


@pytest.fixture(autouse=True)
def _tiny_policies(monkeypatch):
    monkeypatch.setattr(lerobot, "VARIANTS", ("tiny", "tiny_expert"))
    monkeypatch.setattr(lerobot, "VISION_VARIANT", PI05.vision_variant)


def files_in(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@configs
def test_the_folder(config, tmp_path):
    """All that `policy_files` gives, the weights, and openpi's statistics for the way back."""
    source = save_jax(tmp_path / "jax", jax_tensors(config))
    jax_to_pytorch(source, tmp_path / "lerobot", precision="float32", format="lerobot")
    files = lerobot.policy_files(config, STATS, precision="float32")
    assert files.keys() == {
        "config.json",
        "policy_preprocessor.json",
        "policy_postprocessor.json",
        PRE.format(2 if config.pi05 else 5),
        POST,
    }
    for name, content in files.items():
        assert (tmp_path / "lerobot" / name).read_bytes() == content
    stats = "assets/trossen/norm_stats.json"
    assert files_in(tmp_path / "lerobot") == {*files, "model.safetensors", stats}
    assert json.loads((tmp_path / "lerobot" / stats).read_text()) == {"norm_stats": STATS}


@configs
def test_the_weights(config, tmp_path):
    """openpi's names behind "model.", the tied table under one of its two names."""
    source = save_jax(tmp_path / "jax", jax_tensors(config))
    jax_to_pytorch(source, tmp_path / "lerobot", precision="float32", format="lerobot")
    found = load_file(tmp_path / "lerobot/model.safetensors")
    unused = found.pop(f"model.{OPENPI_TORCH.unused[0]}")
    assert not unused.any()
    expected = {f"model.{name}": tensor for name, tensor in torch_tensors(config).items()}
    assert_identical(found, expected)
    with safe_open(tmp_path / "lerobot/model.safetensors", framework="numpy") as file:
        tied = {f"model.{alias}": f"model.{name}" for alias, name in OPENPI_TORCH.aliases.items()}
        assert file.metadata() == {"format": "pt"} | tied


@configs
@pytest.mark.parametrize("keeps_assets", [True, False])
def test_there_and_back(config, keeps_assets, tmp_path):
    """Also without what LeRobot doesn't know, and drops where it saves a policy again."""
    tensors = jax_tensors(config)
    source = save_jax(tmp_path / "jax", tensors)
    jax_to_pytorch(source, tmp_path / "lerobot", precision="float32", format="lerobot")
    if not keeps_assets:
        (tmp_path / "lerobot/assets/trossen/norm_stats.json").unlink()
    done = pytorch_to_jax(tmp_path / "lerobot", tmp_path / "back")
    assert_identical(orbax_arrays(tmp_path / "back"), tensors)
    asset = "trossen" if keeps_assets else "lerobot"
    [stats] = (tmp_path / "back/assets").rglob("*.json")
    assert stats == tmp_path / f"back/assets/{asset}/norm_stats.json"
    assert json.loads(stats.read_text())["norm_stats"] == STATS
    assert done.source.assumed == ()
    for name in ("action_horizon", "max_token_len", "pi05", "discrete_state_input"):
        assert getattr(done.target.config, name) == getattr(config, name)


def test_merged_adapters(tmp_path):
    source = save_jax(tmp_path / "jax", jax_tensors(tiny_config(**TINY_ADAPTED)))
    jax_to_pytorch(source, tmp_path / "lerobot", precision="float32", format="lerobot")
    jax_to_pytorch(source, tmp_path / "openpi", precision="float32")
    found, expected = (
        load_file(tmp_path / name / "model.safetensors") for name in ("lerobot", "openpi")
    )
    assert_identical(found, {f"model.{name}": tensor for name, tensor in expected.items()})


@pytest.fixture
def two_assets(tmp_path):
    """A checkpoint with statistics of two assets, one of which has a hub's name."""
    source = save_jax(tmp_path / "jax", jax_tensors(PI05))
    other = {key: {name: [9.0, 9.5] for name in stats} for key, stats in STATS.items()}
    (source / "assets/lab/arm").mkdir(parents=True)
    (source / "assets/lab/arm/norm_stats.json").write_text(json.dumps({"norm_stats": other}))
    return source


def test_several_assets_need_a_choice(two_assets, tmp_path):
    with pytest.raises(
        ValueError, match=r"asset_id: expected whose .* of \['lab/arm', 'trossen'\]"
    ):
        jax_to_pytorch(two_assets, tmp_path / "lerobot", format="lerobot")
    match = r"asset_id: expected one of \['lab/arm', 'trossen'\], got 'lab'"
    with pytest.raises(ValueError, match=match):
        jax_to_pytorch(two_assets, tmp_path / "lerobot", format="lerobot", asset_id="lab")
    assert not (tmp_path / "lerobot").exists()


@pytest.mark.parametrize(("asset", "mean"), [("lab/arm", [9.0, 9.5]), ("trossen", [0.1, -0.2])])
def test_the_chosen_assets_statistics(asset, mean, two_assets, tmp_path):
    jax_to_pytorch(two_assets, tmp_path / "lerobot", format="lerobot", asset_id=asset)
    for file in (PRE.format(2), POST):
        stats = load((tmp_path / "lerobot" / file).read_bytes())
        for feature in ("observation.state", "action"):
            np.testing.assert_array_equal(stats[f"{feature}.mean"], mean)
    assert {"assets/lab/arm/norm_stats.json", "assets/trossen/norm_stats.json"} < files_in(
        tmp_path / "lerobot"
    )


def test_without_statistics(tmp_path):
    """A policy that normalises nothing; and no file with statistics that nobody has."""
    source = save_jax(tmp_path / "jax", jax_tensors(PI05), stats=False)
    jax_to_pytorch(source, tmp_path / "lerobot", format="lerobot")
    assert files_in(tmp_path / "lerobot") == {
        "config.json",
        "policy_preprocessor.json",
        "policy_postprocessor.json",
        "model.safetensors",
    }
    with pytest.raises(ValueError, match=r"asset_id: expected one of \[\], got 'trossen'"):
        jax_to_pytorch(source, tmp_path / "other", format="lerobot", asset_id="trossen")
    pytorch_to_jax(tmp_path / "lerobot", tmp_path / "back")
    assert not (tmp_path / "back/assets").exists()


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (
            lambda folder: (folder / "policy_postprocessor.json").unlink(),
            r"expected statistics of \['actions', 'state'\], lacks \['actions'\]",
        ),
        (
            lambda folder: (folder / "policy_preprocessor.json").write_text('{"steps": 5}'),
            r"policy_preprocessor\.json: expected a pipeline's 'steps', got 5",
        ),
        (
            lambda folder: (folder / "policy_postprocessor.json").write_text("{"),
            r"policy_postprocessor\.json: expected a JSON object",
        ),
        (
            lambda folder: (folder / PRE.format(2)).write_bytes(b"no tensors"),
            r"normalizer_processor\.safetensors: expected a safetensors file",
        ),
        (
            lambda folder: (folder / PRE.format(2)).unlink(),
            r"expected statistics, got a path that does not exist: .*normalizer",
        ),
    ],
)
def test_damaged_policies(damage, match, tmp_path):
    source = save_jax(tmp_path / "jax", jax_tensors(PI05))
    jax_to_pytorch(source, tmp_path / "lerobot", precision="float32", format="lerobot")
    (tmp_path / "lerobot/assets/trossen/norm_stats.json").unlink()
    damage(tmp_path / "lerobot")
    with pytest.raises((ValueError, FileNotFoundError), match=match):
        pytorch_to_jax(tmp_path / "lerobot", tmp_path / "back")


def test_what_lerobot_cannot_have(tmp_path, monkeypatch):
    """Said before anything is written."""
    source = save_jax(tmp_path / "jax", jax_tensors(PI05))
    match = r"precision: expected what LeRobot's pi05 has, one of .*, got 'float16'"
    with pytest.raises(ValueError, match=match):
        jax_to_pytorch(source, tmp_path / "lerobot", format="lerobot", precision="float16")
    monkeypatch.setattr(lerobot, "VISION_VARIANT", "So400m/14")
    with pytest.raises(ValueError, match=r"vision_variant: expected what .*, got 'tiny/32'"):
        jax_to_pytorch(source, tmp_path / "lerobot", format="lerobot")
    assert not (tmp_path / "lerobot").exists()

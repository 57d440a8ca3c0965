"""Checkpoints and flags that are not what they should be: refused by name, leaving nothing."""

import dataclasses
import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from parity_tests.cases import TINY_ADAPTED, tiny_config
from parity_tests.convert.checkpoints import (
    jax_tensors,
    save_jax,
    save_orbax,
    save_torch,
    torch_tensors,
)
from parity_tests.convert.commands import converted, named_in, refused, run
from parity_tests.harness import BACKENDS
from pruner_spec import openpi_configs

pytestmark = pytest.mark.skipif("jax" not in BACKENDS, reason="Orbax needs JAX")

PI05, PI0 = tiny_config(), tiny_config(pi05=False)
ADAPTED = tiny_config(**TINY_ADAPTED)
BIAS, KERNEL = "action_out_proj/bias", "action_out_proj/kernel"
TORCH_BIAS, TORCH_KERNEL = "action_out_proj.bias", "action_out_proj.weight"
TABLE = "PaliGemma/llm/embedder/input_embedding"
LAYER = "paligemma_with_expert.gemma_expert.model.layers.2."
TOWER = "paligemma_with_expert.paligemma.model.vision_tower.vision_model.encoder.layers."


def without(tensors, *names):
    return {name: array for name, array in tensors.items() if name not in names}


def several(tensors, bias, kernel, extra):
    changed_ = without(tensors, bias)
    return changed_ | {kernel: tensors[kernel].T.copy(), extra: np.zeros(3, np.float32)}


JAX, TORCH_WEIGHTS = jax_tensors(PI05), torch_tensors(PI05)
OTHER_ARRAYS = {
    "jax, missing": ("jax", without(JAX, BIAS), [f"missing: {BIAS}: expected (7,), got none"]),
    "jax, extra": (
        "jax",
        JAX | {"action_out_proj/scale": JAX[BIAS]},
        ["extra: action_out_proj/scale: expected none, got (7,)"],
    ),
    "jax, misshapen": (
        "jax",
        JAX | {KERNEL: JAX[KERNEL].T},
        [f"shape: {KERNEL}: expected (56, 7), got (7, 56)"],
    ),
    "jax, several": (
        "jax",
        several(JAX, BIAS, KERNEL, "action_out_proj/scale"),
        [f"missing: {BIAS}: ", f"shape: {KERNEL}: ", "extra: action_out_proj/scale: "],
    ),
    "jax, a layer": (
        "jax",
        JAX | {"PaliGemma/llm/layers/mlp/linear": JAX["PaliGemma/llm/layers/mlp/linear"][:2]},
        ["shape: PaliGemma/llm/layers/mlp/linear: expected (3, 136, 72), got (2, 136, 72)"],
    ),
    "jax, integers": (
        "jax",
        JAX | {BIAS: np.arange(7, dtype=np.int32)},
        ["/checkpoint/params: expected weights", f"{BIAS}: expected floating-point", "got int32"],
    ),
    "jax, π0-FAST": (
        "jax",
        {name: array for name, array in JAX.items() if "_1" not in name and "PaliGemma" in name},
        ["expected the weights of a π0 or π0.5 model", "π0-FAST"],
    ),
    "jax, another model": (
        "jax",
        {"encoder/kernel": np.zeros((3, 2), np.float32)},
        ["expected the weights of a π0 or π0.5 model", "encoder/kernel"],
    ),
    "torch, missing": (
        "torch",
        without(TORCH_WEIGHTS, TORCH_BIAS),
        [f"missing: {TORCH_BIAS}: expected (7,), got none"],
    ),
    "torch, several": (
        "torch",
        several(TORCH_WEIGHTS, TORCH_BIAS, TORCH_KERNEL, "action_out_proj.scale"),
        [f"missing: {TORCH_BIAS}: ", f"shape: {TORCH_KERNEL}: ", "extra: action_out_proj.scale: "],
    ),
    "torch, a layer": (
        "torch",
        {name: array for name, array in TORCH_WEIGHTS.items() if not name.startswith(LAYER)},
        [
            f"missing: {LAYER}mlp.up_proj.weight: expected (104, 56), got none",
            f"missing: {LAYER}input_layernorm.dense.bias: expected (168,), got none",
        ],
    ),
    "torch, the tower's last layer": (
        "torch",
        {n: array for n, array in TORCH_WEIGHTS.items() if not n.startswith(f"{TOWER}4.")},
        ["vision_variant: expected sizes that are known by name", "'depth': 4"],
    ),
    "torch, a layer with no end of a number": (
        "torch",
        TORCH_WEIGHTS | {f"{TOWER}{10**15}.mlp.fc1.bias": np.zeros(88, np.float32)},
        [f"{TOWER}{10**15}.mlp.fc1.bias"],
    ),
    "torch, empty": (
        "torch",
        TORCH_WEIGHTS | {TORCH_BIAS: np.zeros(0, np.float32)},
        [f"expected weights, got arrays without numbers: ['{TORCH_BIAS}']"],
    ),
    "torch, integers": (
        "torch",
        TORCH_WEIGHTS | {TORCH_BIAS: np.arange(7, dtype=np.int8)},
        ["model.safetensors: expected weights", f"{TORCH_BIAS}: expected floating", "got int8"],
    ),
}


@pytest.mark.parametrize(("kind", "tensors", "fragments"), OTHER_ARRAYS.values(), ids=OTHER_ARRAYS)
def test_arrays_that_are_not_the_models(kind, tensors, fragments, tmp_path, output, capsys):
    save = {"jax": save_jax, "torch": save_torch}[kind]
    source = save(tmp_path / "checkpoint", tensors)
    named_in(refused(capsys, kind, source, output), fragments)


# Numbers that cannot be weights.


@pytest.mark.parametrize("kind", ["jax", "torch"])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_numbers_that_are_not_finite(kind, dtype, value, tmp_path, output, capsys):
    """In a table that is copied and in a kernel that is put in order; taken if that is asked."""
    names = {"jax": (TABLE, KERNEL), "torch": (TORCH_KERNEL, f"{LAYER}mlp.up_proj.weight")}[kind]
    for number, name in enumerate(names):
        tensors = {"jax": jax_tensors, "torch": torch_tensors}[kind](PI05, dtype)
        tensors[name] = tensors[name].copy()
        tensors[name][1, 2] = value
        source = tmp_path / f"checkpoint{number}"
        {"jax": save_jax, "torch": save_torch}[kind](source, tensors)
        flags = ("--precision", "float32")
        named_in(
            refused(capsys, kind, source, output, *flags),
            [": expected finite weights, got 1 that are infinite or NaN", "--allow_non_finite"],
        )
        converted(capsys, kind, source, output, *flags, "--allow_non_finite", "--overwrite")
        assert (output / ("model.safetensors" if kind == "jax" else "params")).exists()
        if kind == "jax":
            found = load_file(output / "model.safetensors").values()
            assert sum(int((~np.isfinite(tensor)).sum()) for tensor in found) == 1
        shutil.rmtree(output)


@pytest.mark.parametrize(
    ("kind", "precision", "value"),
    [
        ("jax", "float16", 1e5),
        ("jax", "bfloat16", np.finfo(np.float32).max),
        ("torch", "float16", -1e5),
        ("torch", "bfloat16", np.finfo(np.float32).max),
    ],
)
@pytest.mark.parametrize("flags", [(), ("--allow_non_finite",)], ids=["strict", "lenient"])
def test_numbers_that_the_precision_has_not(
    kind, precision, value, flags, tmp_path, output, capsys
):
    """Nor are they taken for the NaN beside them, which may be let through."""
    name = {"jax": TABLE, "torch": "paligemma_with_expert.paligemma.lm_head.weight"}[kind]
    tensors = {"jax": jax_tensors, "torch": torch_tensors}[kind](PI05)
    tensors[name] = tensors[name].copy()
    tensors[name][1, :2] = value, np.nan
    source = {"jax": save_jax, "torch": save_torch}[kind](tmp_path / "checkpoint", tensors)
    message = refused(capsys, kind, source, output, "--precision", precision, *flags)
    named_in(message, [f": expected numbers that {precision} can hold, got {abs(value):.4g}"])


def test_an_adapter_that_is_not_finite(tmp_path, output, capsys):
    tensors = jax_tensors(ADAPTED)
    name = "PaliGemma/llm/layers/attn/q_einsum/lora_b"
    tensors[name] = tensors[name].copy()
    tensors[name][1, 2, 3, 4] = np.nan
    source = save_jax(tmp_path / "checkpoint", tensors)
    for flags in ((), ("--lora", "keep")):
        named_in(
            refused(capsys, "jax", source, output, *flags),
            ["language_model.layers.1.self_attn.q_proj", "expected finite weights"],
        )
    flags = ("--lora", "keep", "--allow_non_finite")
    converted(capsys, "jax", source, output, *flags)
    converted(capsys, "torch", output, tmp_path / "back", "--allow_non_finite")


# Names of configs.


@pytest.mark.parametrize(
    ("name", "fragments"),
    [
        (
            "pi05_libreo",
            ["config_name: expected one of", "got 'pi05_libreo'. did you mean pi05_lib"],
        ),
        ("pi0_fast_libero", ["config_name: expected a config of π0 or π0.5", "of π0-FAST"]),
        ("pi05_libero", ["paligemma_variant: expected 'gemma_2b' as it was told, got 'tiny'"]),
        (
            "tiny_pi0",
            ["another model than was told", "pi05: expected False as it was told, got True"],
        ),
        ("tiny_lora", ["paligemma_variant: expected 'tiny_lora' as it was told, got 'tiny'"]),
    ],
)
def test_config_names(name, fragments, originals, output, capsys, monkeypatch):
    monkeypatch.setitem(openpi_configs.OPENPI_CONFIGS, "tiny_pi0", PI0)
    monkeypatch.setitem(openpi_configs.OPENPI_CONFIGS, "tiny_lora", ADAPTED)
    message = refused(capsys, "jax", originals / "jax", output, "--config_name", name)
    named_in(message, fragments)


def test_a_config_name_and_a_config_that_contradict(copy, output, capsys, monkeypatch):
    other = dataclasses.replace(PI05, action_horizon=5)
    monkeypatch.setitem(openpi_configs.OPENPI_CONFIGS, "tiny", other)
    source = copy("torch")
    (source / "config.json").write_text(json.dumps({"action_horizon": 6}))
    message = refused(capsys, "torch", source, output, "--config_name", "tiny")
    named_in(
        message,
        ["config_name: 'tiny' is not the config beside", "action_horizon: expected 5, got 6"],
    )


# Which checkpoint, and which flags.


def test_nothing_there(tmp_path, output, capsys):
    for kind in ("jax", "torch"):
        message = refused(capsys, kind, tmp_path / "no_such_folder", output)
        named_in(message, ["expected a checkpoint", "does not exist", "no_such_folder"])


def test_no_checkpoint(tmp_path, output, capsys):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/weights.pt").write_text("no weights")
    for kind in ("jax", "torch"):
        message = refused(capsys, kind, tmp_path / "folder", output)
        named_in(message, ["folder: expected one checkpoint: model.safetensors", "got []"])


def test_two_checkpoints(copy, output, capsys):
    source = copy("jax")
    save_torch(source, TORCH_WEIGHTS, stats=False)
    for kind in ("jax", "torch"):
        message = refused(capsys, kind, source, output)
        named_in(message, ["expected one checkpoint", "/jax/model.safetensors", "/jax/params"])


def test_the_other_direction(originals, output, capsys):
    message = refused(capsys, "jax", originals / "torch", output)
    named_in(message, ["checkpoint_dir: expected an Orbax checkpoint, got", "model.safetensors"])
    assert "which convert_pytorch_model_to_jax takes" in message
    message = refused(capsys, "torch", originals / "jax", output)
    named_in(message, ["checkpoint_dir: expected a safetensors checkpoint, got", "/jax/params"])
    assert "which convert_jax_model_to_pytorch takes" in message


FLAGS = {
    "a size in words": (
        ("--max_shard_size", "big"),
        ["max_shard_size: expected a size such as '5GB', got 'big'"],
    ),
    "a size of nothing": (
        ("--max_shard_size", "0"),
        ["max_shard_size: expected a size such as '5GB', got '0'"],
    ),
    "a scale without adapters": (
        ("--lora_scale", "2"),
        ["lora_scale: expected none for a model without adapters, got 2.0"],
    ),
    "a scale that is none": (
        ("--lora_scale", "nan"),
        ["lora_scale: expected a finite number, got nan"],
    ),
    "LeRobot, other sizes": (
        ("--format", "lerobot"),
        ["paligemma_variant: expected what LeRobot's pi05 has", "'gemma_2b'", "got 'tiny'"],
    ),
    "LeRobot, shards": (
        ("--format", "lerobot", "--max_shard_size", "1GB"),
        ["max_shard_size: expected none with the format 'lerobot'", "got '1GB'"],
    ),
}


@pytest.mark.parametrize(("flags", "fragments"), FLAGS.values(), ids=FLAGS)
def test_flags(flags, fragments, originals, output, capsys):
    named_in(refused(capsys, "jax", originals / "jax", output, *flags), fragments)


def test_lerobot_keeps_no_adapters(originals, output, capsys):
    flags = ("--format", "lerobot", "--lora", "keep")
    message = refused(capsys, "jax", originals / "jax adapted", output, *flags)
    named_in(message, ["lora: expected 'merge' with the format 'lerobot', got 'keep'"])


def test_flags_that_are_no_choice(originals, output, capsys):
    arguments = ("--checkpoint_dir", originals / "jax", "--output_path", output)
    for flags in (("--precision", "int8"), ("--format", "onnx"), ("--no_such_flag",)):
        status, _, error = run(capsys, "jax", *arguments, *flags)
        assert status == 2
        assert flags[-1] in error
    assert not output.exists()


def test_an_orbax_checkpoint_of_nothing(tmp_path, output, capsys):
    save_orbax(tmp_path / "params", {"params": {"step": np.zeros((), np.float32)}})
    message = refused(capsys, "jax", tmp_path, output)
    named_in(message, ["expected the weights of a π0 or π0.5 model, got 1 arrays", "step"])

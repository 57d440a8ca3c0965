"""The surface of the two commands: their flags, their help, and what they print."""

import importlib.metadata
import os
import pathlib
import re
import subprocess
import sys
import tomllib

import numpy as np
import pytest

from convert import cli
from parity_tests.cases import TINY_ADAPTED, tiny_config
from parity_tests.convert.checkpoints import jax_tensors, save_jax, save_torch, torch_tensors
from parity_tests.convert.commands import COMMANDS, contents, converted, run
from parity_tests.harness import BACKENDS
from pruner_spec.layout import OPENPI_JAX, OPENPI_TORCH

ROOT = pathlib.Path(__file__).parents[2]
PI05 = tiny_config()
needs_jax = pytest.mark.skipif("jax" not in BACKENDS, reason="Orbax needs JAX")
commands = pytest.mark.parametrize("kind", COMMANDS)

# A flag, and what it takes: its choices, or its default. Scripts that call the commands rely on it.
BOTH = [
    ("checkpoint_dir", "required"),
    ("output_path", "default: None"),
    ("config_name", "default: None"),
    ("verify", "default: False"),
    ("inspect_only", "default: False"),
    ("allow_non_finite", "default: False"),
    ("overwrite", "default: False"),
]
FLAGS = {
    "jax": [
        *BOTH,
        ("precision", "default: bfloat16"),
        ("format", "default: openpi"),
        ("lora", "default: merge"),
        ("lora_scale", "default: None"),
        ("max_shard_size", "default: None"),
        ("omit_unused_lm_head", "default: False"),
        ("asset_id", "default: None"),
    ],
    "torch": [*BOTH, ("precision", "default: float32"), ("lora", "default: keep")],
}
CHOICES = {
    "precision": "{bfloat16,float32,float16}",
    "format": "{openpi,lerobot}",
    "lora": "{merge,keep}",
}


def help_of(capsys, kind, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    status, printed, _ = run(capsys, kind, "--help")
    assert status == 0
    return printed


@commands
def test_flags(kind, capsys, monkeypatch):
    text = help_of(capsys, kind, monkeypatch)
    lines = [line.strip("│| ") for line in text.splitlines()]  # without the box around them
    _, *entries = re.split(r"\n--(?=\w)", "\n".join(lines))
    found = {}
    for entry in entries:
        name, takes, default = re.search(
            r"^(\w+)(?:, --no_\w+)?(.*?)\n.*\((required|default: \w+)\)", entry, re.DOTALL
        ).groups()
        found[name] = default
        assert takes.strip() == CHOICES.get(name, takes.strip())
    assert found == dict(FLAGS[kind])


@commands
def test_help_says_what_it_does(kind, capsys, monkeypatch):
    text = help_of(capsys, kind, monkeypatch)
    assert text.startswith(f"usage: {COMMANDS[kind].__name__} ")
    purpose = {"jax": "Convert an openpi JAX checkpoint to safetensors", "torch": "to an Orbax"}
    assert purpose[kind] in text


HELP = """
import sys
from convert import cli
try:
    getattr(cli, sys.argv[1])(["--help"])
finally:
    assert not {"jax", "torch", "flax", "orbax"} & sys.modules.keys()
"""


@commands
def test_help_waits_for_no_framework(kind):
    command = [sys.executable, "-c", HELP, COMMANDS[kind].__name__]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "checkpoint_dir" in done.stdout


@commands
def test_a_checkpoint_is_needed(kind, capsys):
    status, _, error = run(capsys, kind)
    assert status == 2
    assert "--checkpoint_dir" in error


@commands
@needs_jax
def test_flags_with_hyphens(kind, tmp_path, capsys):
    """As other tools have them."""
    source = saved(kind, PI05, tmp_path / "source")
    status, printed, _ = run(capsys, kind, "--checkpoint-dir", source, "--inspect-only")
    assert (status, printed) == run(capsys, kind, "--checkpoint_dir", source, "--inspect_only")[:2]
    assert (status, len(printed.splitlines()) > 50) == (0, True)


def saved(kind, config, folder, **options):
    if kind == "jax":
        return save_jax(folder, jax_tensors(config, **options))
    told = {"paligemma_variant": "tiny", "action_expert_variant": "tiny_expert"}
    return save_torch(folder, torch_tensors(config, **options), config=told)


SUMMARY = """\
π0.5 in openpi's {layout} layout
  paligemma_variant      tiny
  action_expert_variant  tiny_expert
  vision_variant         tiny/32
  action_dim             7
  action_horizon         50 (assumed: weights do not say it)
  max_token_len          200 (assumed: weights do not say it)
  discrete_state_input   True (assumed: weights do not say it)
  arrays                 {arrays}: 656,319 numbers, 0.001 GB
  dtypes                 float16
  norm_stats             trossen/norm_stats.json
"""


@commands
@needs_jax
def test_inspection(kind, tmp_path, capsys):
    """Every array by name, shape and dtype; what it is; and nothing is written."""
    source = saved(kind, PI05, tmp_path / "source", dtype=np.float16)
    before = contents(tmp_path)
    status, printed, _ = run(capsys, kind, "--checkpoint_dir", source, "--inspect_only")
    assert (status, contents(tmp_path)) == (0, before)
    shapes = {"jax": OPENPI_JAX, "torch": OPENPI_TORCH}[kind].shapes(PI05)
    for name, shape in shapes.items():
        assert f" {name.replace('.', '/').split('/')[-1]} {list(shape)} float16\n" in printed
    assert len(re.findall(r" float16\n", printed)) == len(shapes) + 1  # that of the summary
    layout = {"jax": "JAX", "torch": "PyTorch"}[kind]
    assert printed.endswith(SUMMARY.format(layout=layout, arrays=len(shapes)))


TREE = """\
├── action_in_proj 448 numbers, 0.000 GB
│   ├── bias [56] float32
│   └── kernel [7, 56] float32
"""


@needs_jax
def test_inspection_shows_a_tree(tmp_path, capsys):
    saved("jax", PI05, tmp_path / "source").rename(tmp_path / "a [bold]folder")
    source = tmp_path / "a [bold]folder"
    _, printed, _ = run(capsys, "jax", "--checkpoint_dir", source, "--inspect_only")
    assert printed.replace("\n", "").startswith(f"{source}/params├── PaliGemma 649,")
    assert TREE in printed
    assert printed.endswith("norm_stats             trossen/norm_stats.json\n")


@needs_jax
def test_inspection_tells_of_adapters(tmp_path, capsys):
    source = save_jax(tmp_path / "source", jax_tensors(tiny_config(pi05=False, **TINY_ADAPTED)))
    _, printed, _ = run(capsys, "jax", "--checkpoint_dir", source, "--inspect_only")
    assert "\nπ0 with LoRA adapters in openpi's JAX layout\n" in printed
    assert "  paligemma_variant      tiny_lora\n" in printed


@needs_jax
def test_what_a_conversion_prints(tmp_path, capsys):
    source = save_jax(tmp_path / "jax", jax_tensors(tiny_config(**TINY_ADAPTED)))
    printed = converted(capsys, "jax", source, tmp_path / "torch", "--precision", "float32")
    assert printed == (
        f"π0.5 with LoRA adapters, merged: {source}/params -> {tmp_path}/torch\n"
        "0.00 GB in float32, openpi's format\n"
        "statistics: trossen/norm_stats.json\n"
        "assumed: action_horizon 50; weights do not say it, --config_name does\n"
        "assumed: max_token_len 200; weights do not say it, --config_name does\n"
        "assumed: discrete_state_input True; weights do not say it, --config_name does\n"
    )
    printed = converted(capsys, "torch", tmp_path / "torch", tmp_path / "back")
    assert printed.startswith(f"π0.5: {tmp_path}/torch/model.safetensors -> {tmp_path}/back\n")
    assert "0.00 GB in float32, orbax's format\n" in printed


@needs_jax
def test_a_terminal_without_letters(tmp_path):
    """A π that cannot be printed must not make a failure of a conversion that is done."""
    source = save_jax(tmp_path / "jax", jax_tensors(PI05))
    script = "import sys; from convert import cli; cli.convert_jax_model_to_pytorch(sys.argv[1:])"
    flags = ["--checkpoint_dir", str(source), "--output_path", str(tmp_path / "torch")]
    done = subprocess.run(
        [sys.executable, "-c", script, *flags],
        cwd=ROOT,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(b"?0.5: ")


SCRIPTS = {
    "convert_jax_model_to_pytorch": "convert.cli:convert_jax_model_to_pytorch",
    "convert_pytorch_model_to_jax": "convert.cli:convert_pytorch_model_to_jax",
}


def test_the_commands_are_installed():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts.items() >= SCRIPTS.items()


def test_the_installed_commands():
    found = importlib.metadata.entry_points(group="console_scripts")
    installed = {entry.name: entry for entry in found if entry.name in SCRIPTS}
    if not installed:
        pytest.skip("not installed")
    assert {name: entry.value for name, entry in installed.items()} == SCRIPTS
    assert [installed[name].load() for name in SCRIPTS] == list(COMMANDS.values())


def test_what_is_not_recognised_is_shown_all_the_same(capsys, tmp_path):
    tensors = torch_tensors(tiny_config())
    del tensors["time_mlp_in.bias"]
    folder = save_torch(tmp_path / "torch", tensors)
    with pytest.raises(SystemExit) as ended:
        cli.convert_pytorch_model_to_jax(["--checkpoint_dir", str(folder), "--inspect_only"])
    assert ended.value.code == cli.BAD_INPUT
    said = capsys.readouterr()
    assert "weight [7, 56] float32" in said.out
    assert "missing: time_mlp_in.bias" in said.err

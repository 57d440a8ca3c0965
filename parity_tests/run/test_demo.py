"""`pruner demo` from the command line to its files, and that it says plainly what is wrong."""

import contextlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from parity_tests.harness import BACKENDS
from parity_tests.tolerances import tolerance
from pruner_run import backend, cli, demo, picture
from pruner_run.assets import DEMO_EPISODE, DEMO_TOKENIZER
from pruner_run.recording import read_recording
from pruner_run.tokenizer import PromptTokenizer
from pruner_spec.config import CAMERAS

BOTH = sorted(BACKENDS) == ["jax", "torch"]
needs_both = pytest.mark.skipif(not BOTH, reason="compares the two backends")


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """A tiny model's threads wait for each other: on busy cores, for minutes."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with contextlib.ExitStack() as stack:
        if "torch" in BACKENDS:
            import torch

            stack.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(1)
        yield


def run_demo(output: Path, *arguments: str) -> dict[str, Any]:
    """The numbers that the demo wrote."""
    cli.main(["demo", "--output", str(output), *arguments])
    return json.loads((output / "demo.json").read_text())


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)


@needs_both
@pytest.mark.slow
def test_both_backends_agree(tmp_path, capsys):
    numbers = run_demo(tmp_path / "new" / "folder", "--frames", "3", "--num_steps", "4")
    assert numbers["frames"] == [0, 100, 199]
    assert numbers["prefix_tokens"] == 800
    assert numbers["options"]["num_steps"] == 4
    jax, torch = numbers["backends"]["jax"], numbers["backends"]["torch"]
    assert jax["kept"] == torch["kept"]
    totals = np.sum([jax["kept"][camera] for camera in CAMERAS], axis=0)
    assert jax["pruned_prefix_tokens"] == (totals + 32).tolist()
    agreement = numbers["agreement"]
    assert agreement["patches"] == 3 * 3 * 256
    assert agreement["differing_patches"] == agreement["differing_frames"] == 0
    assert agreement["closest_margin"] > 0
    allowed = tolerance("sampled actions", "float32") * agreement["largest_action"]
    assert max(agreement["actions_difference"], agreement["unpruned_actions_difference"]) < allowed
    assert 0 < jax["pruning_error"] < 1
    said = capsys.readouterr().out
    for part in ("JAX, ", "PyTorch, ", *CAMERAS, "agreement of the backends", "random"):
        assert part in said


@pytest.mark.parametrize("name", BACKENDS)
def test_one_backend(tmp_path, capsys, name):
    arguments = ("--backend", name, "--frames", "2", "--num_steps", "1")
    numbers = run_demo(tmp_path, *arguments)
    assert list(numbers["backends"]) == [name]
    assert numbers["agreement"] is None
    assert "agreement" not in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo.json", "demo.png"]
    with Image.open(tmp_path / "demo.png") as image:
        assert image.width > 2 * picture.CELL
        assert image.height > len(CAMERAS) * picture.CELL


@pytest.mark.parametrize(
    ("arguments", "total"),
    [
        (("--keep_tokens", "16"), 3 * 16),
        (("--keep_ratio", "0.25"), 3 * 64),
        (("--keep_tokens", "16", "--scope", "joint"), 3 * 16),
        (("--keep_tokens", "256"), 3 * 256),
    ],
)
def test_budgets(tmp_path, arguments, total):
    arguments = (*arguments, "--backend", sorted(BACKENDS)[-1], "--frames", "1", "--num_steps", "1")
    [numbers] = run_demo(tmp_path, *arguments)["backends"].values()
    assert numbers["pruned_prefix_tokens"] == [total + 32]
    if "joint" not in arguments:
        assert numbers["kept"] == {camera: [total // 3] for camera in CAMERAS}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--frames", "0"], "frames: expected 1..200, got 0"),
        (["demo", "--frames", "201"], "frames: expected 1..200, got 201"),
        (["demo", "--num_steps", "0"], "num_steps: expected an integer >= 1, got 0"),
        (["demo", "--seed", "-1"], "seed: expected 0 <= seed < 2**63, got -1"),
        (["demo", "--keep_tokens", "257"], "token_prune_keep_tokens: expected at most the 256"),
        (["demo", "--keep_ratio", "1.5"], "token_prune_keep_ratio: expected 0 < ratio <= 1"),
        (["demo", "--keep_ratio", "0.5", "--keep_tokens", "9"], "expected at most one budget"),
        (["demo", "--output", str(Path(__file__))], "File exists"),
        (["demo", "--output", str(Path(__file__) / "below")], "Not a directory"),
    ],
)
def test_bad_values_are_one_line(capsys, arguments, message):
    assert status_of(arguments) == cli.BAD_INPUT
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("pruner demo: error: ")
    assert message in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], f"Expected one of {{{', '.join(cli.COMMANDS)}}}"),
        (["deom"], "Unrecognized options: deom"),
        (["demo", "--frmaes", "3"], "Unrecognized options: --frmaes"),
        (["demo", "--frames", "many"], "Error parsing --frames"),
        (["demo", "--backend", "tensorflow"], "invalid choice 'tensorflow'"),
    ],
)
def test_unreadable_command_lines(capsys, arguments, message):
    assert status_of(arguments) == cli.BAD_INPUT
    said = capsys.readouterr().err
    assert message in " ".join(said.replace("│", " ").split())  # as it is without its box
    assert "Traceback" not in said


def status_of(arguments: list[str]) -> Any:
    with pytest.raises(SystemExit) as exit_info:
        cli.main(arguments)
    return exit_info.value.code


def test_help_imports_no_framework():
    done = run_python(
        "import sys\n"
        "from pruner_run import cli\n"
        "for arguments in (['--help'], ['demo', '--help']):\n"
        "    try: cli.main(arguments)\n"
        "    except SystemExit as end: assert end.code == 0\n"
        "    loaded = {'jax', 'flax', 'torch', 'pruner_jax', 'pruner_torch'} & set(sys.modules)\n"
        "    assert not loaded, loaded\n"
        "    assert ('pruner_run.demo' in sys.modules) == ('demo' in arguments)\n"
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"demo +Prune a recorded episode", done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("name", BACKENDS)
def test_runs_without_the_other_framework(tmp_path, name):
    other = {"jax": "torch", "torch": "jax"}[name]
    arguments = ["demo", "--frames", "1", "--num_steps", "1", "--output", str(tmp_path)]
    done = run_python(
        "from importlib.machinery import PathFinder\n"
        "find = PathFinder.find_spec\n"
        "PathFinder.find_spec = lambda name, *rest: (\n"
        f"    None if name.split('.')[0] == {other!r} else find(name, *rest))\n"
        f"from pruner_run import cli; cli.main({arguments})"
    )
    assert done.returncode == 0, done.stderr
    assert f"Missing: {other}; pip install 'pi05-pruner[{other}]'" in done.stdout
    assert list(json.loads((tmp_path / "demo.json").read_text())["backends"]) == [name]


@pytest.mark.parametrize("choice", ["jax", "torch", "both", None])
def test_a_missing_framework_is_named(monkeypatch, capsys, choice):
    monkeypatch.setattr(backend, "missing", lambda: ["jax", "torch"])
    wanted = ["jax", "torch"] if choice in ("both", None) else [choice]
    assert status_of(["demo", *(["--backend", choice] if choice else [])]) == cli.BAD_INPUT
    [line] = capsys.readouterr().err.splitlines()
    assert f"pip install 'pi05-pruner[{','.join(wanted)}]'" in line


def test_choosing_a_backend(monkeypatch):
    monkeypatch.setattr(backend, "missing", lambda: ["torch"])
    assert backend.choose(None) == backend.choose("jax") == ["jax"]
    monkeypatch.setattr(backend, "missing", list)
    assert backend.choose(None) == backend.choose("both") == ["jax", "torch"]


def test_what_the_model_sees_of_the_recording():
    config = demo.demo_config(demo.Options())
    tokenizer = PromptTokenizer(DEMO_TOKENIZER, max_len=config.max_token_len)
    recording = read_recording(DEMO_EPISODE, tokenizer, config, count=40)
    observation = recording.observation
    assert recording.frames == np.linspace(0, 199, 40).round().tolist()
    assert observation.tokenized_prompt_mask.sum(axis=1).tolist() == [14] * 40
    state = observation.state
    assert state.shape == (40, 32)
    assert not state[:, 14:].any()
    moving = np.ptp(state, axis=0) > 0
    assert (np.abs(state[:, moving]).max(axis=0) > 0.9).all()
    assert ((np.abs(state[:, moving]) <= 1.0).mean(axis=0) > 0.9).all()
    assert read_recording(DEMO_EPISODE, tokenizer, config, count=1).frames == [100]

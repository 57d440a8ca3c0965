"""`pruner convert`, and what `--verify` compares."""

import dataclasses

import numpy as np
import pytest
from rich.console import Console

from convert import cli, jax_to_pytorch
from parity_tests.cases import TINY_ADAPTED, tiny_config
from parity_tests.convert.checkpoints import jax_tensors, save_jax, save_torch, torch_tensors
from parity_tests.harness import BACKENDS
from pruner_run import convert as command
from pruner_run import verification
from pruner_run.verification import Evaluation, compare

CONFIG = tiny_config(dtype="float32")
ADAPTED = tiny_config(dtype="float32", **TINY_ADAPTED)
BOUND = verification.TOLERANCE

with_jax = pytest.mark.skipif("jax" not in BACKENDS, reason="Orbax needs JAX")
with_both = pytest.mark.skipif(len(BACKENDS) < 2, reason="compares the two backends")


def evaluation(shift=0.0, kept=None, margin=1.0):
    """Two samples' values around 1."""
    values = np.ones((2, 3)) + shift
    kept = np.zeros((2, 3, 4), dtype=bool) if kept is None else kept
    names = ("loss", "actions", "loss, pruned", "actions, pruned")
    return Evaluation(dict.fromkeys(names, values), kept, np.full(2, margin))


def test_within_tolerance_is_the_same():
    result = compare(evaluation(), evaluation(shift=BOUND / 2), BOUND)
    assert result.is_the_same
    assert all(0 < difference < BOUND for difference in result.differences.values())


@pytest.mark.parametrize("shift", [2 * BOUND, np.nan])
def test_beyond_tolerance_is_not(shift):
    assert not compare(evaluation(), evaluation(shift=shift), BOUND).is_the_same


@pytest.mark.parametrize(("margin", "same"), [(verification.NEAR_TIE / 2, True), (0.5, False)])
def test_other_patches_are_forgiven_where_scores_tie(margin, same):
    kept = np.zeros((2, 3, 4), dtype=bool)
    kept[1, 0, 0] = True
    shifted = np.array([[0.0], [1.0]])  # in the sample that kept others
    result = compare(evaluation(), evaluation(0.0, kept, margin), BOUND)
    assert (result.near_ties, result.other_selections) == (int(same), int(not same))
    assert result.is_the_same is same
    moved = compare(evaluation(), evaluation(shifted, kept, margin), BOUND)
    assert moved.differences["actions"] > BOUND
    assert moved.differences["actions, pruned"] == 0


@with_jax
def test_the_checkpoint_says_which_way(tmp_path):
    jax = save_jax(tmp_path / "jax", jax_tensors(CONFIG))
    torch = save_torch(tmp_path / "torch", torch_tensors(CONFIG))
    there = command.direction(command.Options(checkpoint_dir=str(jax), precision="float32"))
    back = command.direction(command.Options(checkpoint_dir=str(torch), overwrite=True))
    assert there == cli.JaxToPytorch(checkpoint_dir=str(jax), precision="float32")
    assert back == cli.PytorchToJax(checkpoint_dir=str(torch), overwrite=True)
    with pytest.raises(ValueError, match="format, max_shard_size: expected only of a JAX"):
        command.direction(
            command.Options(checkpoint_dir=str(torch), format="lerobot", max_shard_size="1GB")
        )


def test_the_options_are_the_commands():
    ours, *theirs = (
        {field.name for field in dataclasses.fields(options)}
        for options in (command.Options, cli.JaxToPytorch, cli.PytorchToJax)
    )
    assert ours == theirs[0] | theirs[1]


@pytest.mark.slow
@with_both
def test_merged_adapters_act_as_the_adapted_model(tmp_path, capsys):
    """The whole command; then a result in which two heads are swapped."""
    source = save_jax(tmp_path / "jax", jax_tensors(ADAPTED))
    arguments = ["--checkpoint_dir", str(source), "--output_path", str(tmp_path / "torch")]
    with pytest.raises(SystemExit) as ended:
        cli.convert_jax_model_to_pytorch([*arguments, "--precision", "float32", "--verify"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert "π0.5 with LoRA adapters, merged" in printed
    assert printed.count(" ok ") == 4

    done = jax_to_pytorch(source, tmp_path / "torch", precision="float32", overwrite=True)
    swap_heads(tmp_path / "torch")
    result = verification.verify(done, Console(quiet=True))
    assert not result.is_the_same
    assert result.differences["actions"] > BOUND


def swap_heads(folder):
    """Of one layer's output projection, as a wrong transposition would."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    name = "paligemma_with_expert.gemma_expert.model.layers.1.self_attn.o_proj.weight"
    heads = tensors[name].reshape(56, 6, 20)
    tensors[name] = np.ascontiguousarray(heads[:, [1, 0, 2, 3, 4, 5]].reshape(56, 120))
    save_file(tensors, folder / "model.safetensors")

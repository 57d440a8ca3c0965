"""`pruner plan`, `pruner configs` and `pruner compare`."""

import dataclasses
import json

import pytest

from pruner_run import compare_runs, configs, list_configs, plan
from pruner_run.configs import CONFIGS
from pruner_spec.config import Pi0Config


def options(**changes):
    return plan.Options(**({"config_name": "pi05_libero"} | changes))


def test_operations_are_those_that_were_counted():
    """13.9 TFLOP a training sample of full size, three times the forward pass."""
    assert round(3 * plan.forward_flops(Pi0Config(pi05=True)) / 1e12) == 14


def test_the_state_of_a_full_fine_tuning():
    found = plan.plan(configs.get("pi05_libero"), options())
    assert found.parameters == found.gradients == found.average == found.moments / 2
    assert found.parameters == 4 * 3_353_433_872
    shared = plan.plan(configs.get("pi05_libero"), options(devices=16))
    assert shared.state == found.state / 16
    assert shared.floor == found.floor / 16


def test_activations_are_those_that_were_measured():
    """Batch 32 with products kept peaked at 99.8 GiB in PyTorch and 109.3 in JAX, without average.

    See docs/training.md; what is counted has to lie near.
    """
    config = dataclasses.replace(configs.get("pi05_pick_place_pytorch"), ema_decay=None)
    found = plan.plan(config, options(batch_size=32))
    assert 95 < (found.state + found.activations["products"]) / 2**30 < 120
    assert found.activations["full"] < found.activations["products"] < found.activations["none"]


def test_adapters_need_little_state():
    found = plan.plan(configs.get("pi0_libero_low_mem_finetune"), options())
    assert found.average == 0
    assert 0 < found.moments < found.parameters / 2


@pytest.mark.parametrize(
    ("memory", "verdict"),
    [
        (2000, "Fits with --gradient_checkpointing none."),
        (640, "Fits with --gradient_checkpointing products."),
        (160, "Fits with --gradient_checkpointing full."),
        (71, "--accumulation"),
        (60, "the state alone is larger"),
    ],
)
def test_verdicts(memory, verdict):
    found = plan.plan(configs.get("pi05_libero"), options())
    assert verdict in plan.verdict(found, memory * 1e9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"devices": 6, "fsdp_devices": 4}, "fsdp_devices: expected a divisor of 6, got 4"),
        ({"devices": 3}, "batch_size: expected a multiple of 3, got 256"),
        ({"config_name": "pi05_liberro"}, r"got 'pi05_liberro'; did you mean pi05_libero"),
    ],
)
def test_what_does_not_go_together(changes, message):
    with pytest.raises(ValueError, match=message):
        plan.run(options(**changes))


def test_configs_are_listed(capsys):
    list_configs.run(list_configs.Options())
    printed = capsys.readouterr().out
    assert all(name in printed for name in CONFIGS)
    assert "π0.5, pruned  torch       64  30,000  physical-intelligence/libero" in printed


def test_the_configs_that_users_know():
    libero, lightvla = configs.get("pi05_libero"), configs.get("pi05_libero_pytorch_lightvla")
    assert (libero.batch_size, libero.backend) == (256, "jax")
    assert (lightvla.batch_size, lightvla.backend) == (64, "torch")
    for config in (libero, lightvla):
        schedule = config.lr_schedule
        assert (schedule.warmup_steps, schedule.peak_lr) == (10_000, 5e-5)
        assert (schedule.decay_steps, schedule.decay_lr) == (1_000_000, 5e-5)
        assert (config.num_train_steps, config.model.action_horizon) == (30_000, 10)
        assert not config.model.discrete_state_input
    assert lightvla.model.token_pruning_enabled
    assert configs.get("pi05_pick_place_pytorch_pruning").data.default_prompt


def test_the_command_line_changes_a_config():
    arguments = ["pi05_libero_pytorch_lightvla", "--exp_name", "run1", "--backend", "jax"]
    arguments += ["--model.token_pruning_enabled", "True", "--batch_size", "48", "--resume"]
    arguments += ["--model.paligemma_variant", "gemma_2b_lora", "--lr_schedule.peak_lr", "1e-3"]
    config = configs.parse(arguments, "pruner train")
    assert (config.exp_name, config.backend, config.batch_size) == ("run1", "jax", 48)
    assert config.resume
    assert config.model.paligemma_variant == "gemma_2b_lora"
    assert config.lr_schedule.peak_lr == 1e-3
    assert config.settings.freeze
    with pytest.raises(ValueError, match="did you mean pi05_libero"):
        configs.parse(["pi05_liber"], "pruner train")


def save_run(folder, losses):
    folder.mkdir()
    same = {"prune/noisy_kept_tokens_mean": 4.0}
    lines = [json.dumps({"step": step, "loss": loss} | same) for step, loss in losses.items()]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_runs_are_compared_at_their_common_steps(tmp_path, capsys):
    first = save_run(tmp_path / "a", dict.fromkeys(range(10), 1.0))
    second = save_run(tmp_path / "b", {step: 1.0 if step < 6 else 2.0 for step in range(2, 12)})
    given = compare_runs.Options(runs=(first, second), output=tmp_path / "out/curves.png")
    compare_runs.run(given)
    printed = capsys.readouterr().out
    assert "8 steps in common, 2 to 9" in printed
    assert "5.0e-01" in printed
    assert "prune/noisy_kept_tokens_mean  0.0e+00" in printed  # in full, on a narrow screen too
    assert (tmp_path / "out/curves.png").stat().st_size > 1000
    one, two = compare_runs.curves(first, second)
    differences = compare_runs.relative_differences(one.values["loss"], two.values["loss"])
    assert one.steps[compare_runs.parting(differences, 0.1)] == 6
    assert compare_runs.parting(differences, 0.9) is None


def test_runs_that_cannot_be_compared(tmp_path):
    first = save_run(tmp_path / "a", {0: 1.0})
    second = save_run(tmp_path / "b", {1: 1.0})
    with pytest.raises(ValueError, match="expected steps in common"):
        compare_runs.curves(first, second)
    with pytest.raises(FileNotFoundError, match=r"nothing/metrics\.jsonl|nothing: expected"):
        compare_runs.curves(first, tmp_path / "nothing")
    (second / "metrics.jsonl").write_text("no json\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl:1: expected a step's metrics"):
        compare_runs.curves(first, second)
    given = compare_runs.Options(runs=(first, first), metric="lost")
    with pytest.raises(
        ValueError, match="expected one of loss, prune/noisy_kept_tokens_mean; got 'lost'"
    ):
        compare_runs.run(given)

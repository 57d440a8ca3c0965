"""`pruner serve` and `pruner client-check` as commands."""

import re
import signal
import subprocess
import sys

import pytest

from parity_tests.convert.checkpoints import save_torch, torch_tensors
from parity_tests.harness import BACKENDS
from parity_tests.run.servers import EchoPolicy, serving
from pruner_run import cli, configs
from pruner_run.data.normalization import NormStats
from pruner_run.serve import Default

TINY = configs.get("pi05_transfer_cube_tiny")


class EchoPolicyWithExamples(EchoPolicy):
    """Takes what `random_observation` makes."""

    def prepare(self, observation):
        return super().prepare({"marker": observation["state"][0] ** 2})


def refused(arguments, capsys):
    """What is said of a command line that ends with status 2."""
    with pytest.raises(SystemExit) as exit_info:
        cli.main(arguments)
    assert exit_info.value.code == cli.BAD_INPUT
    return " ".join(capsys.readouterr().err.split())


@pytest.fixture
def given(monkeypatch):
    """The options that a command line makes, in place of serving."""
    found = []
    monkeypatch.setattr("pruner_run.serve.run", found.append)

    def parse(line):
        cli.main(line.split())
        return found.pop()

    return parse


def test_openpis_command_line(given):
    line = "serve --env LIBERO policy:checkpoint --policy.config pi05_libero --policy.dir place"
    options = given(line)
    assert (options.env, options.port, options.host) == ("LIBERO", 8000, "127.0.0.1")
    assert (options.policy.config, options.policy.dir) == ("pi05_libero", "place")
    more = given(f"{line} --token_prune_keep_ratio 0.25 --port 9")
    assert (more.token_prune_keep_ratio, more.port) == (0.25, 9)
    assert given(f"{line} --token_prune_keep_tokens 64").token_prune_keep_tokens == 64
    assert given(f"{line} --no_pruning").no_pruning
    assert given("serve --port 9 --env DROID").policy == Default()


def test_what_needs_a_download_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OPENPI_DATA_HOME", str(tmp_path))
    said = refused(["serve", "--env", "LIBERO"], capsys)
    folder = tmp_path / "openpi-assets/checkpoints"
    place = "gs://openpi-assets/checkpoints/pi05_libero"
    assert f"{folder / 'pi05_libero'}: expected the checkpoint {place}, found none" in said
    assert f"mkdir -p {folder} && gcloud storage cp -r {place} {folder}" in said
    line = ["serve", "policy:checkpoint", "--policy.config=pi05_libero", f"--policy.dir={place}/"]
    assert refused(line, capsys) == said
    (folder / "pi05_libero").mkdir(parents=True)
    assert f"{folder / 'pi05_libero'}: expected one checkpoint" in refused(line, capsys)
    assert "got neither" in refused(["serve"], capsys)


def test_what_does_not_fit(capsys):
    place = ["policy:checkpoint", "--policy.dir", "/nothing"]
    assert "api_key: expected a key" in refused(["serve", *place, "--api_key", ""], capsys)
    assert "expected a checkpoint" in refused(["serve", *place], capsys)
    assert "port: expected 0..65535" in refused(["serve", *place, "--port", "-1"], capsys)


@pytest.mark.parametrize("key", [None, "secret"])
def test_the_check(key, capsys, monkeypatch):
    with serving(EchoPolicyWithExamples(), api_key=key) as server:
        if key is not None:
            assert "HTTP 401" in refused(["client-check", server.address], capsys)
            monkeypatch.setenv("PRUNER_API_KEY", key)
        cli.main(["client-check", server.address, "--requests", "5"])
        said = capsys.readouterr().out
        assert "kept 4 of 16 patches: base_0_rgb 4" in said
        shares = dict(re.findall(r"^ *(\w+) +.* ([\d.]+)% *$", said, flags=re.MULTILINE))
        stages = ["vision", "pruning", "prefix", "denoising"]
        parts = ["network", "queue", "transforms", *stages, "total"]
        assert [*shares] == parts
        assert abs(sum(map(float, shares.values())) - 200) < len(parts)
        assert "requests: expected at least 1" in refused(
            ["client-check", server.address, "--requests", "0"], capsys
        )
    assert "expected a policy server" in refused(["client-check", server.address], capsys)


def test_the_check_of_another_server(capsys):
    """openpi's own says little of itself."""
    policy = EchoPolicy()
    policy.metadata = {"reset_pose": [0.0]}
    with serving(policy) as server:
        said = refused(["client-check", server.address], capsys)
    assert "expected the metadata of `pruner serve`, lacks ['cameras', 'state']" in said


@pytest.mark.slow
@pytest.mark.skipif("torch" not in BACKENDS, reason="serves PyTorch's")
def test_a_process_from_start_to_stop(tmp_path, capsys):
    """Loads, listens, answers, and ends with status 0 when it is terminated."""
    place = save_torch(tmp_path / "tiny", torch_tensors(TINY.model), stats=False)
    NormStats.identity(14).write(place / "assets" / TINY.data.stats_id)
    line = ["serve", "policy:checkpoint", "--policy.dir", str(place), "--policy.config", TINY.name]
    options = ["--port", "0", "--token_prune_keep_tokens", "24"]
    command = [sys.executable, "-m", "pruner_run.cli", *line, *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            log = ""
            while not (found := re.search(r"ws://(127\.0\.0\.1:\d+)", log)):
                log += process.stderr.readline()
                assert process.poll() is None, log
            cli.main(["client-check", found[1], "--requests", "3"])
            assert "kept 72 of 768 patches" in capsys.readouterr().out
            process.send_signal(signal.SIGTERM)
            _, rest = process.communicate(timeout=30)
            assert process.returncode == 0, log + rest
            assert "stopping" in rest
        finally:
            process.kill()

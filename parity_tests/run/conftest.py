"""What the application's tests share."""

import importlib
import importlib.util
import subprocess
import sys

import pytest

from pruner_run import compute_norm_stats


@pytest.fixture(autouse=True)
def _nothing_is_downloaded(monkeypatch):
    """At this port of loopback nobody listens."""
    monkeypatch.setattr("pruner_run.tokenizer._URL", "http://127.0.0.1:9/paligemma_tokenizer.model")


@pytest.fixture(scope="session")
def openpi_client(tmp_path_factory):
    """openpi's own client.

    Its package asks for an old NumPy and forgets what else it needs, so that it can be nobody's
    dependency: it is installed into a folder of its own, where no environment has it.
    """
    if importlib.util.find_spec("openpi_client") is None:
        folder = tmp_path_factory.mktemp("openpi_client")
        install = [sys.executable, "-m", "pip", "install", "-q", "--retries", "0", "--no-deps"]
        packages = ["openpi-client==0.1.2", "dm-tree==0.1.10"]
        done = subprocess.run(
            [*install, "--target", str(folder), *packages], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"openpi-client cannot be installed: {done.stderr.strip()[-200:]}")
        sys.path.append(str(folder))
    return importlib.import_module("openpi_client")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where runs of the tiny config are, with the statistics of the dataset that ships."""
    folder = tmp_path_factory.mktemp("runs")
    compute_norm_stats.run(
        compute_norm_stats.Options(
            config_name="pi05_transfer_cube_tiny", assets_base_dir=folder / "assets"
        )
    )
    return folder

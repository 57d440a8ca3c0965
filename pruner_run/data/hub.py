"""Datasets by name: in a folder, where lerobot keeps its downloads, or on the Hugging Face Hub."""

import importlib
import importlib.util
import os
from pathlib import Path


def lerobot_home() -> Path:
    """lerobot's folder for datasets: HF_LEROBOT_HOME, else `lerobot` in Hugging Face's cache."""
    if home := os.environ.get("HF_LEROBOT_HOME"):
        return Path(home).expanduser()
    return Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser() / "lerobot"


def find_dataset(repo_id: str | None) -> Path:
    """The folder of a dataset, downloaded if need be.

    Args:
        repo_id: its folder, or its name "owner/name".

    Raises:
        ValueError: it is None.
        FileNotFoundError: it is not here and cannot be downloaded; the message says how to get it.
    """
    if repo_id is None:
        raise ValueError("repo_id: expected a dataset's folder or its name on the Hub, got none")
    at_home = lerobot_home() / repo_id
    for folder in (Path(repo_id).expanduser(), at_home):
        if folder.is_dir():
            return folder
    if repo_id.count("/") != 1 or repo_id.startswith((".", "/", "~")):
        home = f"here or in {lerobot_home()}"
        raise FileNotFoundError(
            f"repo_id: expected the folder of a LeRobot dataset, {home}; found no {repo_id}"
        )
    expected = f"repo_id: expected {repo_id} to be the folder of a LeRobot dataset, or {at_home}"
    how = (
        "to get it from the Hub: pip install huggingface_hub && hf download --repo-type dataset "
        f"{repo_id} --local-dir {at_home}"
    )
    if importlib.util.find_spec("huggingface_hub") is None:
        raise FileNotFoundError(f"{expected}; found neither. {how}")
    try:
        hub = importlib.import_module("huggingface_hub")
        return Path(hub.snapshot_download(repo_id, repo_type="dataset"))
    except Exception as error:  # of huggingface_hub, of its HTTP library, of the network
        raise FileNotFoundError(
            f"{expected}; found neither, and the download failed ({error}). {how}"
        ) from error

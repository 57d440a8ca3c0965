"""`pruner client-check HOST:PORT`: what a robot would wait for, and where the time goes."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from pruner_run.client import RemotePolicy, api_key
from pruner_run.data.examples import random_observation

_PERCENTILES = (50, 90, 99)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Send random observations to a policy server, and show how long the answers take.

    Attributes:
        address: of the server, HOST:PORT.
        requests: to send.
        prompt: the instruction in them.
        api_key: of the server; $PRUNER_API_KEY, if not given.
        seed: of the observations.
    """

    address: tyro.conf.Positional[str]
    requests: int = 50
    prompt: str = "pick up the cube"
    api_key: str | None = None
    seed: int = 0


def run(options: Options) -> None:
    """Sends them and prints a table.

    Raises:
        ValueError: the server refuses an observation.
        OSError: there is no server, or it does not let this client in.
    """
    if options.requests < 1:
        raise ValueError(f"requests: expected at least 1, got {options.requests}")
    generator = np.random.default_rng(options.seed)
    console = Console(highlight=False)
    with RemotePolicy(options.address, api_key=api_key(options.api_key)) as policy:
        metadata = policy.metadata
        if lacking := sorted({"cameras", "state"} - metadata.keys()):
            raise ValueError(
                f"{options.address}: expected the metadata of `pruner serve`, lacks {lacking}, so "
                "that nothing says what the robot sees"
            )
        answers = []
        for _ in range(options.requests):
            observation = random_observation(metadata, generator, prompt=options.prompt)
            answers.append(policy.infer(observation))
    parts = [split(answer, metadata.get("stages_ms")) for answer in answers]
    console.print(_about(options.address, metadata, answers[-1]))
    console.print(_table(parts))


def split(answer: Mapping[str, Any], stages: Mapping[str, float] | None) -> dict[str, float]:
    """Milliseconds of an answer by where they went; they sum up to "total".

    Args:
        answer: a server's, with the client's timing.
        stages: of the model, measured when the server started; their shares are taken to be those
            of every answer. None: they are not told apart.
    """
    server, policy = answer["server_timing"], answer["policy_timing"]
    total, model = answer["client_timing"]["total_ms"], policy["infer_ms"]
    prepare = server["prepare_ms"]
    transforms = prepare + server["infer_ms"] - model
    parts = {
        "network": total - server["queue_ms"] - prepare - server["infer_ms"],
        "queue": server["queue_ms"],
        "transforms": transforms,
    }
    if stages is None:
        parts["model"] = model
    else:
        whole = sum(stages.values())
        parts |= {name: model * share / whole for name, share in stages.items()}
    return parts | {"total": total}


def _about(address: str, metadata: Mapping[str, Any], answer: Mapping[str, Any]) -> str:
    pruning = answer["pruning"]
    kept = ", ".join(f"{camera} {count}" for camera, count in pruning["kept"].items())
    return (
        f"{address}: {metadata['config']} in {metadata['backend']}, actions "
        f"{list(answer['actions'].shape)}\nkept {pruning['kept_total']} of {pruning['patches']} "
        f"patches: {kept}"
    )


def _table(parts: Sequence[Mapping[str, float]]) -> Table:
    """A row a part; its share is of all time."""
    titles = [f"p{percent} ms" for percent in _PERCENTILES]
    table = Table("", *titles, "share", box=box.SIMPLE)
    whole = sum(part["total"] for part in parts)
    for name in parts[0]:
        values = [part[name] for part in parts]
        cells = [f"{value:.2f}" for value in np.percentile(values, _PERCENTILES)]
        table.add_row(name, *cells, f"{sum(values) / whole:.1%}")
    return table

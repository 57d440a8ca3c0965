"""The results of an evaluation: a file, a table, and how two of them differ."""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from pruner_run.intervals import Share, difference_interval
from pruner_run.rollout import Episode

FILE = "results.json"
_VERSION = 1
_ALL = "all"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Results:
    """An evaluation.

    Attributes:
        env: the environment's name.
        policy: what is known of the policy.
        replan_steps: actions of a chunk that were executed; None for all.
        fps: actions a second.
        episodes: in the order that they were run.
    """

    env: str
    policy: Mapping[str, Any]
    replan_steps: int | None
    fps: int
    episodes: Sequence[Episode]

    @property
    def tasks(self) -> list[str]:
        """Their names, each once."""
        return list(dict.fromkeys(episode.task for episode in self.episodes))

    def share(self, task: str | None = None) -> Share:
        """Successes, of one task or of all."""
        chosen = [each.success for each in self.episodes if task in (None, each.task)]
        return Share(sum(chosen), len(chosen))

    def summary(self, task: str | None = None) -> dict[str, Any]:
        """What the episodes of a task, or all, come to; None where nothing was measured."""
        chosen = [each for each in self.episodes if task in (None, each.task)]
        share = self.share(task)
        latencies = [ms for each in chosen for ms in each.infer_ms]
        return {
            "successes": share.successes,
            "episodes": share.trials,
            "success_rate": share.value,
            "wilson_95": list(share.interval),
            "mean_steps": _mean(each.steps for each in chosen),
            "mean_steps_of_successes": _mean(each.steps for each in chosen if each.success),
            "mean_jerk": _mean(each.jerk for each in chosen if each.jerk is not None),
            "infer_ms_p50": _percentile(latencies, 50),
            "infer_ms_p99": _percentile(latencies, 99),
            "mean_tokens_kept": _mean(kept for each in chosen for kept in each.tokens_kept),
        }

    def to_json(self) -> str:
        """The text of results.json."""
        content = {"version": _VERSION} | dataclasses.asdict(self)
        content["summary"] = self.summary()
        content["tasks"] = {task: self.summary(task) for task in self.tasks}
        return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def read_results(path: Path) -> Results:
    """The results in a folder of `pruner eval`, or in its results.json.

    Raises:
        FileNotFoundError: there are none.
        ValueError: the file is damaged or has another version.
    """
    path = path / FILE if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected an evaluation's results, found none")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["version"] != _VERSION:
            raise ValueError(f"version {content['version']}")
        names = [field.name for field in dataclasses.fields(Results)]
        fields = {name: content[name] for name in names}
        fields["episodes"] = [Episode(**each) for each in content["episodes"]]
        results = Results(**fields)
        results.share()
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: expected results of version {_VERSION}, got {type(error).__name__}: {error}"
        ) from error
    return results


def table(results: Results) -> Table:
    """A row a task, and one of all where there are several."""
    # Narrow, so that it fits 80 columns with a task's name in full.
    made = Table(title=results.env, box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    made.add_column("task", overflow="fold")
    for title in ("success", "95 %", "steps", "jerk", "p50 ms", "p99 ms", "kept"):
        made.add_column(title, justify="right", no_wrap=True)
    tasks = results.tasks
    for task in [*tasks, None] if len(tasks) > 1 else tasks:
        share = results.share(task)
        rate = f"{share.successes}/{share.trials}"
        made.add_row(task or _ALL, rate, _percents(share.interval), *_cells(results.summary(task)))
    return made


def comparison_table(first: Results, second: Results, names: tuple[str, str]) -> Table:
    """The two side by side: success a task with the interval of the difference, then the rest."""
    made = Table(title=f"{first.env}, with 95 % intervals", box=box.SIMPLE_HEAD)
    made.add_column("", overflow="fold")
    for title in (*names, "difference"):
        made.add_column(title, justify="right")
    for task in [*first.tasks, None] if len(first.tasks) > 1 else first.tasks:
        shares = first.share(task), second.share(task)
        low, high = difference_interval(*shares)
        difference = f"{shares[1].value - shares[0].value:+.0%} ({low:+.0%} to {high:+.0%})"
        rates = [f"{s.successes}/{s.trials} ({_percents(s.interval)})" for s in shares]
        made.add_row(f"success, {task or _ALL}", *rates, difference)
    titles = ("mean steps", "mean jerk", "infer p50 ms", "infer p99 ms", "mean tokens kept")
    columns = [_cells(results.summary()) for results in (first, second)]
    for title, *cells in zip(titles, *columns, strict=True):
        made.add_row(title, *cells, "")
    return made


def verdict(first: Results, second: Results, names: tuple[str, str]) -> str:
    """Whether success differs, in a sentence.

    Raises:
        ValueError: the two are of different environments or tasks.
    """
    if (first.env, set(first.tasks)) != (second.env, set(second.tasks)):
        raise ValueError(
            f"compare: expected results of one environment, got {first.env} ({first.tasks}) and "
            f"{second.env} ({second.tasks})"
        )
    low, high = difference_interval(first.share(), second.share())
    if low <= 0 <= high:
        return (
            f"These episodes do not tell {names[0]} and {names[1]} apart: the difference in "
            f"success is somewhere from {low:+.0%} to {high:+.0%}."
        )
    better, worse = (names[1], names[0]) if low > 0 else names
    least, most = sorted((abs(low), abs(high)))
    return f"{better} succeeds more often than {worse}, by {least:.0%} to {most:.0%}."


def _percents(interval: tuple[float, float]) -> str:
    return "{:.0%} to {:.0%}".format(*interval)


def _cells(summary: Mapping[str, Any]) -> list[str]:
    formats = {
        "mean_steps": ".1f",
        "mean_jerk": ".3g",
        "infer_ms_p50": ".1f",
        "infer_ms_p99": ".1f",
        "mean_tokens_kept": ".1f",
    }
    values = [(summary[key], form) for key, form in formats.items()]
    return ["–" if value is None else format(value, form) for value, form in values]


def _mean(values: Iterable[float]) -> float | None:
    values = list(values)
    return float(np.mean(values)) if values else None


def _percentile(values: Sequence[float], percent: int) -> float | None:
    return float(np.percentile(values, percent)) if values else None

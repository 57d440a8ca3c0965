"""`pruner eval`: a policy, a server or the scripted expert in a simulator; or a comparison."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console

from convert.output import folder_in_full
from pruner_run import eval_results
from pruner_run.client import RemotePolicy, api_key
from pruner_run.eval_results import Results
from pruner_run.policy_options import PolicyOptions
from pruner_run.rollout import Actor, Episode, run_episode, run_episodes
from pruner_run.rollout_video import Film
from pruner_run.simulation.process import SimulatorProcess


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(PolicyOptions):
    """Run episodes in a simulator and say how often a policy succeeds; or compare two results.

    The policy is a checkpoint (--policy.dir), a server (--server), or the simulator's scripted
    expert (--policy expert).

    Attributes:
        env: aloha_sim, aloha_sim:FPS, metaworld:TASK, metaworld:TASK,TASK or libero:SUITE.
        policy: the expert.
        policy_dir: a checkpoint.
        policy_config: its training config, if it does not say so itself.
        server: HOST:PORT of a policy server.
        api_key: of the server; $PRUNER_API_KEY, if not given.
        episodes: of each task.
        seed: of the first episode and of the policy's noise; each episode's is one more.
        seeds: of the episodes, in place of `episodes`.
        replan_steps: actions that are executed of each chunk; all, if not given.
        videos: of so many first episodes of each task, with the kept patches lit.
        output: the folder for results.json and videos.
        overwrite: replaces what is there.
        compare: two folders of results; nothing is run.
    """

    env: str | None = None
    policy: Literal["expert"] | None = None
    policy_dir: Annotated[str | None, tyro.conf.arg(name="policy.dir")] = None
    policy_config: Annotated[str | None, tyro.conf.arg(name="policy.config")] = None
    server: str | None = None
    api_key: str | None = None
    episodes: int = 10
    seed: int = 0
    seeds: tuple[int, ...] | None = None
    replan_steps: int | None = None
    videos: int = 0
    output: Path = Path("eval_output")
    overwrite: tyro.conf.FlagCreatePairsOff[bool] = False
    compare: tuple[Path, Path] | None = None


def run(options: Options) -> None:
    """Runs the episodes, writes what came of them and prints it; or prints a comparison.

    Raises:
        ValueError: an option does not fit, or the simulator or the policy refuses something.
        OSError: a file is missing, or the simulator, the server or the output fails.
    """
    console = Console(highlight=False)
    if options.compare is not None:
        _compare(options.compare, console)
        return
    _check(options)
    with folder_in_full(options.output.absolute(), overwrite=options.overwrite) as folder:
        results = evaluate(options, folder, console)
        (folder / eval_results.FILE).write_text(results.to_json(), encoding="utf-8")
    console.print(eval_results.table(results))
    console.print(f"Wrote {options.output}")


def evaluate(options: Options, folder: Path, console: Console) -> Results:
    """Runs the episodes, a line each; videos go into the folder. Errors as `run`."""
    assert options.env is not None
    seeds = options.seeds or range(options.seed, options.seed + options.episodes)
    with SimulatorProcess(options.env) as simulator, _actor(options) as actor:
        spec = simulator.spec
        if actor is None and not spec.has_expert:
            raise ValueError(f"policy: expected one, as {spec.name} has no scripted expert")

        def run_one(task: str, seed: int) -> Episode:
            with contextlib.ExitStack() as stack:
                film = None
                if seed in seeds[: options.videos]:
                    path = folder / "videos" / f"{task}-{seed}.mp4"
                    film = stack.enter_context(Film(path, spec))
                return run_episode(
                    simulator, actor, task, seed, replan_steps=options.replan_steps, camera=film
                )

        episodes = []
        for episode in run_episodes(simulator, run_one, seeds):
            episodes.append(episode)
            outcome = "solved" if episode.success else "not solved"
            console.print(f"{episode.task}, seed {episode.seed}: {outcome}, {episode.steps} steps")
        return Results(
            env=options.env,
            policy=_described(options, actor),
            replan_steps=options.replan_steps,
            fps=spec.fps,
            episodes=episodes,
        )


@contextlib.contextmanager
def _actor(options: Options) -> Iterator[Actor | None]:
    """The policy; None for the expert."""
    if options.server is not None:
        with RemotePolicy(options.server, api_key=api_key(options.api_key)) as remote:
            yield remote
    elif options.policy_dir is not None:
        yield options.load(options.policy_dir, options.policy_config)
    else:
        yield None


def _check(options: Options) -> None:
    """Raises a ValueError for what does not go together, before anything is started."""
    if options.env is None:
        raise ValueError("env: expected an environment, such as aloha_sim, or --compare; got none")
    named = {
        "--policy.dir": options.policy_dir,
        "--server": options.server,
        "--policy expert": options.policy,
    }
    given = [name for name, value in named.items() if value is not None]
    if len(given) != 1:
        raise ValueError(f"policy: expected one of {', '.join(named)}; got {given or 'none'}")
    if options.seeds is not None and len(set(options.seeds)) != len(options.seeds):
        raise ValueError(f"seeds: expected each once, got {options.seeds}")
    least = {"episodes": 1, "videos": 0, "seed": 0, "num_steps": 1, "replan_steps": 1}
    for name, smallest in least.items():
        value = getattr(options, name)
        if value is not None and value < smallest:
            raise ValueError(f"{name}: expected at least {smallest}, got {value}")


def _described(options: Options, actor: Actor | None) -> dict[str, Any]:
    """What of the policy is worth to remember."""
    if actor is None:
        return {"name": "expert"}
    place = options.server or str(options.policy_dir)
    known = ("config", "backend", "robot", "action_horizon", "pruning")
    metadata = {key: actor.metadata[key] for key in known if key in actor.metadata}
    return {"name": place, **metadata}


def _compare(paths: tuple[Path, Path], console: Console) -> None:
    first, second = map(eval_results.read_results, paths)
    names = (str(paths[0]), str(paths[1]))
    sentence = eval_results.verdict(first, second, names)
    console.print(eval_results.comparison_table(first, second, names))
    console.print(sentence)

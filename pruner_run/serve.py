"""`pruner serve`: a checkpoint's policy, for openpi's clients."""

import asyncio
import dataclasses
import logging
import signal
from typing import Literal

import tyro

from pruner_run.client import api_key
from pruner_run.data.robots import RobotName
from pruner_run.policy import Policy
from pruner_run.policy_options import PolicyOptions
from pruner_run.server import PolicyServer, ServerSettings

# openpi's, by environment: the training config and the checkpoint.
_DEFAULTS = {
    "ALOHA": ("pi05_aloha", "gs://openpi-assets/checkpoints/pi05_base"),
    "DROID": ("pi05_droid", "gs://openpi-assets/checkpoints/pi05_droid"),
    "LIBERO": ("pi05_libero", "gs://openpi-assets/checkpoints/pi05_libero"),
}
_ROBOTS: dict[str | None, RobotName | None] = {
    None: None,
    "ALOHA": "aloha",
    "DROID": "droid",
    "LIBERO": "libero",
}
_LOOPBACK = ("127.0.0.1", "::1", "localhost")

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Serve a checkpoint.

    Attributes:
        dir: of a run of this project, openpi's JAX or PyTorch one, or LeRobot's π0.5 folder.
        config: a training config, of those that `pruner configs` lists; what the checkpoint says
            itself, if not given.
    """

    dir: str
    config: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Default:
    """Serve openpi's checkpoint for the environment."""


@tyro.conf.configure(tyro.conf.CascadeSubcommandArgs)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(PolicyOptions):
    """Serve a policy over openpi's websocket protocol.

    Attributes:
        env: whose clients are served. A checkpoint for another robot is an error.
        policy: what is served.
        default_prompt: the instruction where a client sends none.
        dtype: of the computation, in place of the config's.
        host: to listen at. Other machines reach 0.0.0.0; set a key then.
        port: to listen at.
        api_key: that clients must send; $PRUNER_API_KEY, if not given.
        max_batch: observations that are inferred together. A model is compiled for 1, 2, 4 ... of
            them.
        batch_wait_ms: that an observation waits for those of other clients.
        max_queue: observations that may be here at once; more are answered "busy".
        max_clients: that may be connected at once.
        max_message_mb: of a message from a client, in MiB.
        no_profile: do not measure the model's stages at the start, which `pruner client-check`
            shows.
    """

    env: Literal["ALOHA", "DROID", "LIBERO"] | None = None
    policy: Checkpoint | Default = Default()  # frozen
    default_prompt: str | None = None
    dtype: Literal["bfloat16", "float32"] | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    max_batch: int = 1
    batch_wait_ms: float = 2.0
    max_queue: int = 64
    max_clients: int = 64
    max_message_mb: int = 32
    no_profile: tyro.conf.FlagCreatePairsOff[bool] = False


def run(options: Options) -> None:
    """Loads, warms up, and serves until it is interrupted or terminated.

    Raises:
        ValueError: the checkpoint, or what is asked of it, does not fit.
        OSError: a file is missing, or the port is taken.
    """
    # Plain, for what collects logs; a handler that lays lines out would hold up the event loop.
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("websockets").setLevel(logging.WARNING)
    settings = _settings(options)
    policy = _policy(options)
    if settings.api_key is None and settings.host not in _LOOPBACK:
        logger.warning("%s: any machine that reaches it may move the robot", settings.host)
    asyncio.run(_serve(PolicyServer(policy, settings), settings))


async def _serve(server: PolicyServer, settings: ServerSettings) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await server.run(stop, lambda: logger.info("serving at ws://%s:%d", settings.host, server.port))


def _settings(options: Options) -> ServerSettings:
    return ServerSettings(
        host=options.host,
        port=options.port,
        api_key=api_key(options.api_key),
        max_message_bytes=options.max_message_mb * 2**20,
        max_batch=options.max_batch,
        batch_wait_ms=options.batch_wait_ms,
        max_queue=options.max_queue,
        max_clients=options.max_clients,
    )


def _policy(options: Options) -> Policy:
    chosen = options.policy
    if isinstance(chosen, Default):
        chosen = _default_checkpoint(options.env)
    policy = options.load(
        chosen.dir,
        chosen.config,
        default_prompt=options.default_prompt,
        dtype=options.dtype,
        max_batch=options.max_batch,
        robot=_ROBOTS[options.env],
    )
    if not options.no_profile:
        policy.metadata["stages_ms"] = policy.stages()
    return policy


def _default_checkpoint(env: str | None) -> Checkpoint:
    """openpi's checkpoint for an environment; raises a ValueError if none is named."""
    if env is None:
        raise ValueError(
            "policy: expected 'policy:checkpoint --policy.dir DIR', or --env for openpi's "
            f"checkpoint of {', '.join(_DEFAULTS)}; got neither"
        )
    config, place = _DEFAULTS[env]
    return Checkpoint(dir=place, config=config)

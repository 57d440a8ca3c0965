"""A policy over openpi's websocket protocol.

The server sends its metadata, and then for each packed observation a packed answer. A text is an
error, after which the server closes with code 1011; but for "busy", after which a client may try
again. Observations are decoded and transformed in a few threads, inferred in one, and the event
loop only passes them on: a client with a bad, large or slow message costs the others nothing.
"""

import asyncio
import contextlib
import dataclasses
import hmac
import http
import logging
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed
from websockets.frames import CloseCode
from websockets.http11 import Request, Response

from pruner_run.batching import Batcher, BusyError
from pruner_run.msgpack_numpy import MessageError, pack, unpack
from pruner_run.server_metrics import CONTENT_TYPE, ServerMetrics

_THREADS = 2  # that prepare observations
_GRACE = 15.0  # seconds for what runs, once the server is told to stop
_MAX_SAID = 500  # of an error, in characters: what was sent may be in it
_MAX_REASON = 100  # of a close frame, in characters; a frame has room for 123 bytes

logger = logging.getLogger(__name__)


class ServedPolicy(Protocol):
    """What the server needs of a policy.

    Attributes:
        metadata: what msgpack can say.
    """

    metadata: dict[str, Any]

    def prepare(self, observation: Mapping[str, Any]) -> Any:
        """What `act` takes; called from several threads. ValueErrors are the client's fault."""
        ...

    def act(self, prepared: Sequence[Any]) -> list[dict[str, Any]]:
        """Answers in order, called from one thread; no array but "actions" in them."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Where a server listens, and its limits.

    Attributes:
        host, port: to listen at; port 0 for a free one.
        api_key: that clients must send; None for none.
        max_message_bytes: of a message from a client.
        max_batch: observations that are inferred together.
        batch_wait_ms: that an observation waits for others.
        max_queue: observations that may be here at once; more are answered "busy".
        max_clients: that may be connected at once; more are refused.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    max_message_bytes: int = 32 * 2**20
    max_batch: int = 1
    batch_wait_ms: float = 2.0
    max_queue: int = 64
    max_clients: int = 64

    def __post_init__(self) -> None:
        for name in ("max_message_bytes", "max_batch", "max_queue", "max_clients"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not 0 <= self.port < 2**16:
            raise ValueError(f"port: expected 0..65535, got {self.port}")
        if not 0 <= self.batch_wait_ms < 1e4:
            raise ValueError(f"batch_wait_ms: expected 0..10000, got {self.batch_wait_ms}")


class PolicyServer:
    """Serves a policy until it is told to stop.

    Attributes:
        port: where it listens, once it does.
    """

    def __init__(self, policy: ServedPolicy, settings: ServerSettings) -> None:
        self.port = settings.port
        self._policy, self._settings = policy, settings
        self._server: Server | None = None
        self._metadata = pack(policy.metadata)
        self._batcher = Batcher(
            policy.act,
            max_batch=settings.max_batch,
            wait=settings.batch_wait_ms / 1e3,
            limit=settings.max_queue,
            clients=self._connections,
        )
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="prepare")
        self._metrics = ServerMetrics(lambda: self._batcher.waiting, self._connections)
        self._replying = 0
        self._stopping = False

    async def run(self, stop: asyncio.Event, started: Callable[[], None] | None = None) -> None:
        """Listens until `stop` is set, then finishes what runs and refuses what comes.

        Args:
            stop: ends it.
            started: called once clients can connect.

        Raises:
            OSError: it cannot listen there.
        """
        settings = self._settings
        try:
            async with serve(
                self._converse,
                settings.host,
                settings.port,
                process_request=self._process_request,
                origins=[None],  # no web page may move the robot of who looks at it
                compression=None,
                max_size=settings.max_message_bytes,
                max_queue=1,  # messages of a client that are held while it is answered
            ) as self._server:
                self.port = self._server.sockets[0].getsockname()[1]
                if started is not None:
                    started()
                await stop.wait()
                self._stopping = True
                logger.info("stopping: %d requests to finish", self._replying)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._idle(), _GRACE)
        finally:
            self._batcher.close()
            self._threads.shutdown()

    async def _idle(self) -> None:
        """Waits until no request is being answered."""
        while self._replying:
            await asyncio.sleep(0.01)

    def _connections(self) -> int:
        return 0 if self._server is None else len(self._server.connections)

    def _process_request(self, connection: ServerConnection, request: Request) -> Response | None:
        """Answers plain HTTP, and refuses clients without the key."""
        path = request.path.partition("?")[0]
        if path == "/healthz":
            if self._stopping:
                return connection.respond(http.HTTPStatus.SERVICE_UNAVAILABLE, "stopping\n")
            return connection.respond(http.HTTPStatus.OK, "OK\n")
        if not self._has_key(request.headers):
            logger.warning("%s: refused, without the API key", connection.remote_address)
            return connection.respond(
                http.HTTPStatus.UNAUTHORIZED,
                "Authorization: expected 'Api-Key' and the server's key, got none or another\n",
            )
        if path == "/metrics":
            response = connection.respond(http.HTTPStatus.OK, self._metrics.text().decode())
            del response.headers["Content-Type"]
            response.headers["Content-Type"] = CONTENT_TYPE
            return response
        if self._stopping:
            return connection.respond(http.HTTPStatus.SERVICE_UNAVAILABLE, "stopping\n")
        if self._connections() >= self._settings.max_clients:
            return connection.respond(
                http.HTTPStatus.SERVICE_UNAVAILABLE,
                f"busy: expected fewer than {self._settings.max_clients} clients\n",
            )
        return None

    def _has_key(self, headers: Headers) -> bool:
        """In a time that does not tell how much of a key was right."""
        if self._settings.api_key is None:
            return True
        expected = f"Api-Key {self._settings.api_key}".encode()
        given = "".join(headers.get_all("Authorization")).encode()
        return hmac.compare_digest(given, expected)

    async def _converse(self, connection: ServerConnection) -> None:
        """One client, from its first message to its last."""
        client = connection.remote_address
        logger.info("%s: connected", client)
        timing: dict[str, float] = {}
        try:
            await connection.send(self._metadata)
            async for message in connection:
                self._replying += 1
                try:
                    timing = await self._reply(connection, message, timing.get("total_ms"))
                finally:
                    self._replying -= 1
        except ConnectionClosed as error:
            if error.sent is not None and error.sent.code == CloseCode.MESSAGE_TOO_BIG:
                self._metrics.refused("error")
            logger.info("%s: %s", client, error)
        else:
            logger.info("%s: disconnected", client)

    async def _reply(
        self, connection: ServerConnection, message: bytes | str, previous: float | None
    ) -> dict[str, float]:
        """Answers a message, or says what is wrong with it; gives the server's timing of it."""
        started = time.perf_counter()
        try:
            if self._stopping:
                await connection.send("stopping: the server takes no more requests")
                await connection.close(CloseCode.GOING_AWAY)
                return {}
            with self._batcher.admitted():
                answer, timing = await self._answer(message, started)
            if previous is not None:
                timing["prev_total_ms"] = previous
            packed = pack(answer | {"server_timing": timing})
        except BusyError as error:
            self._metrics.refused("busy")
            await connection.send(str(error))
            return {}
        except Exception as error:
            self._metrics.refused("error")
            line = _said(error)
            logger.error("%s: a request failed\n%s", connection.remote_address, _traceback(error))
            await connection.send(line)
            await connection.close(CloseCode.INTERNAL_ERROR, line[:_MAX_REASON])
            return {}
        await connection.send(packed)
        return timing | {"total_ms": _milliseconds(started)}

    async def _answer(
        self, message: bytes | str, started: float
    ) -> tuple[dict[str, Any], dict[str, float]]:
        """A policy's answer, and where the time went."""
        loop = asyncio.get_running_loop()
        prepared = await loop.run_in_executor(self._threads, self._prepare, message)
        prepare_ms = _milliseconds(started)
        found = await asyncio.wrap_future(self._batcher.submit(prepared))
        self._metrics.answered(started, found.batch_size, found.result.get("pruning", {}))
        timing = {
            "prepare_ms": prepare_ms,
            "queue_ms": found.queue_ms,
            "infer_ms": found.infer_ms,
            "batch_size": found.batch_size,
        }
        return found.result, timing

    def _prepare(self, message: bytes | str) -> Any:
        if isinstance(message, str):
            raise MessageError("message: expected a binary frame with msgpack, got a text")
        observation = unpack(message)
        if not isinstance(observation, dict):
            found = type(observation).__name__
            raise MessageError(f"message: expected an observation's map, got {found}")
        return self._policy.prepare(observation)


def _said(error: Exception) -> str:
    """An error as one line for a client: what it did wrong, and of our own faults only the name."""
    if not isinstance(error, ValueError):
        return f"error: {type(error).__name__} in the server; its log says more"
    return "error: " + " ".join(_cut(str(error)).split())


def _traceback(error: Exception) -> str:
    return "".join(_cut(part) for part in traceback.format_exception(error))


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_SAID else f"{text[:_MAX_SAID]} ...\n"


def _milliseconds(started: float) -> float:
    return 1e3 * (time.perf_counter() - started)

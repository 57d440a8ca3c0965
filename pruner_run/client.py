"""A client of a policy server, with openpi's protocol and without openpi."""

import contextlib
import os
import time
from collections.abc import Mapping
from typing import Any, Self

from websockets.exceptions import ConnectionClosed, InvalidHandshake
from websockets.sync.client import connect

from pruner_run.msgpack_numpy import pack, unpack

KEY_VARIABLE = "PRUNER_API_KEY"


def api_key(given: str | None) -> str | None:
    """The key that is given, or else the environment's, if there is one.

    Raises:
        ValueError: it is empty, as where a variable was meant that is not set.
    """
    if given == "":
        raise ValueError("api_key: expected a key, got an empty text")
    return given or os.environ.get(KEY_VARIABLE) or None


class RemotePolicy:
    """A policy on a server.

    Attributes:
        metadata: what the server says of it.
    """

    def __init__(self, address: str, *, api_key: str | None = None, timeout: float = 60.0) -> None:
        """Connects.

        Args:
            address: "HOST:PORT", or a URI such as ws://HOST:PORT.
            api_key: that the server asks for.
            timeout: seconds to wait for each answer.

        Raises:
            OSError: there is no server, or it does not let this client in.
        """
        self._address, self._timeout = address, timeout
        self._opened = contextlib.ExitStack()
        uri = address if "://" in address else f"ws://{address}"
        headers = None if api_key is None else {"Authorization": f"Api-Key {api_key}"}
        try:
            self._connection = self._opened.enter_context(
                connect(
                    uri, compression=None, max_size=None, additional_headers=headers, proxy=None
                )
            )
        except InvalidHandshake as error:
            raise ConnectionRefusedError(f"{address}: expected a policy server: {error}") from error
        except OSError as error:
            raise ConnectionError(f"{address}: expected a policy server, got {error}") from error
        try:
            self.metadata: dict[str, Any] = unpack(self._received())
        except BaseException:
            self.close()
            raise

    def infer(self, observation: Mapping[str, Any]) -> dict[str, Any]:
        """The server's answer, with "client_timing": total_ms, from packing to unpacking.

        Raises:
            ValueError: the server says that the observation is wrong, or is busy.
            OSError: the connection is lost.
        """
        started = time.perf_counter()
        try:
            self._connection.send(pack(observation))
        except ConnectionClosed as error:
            raise ConnectionError(f"{self._address}: {error}") from error
        answer = unpack(self._received())
        total = 1e3 * (time.perf_counter() - started)
        return answer | {"client_timing": {"total_ms": total}}

    def close(self) -> None:
        """Disconnects."""
        self._opened.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _received(self) -> bytes:
        try:
            message = self._connection.recv(timeout=self._timeout)
        except ConnectionClosed as error:
            raise ConnectionError(f"{self._address}: {error}") from error
        if isinstance(message, str):
            raise ValueError(f"{self._address}: {message}")
        return message

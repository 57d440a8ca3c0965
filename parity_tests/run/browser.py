"""A headless Chromium, over its DevTools protocol: no driver, and no package but websockets."""

import contextlib
import itertools
import json
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PATIENCE = 60.0  # seconds, for a busy machine

KEYS = {"ArrowRight": 39, "ArrowLeft": 37, "Home": 36, "End": 35}


def find() -> str | None:
    """The browser's program, if there is one."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Page:
    """The one page that is open.

    Attributes:
        complaints: what it said on its console, exceptions among it.
        requests: addresses that it asked for, but for the file itself and data.
    """

    def __init__(self, connection: ClientConnection) -> None:
        self._connection, self._numbers = connection, itertools.count(1)
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self._is_loaded = False
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def open(self, path: Path) -> None:
        """Loads a file and waits for it."""
        self._is_loaded = False
        self.call("Page.navigate", url=path.resolve().as_uri())
        while not self._is_loaded:
            self._receive()

    def evaluate(self, expression: str) -> Any:
        """A JavaScript expression's value; a promise's, once it is there."""
        answer = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def press(self, key: str) -> None:
        """A key, as a user presses it."""
        for kind in ("rawKeyDown", "keyUp"):
            code = {"windowsVirtualKeyCode": KEYS[key]}
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, **code)

    def resize(self, width: int, height: int = 900) -> None:
        """The window, in CSS pixels."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            **{"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500},
        )

    def darken(self, scheme: str) -> None:
        """Prefers a colour scheme, "light" or "dark"."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", features=features)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command of the protocol, and its answer."""
        number = next(self._numbers)
        self._connection.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message = self._receive()
            if message.get("id") == number:
                assert "error" not in message, (method, message["error"])
                return message["result"]

    def _receive(self) -> dict[str, Any]:
        message = json.loads(self._connection.recv(PATIENCE))
        match message.get("method"):
            case "Page.loadEventFired":
                self._is_loaded = True
            case "Runtime.consoleAPICalled" | "Runtime.exceptionThrown" | "Log.entryAdded":
                self.complaints.append(json.dumps(message["params"]))
            case "Network.requestWillBeSent":
                url = message["params"]["request"]["url"]
                if not url.startswith(("data:", "file:")):
                    self.requests.append(url)
        return message


@contextlib.contextmanager
def running(program: str, profile: Path) -> Iterator[Page]:
    """A browser with a profile of its own; ends with the block."""
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    options += ["--disable-dev-shm-usage", "--no-first-run", "--disable-background-networking"]
    process = subprocess.Popen(
        [program, *options, f"--user-data-dir={profile}", "--remote-debugging-port=0"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        with connect(_address(profile), max_size=None, open_timeout=PATIENCE) as connection:
            yield Page(connection)
    finally:
        process.terminate()
        process.wait(PATIENCE)


def _address(profile: Path) -> str:
    """Of a new page, once the browser has written where it listens."""
    file, deadline = profile / "DevToolsActivePort", time.monotonic() + PATIENCE
    while not (file.is_file() and file.read_text().count("\n")):
        assert time.monotonic() < deadline, "the browser does not start"
        time.sleep(0.05)
    port = file.read_text().split()[0]
    request = urllib.request.Request(f"http://127.0.0.1:{port}/json/new", method="PUT")
    with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
        return json.load(answer)["webSocketDebuggerUrl"]

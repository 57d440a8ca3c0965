"""The policy server with policies that cost nothing: its protocol, limits and many clients."""

import asyncio
import contextlib
import os
import socket
import struct
import threading
import time
import urllib.error

import numpy as np
import pytest
import websockets.sync.client
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from parity_tests.run.servers import EchoPolicy, ServerProcess, serving
from parity_tests.tolerances import tolerance
from pruner_run.client import RemotePolicy
from pruner_run.client_check import split
from pruner_run.msgpack_numpy import pack, unpack
from pruner_run.server import PolicyServer, ServerSettings

# Seconds that many clients ask for; PRUNER_LOAD_SECONDS=60 for the whole of it.
LOAD = float(os.environ.get("PRUNER_LOAD_SECONDS", "4"))
MIB = 2**20


def wait_for(condition, seconds=10.0):
    """Until a condition holds, which it must in time."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


def error_of(address, data):
    """The text that answers a message, and the code and reason that the server closes with."""
    with websockets.sync.client.connect(f"ws://{address}", compression=None, proxy=None) as client:
        client.recv()
        client.send(data)
        said = client.recv(timeout=10)
        with pytest.raises(ConnectionClosed) as closed:
            client.recv(timeout=10)
        return said, closed.value.rcvd.code, closed.value.rcvd.reason


def test_metadata_then_answers():
    with serving(EchoPolicy()) as server, RemotePolicy(server.address) as client:
        assert client.metadata == EchoPolicy().metadata
        first, second = client.infer({"marker": 1.5}), client.infer({"marker": -0.0})
        np.testing.assert_array_equal(first["actions"], np.full((5, 3), 1.5))
        assert first["pruning"]["kept"] == {"base_0_rgb": 4}
        timing = first["server_timing"]
        assert timing.keys() == {"prepare_ms", "queue_ms", "infer_ms", "batch_size"}
        assert second["server_timing"].keys() == timing.keys() | {"prev_total_ms"}
        assert second["server_timing"]["prev_total_ms"] > timing["infer_ms"]
        parts = split(first, client.metadata["stages_ms"])
        total = parts.pop("total")
        assert sum(parts.values()) == pytest.approx(total, rel=tolerance("statistics", "float64"))
        assert parts.keys() >= {"network", "queue", "vision", "prefix", "denoising"}
        assert parts["network"] > 0


def test_plain_http():
    with serving(EchoPolicy()) as server:
        assert server.get("/healthz") == "OK\n"
        with RemotePolicy(server.address) as client:
            for marker in range(3):
                client.infer({"marker": marker})
            assert server.metric("pruner_connections") == 1
        with pytest.raises(ValueError, match="marker: expected one"):
            RemotePolicy(server.address).infer({"state": 0})
        assert server.metric('pruner_requests_total{outcome="ok"}') == 3
        assert server.metric('pruner_requests_total{outcome="error"}') == 1
        assert server.metric('pruner_tokens_kept{camera="base_0_rgb"}') == 4
        assert server.metric('pruner_tokens_total{which="seen"}') == 48
        p50 = server.metric("pruner_request_p50_seconds")
        assert 0 < p50 <= server.metric("pruner_request_p99_seconds") < 5
        with pytest.raises(urllib.error.HTTPError, match="426"):
            server.get("/")


@pytest.mark.parametrize("key", [None, "", "k", "key2"])
def test_the_key(key, caplog):
    with serving(EchoPolicy(), api_key="key") as server:
        with pytest.raises(ConnectionRefusedError, match="HTTP 401"):
            RemotePolicy(server.address, api_key=key)
        with pytest.raises(urllib.error.HTTPError, match="401"):
            server.get("/metrics")
        assert server.get("/healthz") == "OK\n"
        with RemotePolicy(server.address, api_key="key") as client:
            assert client.infer({"marker": 2})["actions"].max() == 2
        assert "pruner_requests" in server.get("/metrics", {"Authorization": "Api-Key key"})
    assert "refused, without the API key" in caplog.text


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("text", "error: message: expected a binary frame with msgpack, got a text"),
        (b"\xc1garbage", "error: message: expected msgpack, got"),
        (pack([1]), "error: message: expected an observation's map, got list"),
        (pack({"state": 1}), "error: marker: expected one, got ['state']"),
        (pack({"marker": -1}), "error: RuntimeError in the server; its log says more"),
    ],
)
def test_errors_are_one_line_and_the_log_has_the_rest(data, said, caplog):
    with serving(EchoPolicy()) as server:
        text, code, reason = error_of(server.address, data)
        assert text.startswith(said)
        assert "\n" not in text
        assert (code, reason) == (1011, text[:100])
    assert "Traceback" in caplog.text or any(record.exc_info for record in caplog.records)
    assert ("a secret" in caplog.text) == ("RuntimeError" in said)


def test_errors_are_short_whatever_was_sent(caplog):
    """A client could have filled the log, and held up the others while it was written."""
    with serving(EchoPolicy()) as server:
        text, *_ = error_of(server.address, pack({f"{n:0200d}": n for n in range(4000)}))
    assert text.startswith("error: marker: expected one, got ['000")
    assert text.endswith(" ...")
    assert len(text) < 600
    assert len(caplog.text) < 10_000


def test_web_pages_are_refused():
    """A browser says which page asks; anyone's could reach a server on loopback."""
    with serving(EchoPolicy()) as server:
        with pytest.raises(InvalidStatus, match="HTTP 403"):
            websockets.sync.client.connect(
                f"ws://{server.address}", origin="https://example.com", proxy=None
            )
        RemotePolicy(server.address).close()


def test_a_message_that_is_too_large():
    with serving(EchoPolicy(), max_message_bytes=MIB) as server:
        with RemotePolicy(server.address) as client:
            client.infer({"marker": 1, "image": np.zeros(MIB - 200, np.uint8)})
            with pytest.raises(OSError, match=r"message too big.* exceeds limit of 1048576 bytes"):
                client.infer({"marker": 1, "image": np.zeros(8 * MIB, np.uint8)})
        wait_for(lambda: server.metric('pruner_requests_total{outcome="error"}') == 1)


def test_a_full_queue_is_busy_and_the_connection_goes_on():
    policy = EchoPolicy()
    policy.gate.clear()
    with serving(policy, max_queue=2) as server, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(RemotePolicy(server.address)) for _ in range(3)]
        waiting = [
            threading.Thread(target=client.infer, args=({"marker": 1},)) for client in clients[:2]
        ]
        for thread in waiting:
            thread.start()
        wait_for(lambda: server.metric("pruner_queue_depth") == 1)
        with pytest.raises(ValueError, match="busy: expected fewer than 2 requests at once"):
            clients[2].infer({"marker": 3})
        policy.gate.set()
        for thread in waiting:
            thread.join()
        assert clients[2].infer({"marker": 3})["actions"].max() == 3
        assert server.metric('pruner_requests_total{outcome="busy"}') == 1


def test_more_clients_than_may_be():
    with serving(EchoPolicy(), max_clients=1) as server:
        with RemotePolicy(server.address) as client:
            with pytest.raises(OSError, match="503"):
                RemotePolicy(server.address)
            assert client.infer({"marker": 1})["actions"].max() == 1
            assert server.get("/healthz") == "OK\n"
        wait_for(lambda: server.metric("pruner_connections") == 0)
        RemotePolicy(server.address).close()


def test_a_port_that_is_taken():
    with serving(EchoPolicy()) as server:
        other = PolicyServer(EchoPolicy(), ServerSettings(port=server.port))
        with pytest.raises(OSError, match="address already in use"):
            asyncio.run(other.run(asyncio.Event()))


def test_requests_of_several_clients_are_one_batch():
    policy = EchoPolicy()
    with (
        serving(policy, max_batch=3, batch_wait_ms=5000) as server,
        contextlib.ExitStack() as stack,
    ):
        clients = [stack.enter_context(RemotePolicy(server.address)) for _ in range(3)]
        found = {}

        def ask(marker):
            found[marker] = clients[marker].infer({"marker": marker})

        threads = [threading.Thread(target=ask, args=(marker,)) for marker in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert {marker: each["actions"].max() for marker, each in found.items()} == {
            0: 0,
            1: 1,
            2: 2,
        }
        assert sorted(policy.batches[0]) == [0, 1, 2]
        assert found[0]["server_timing"]["batch_size"] == 3


def is_stopping(server):
    """Whether its health is that of a server that stops."""
    try:
        return server.get("/healthz") != "OK\n"
    except urllib.error.HTTPError as error:
        return error.code == 503


def test_stopping_finishes_what_runs_and_refuses_what_comes():
    policy = EchoPolicy()
    with serving(policy) as server, RemotePolicy(server.address) as late:
        policy.gate.clear()
        answers = []
        with RemotePolicy(server.address) as client:
            running = threading.Thread(
                target=lambda: answers.append(client.infer({"marker": 7})["actions"].max())
            )
            running.start()
            assert policy.entered.wait(10)
            server.tell_to_stop()
            wait_for(lambda: is_stopping(server))
            with pytest.raises(ValueError, match="stopping: the server takes no more requests"):
                late.infer({"marker": 8})
            with pytest.raises(OSError, match="503"):
                RemotePolicy(server.address)
            policy.gate.set()
            running.join()
            server.stop()
            assert answers == [7]
            with pytest.raises(OSError, match="going away"):
                client.infer({"marker": 9})
        with pytest.raises(ConnectionError, match="expected a policy server"):
            RemotePolicy(server.address)


def test_settings_that_cannot_be():
    for name, value in {"port": -1, "max_batch": 0, "max_clients": 0, "batch_wait_ms": -1}.items():
        with pytest.raises(ValueError, match=f"{name}: expected"):
            ServerSettings(**{name: value})


async def ask_for(address, client, until, latencies):
    """Asks with markers of its own; the number of answers, each of which is to its request."""
    generator, count = np.random.default_rng(client), 0
    image = np.zeros((64, 64, 3), np.uint8)
    async with connect(f"ws://{address}", compression=None, max_size=None, proxy=None) as server:
        await server.recv()
        while time.monotonic() < until:
            marker = client + generator.random()
            started = time.perf_counter()
            await server.send(pack({"marker": marker, "image": image}))
            answer = unpack(await server.recv())
            latencies.append(time.perf_counter() - started)
            assert (answer["actions"] == marker).all()
            count += 1
            await asyncio.sleep(generator.random() / 100)
    return count


def killed_client(address):
    """Sends a request and is gone, without a word."""
    with websockets.sync.client.connect(f"ws://{address}", proxy=None) as connection:
        connection.recv()
        connection.send(pack({"marker": 1}))
        linger = struct.pack("ii", 1, 0)  # the close is a reset
        connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        connection.socket.close()


def garbage_client(address):
    """Sends bytes that are no websocket, and messages that are none."""
    host, port = address.split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(os.urandom(2000))
    error_of(address, os.urandom(1000))


def silent_client(address, stop):
    """Asks for large answers and never reads one."""
    with websockets.sync.client.connect(f"ws://{address}", max_queue=1, proxy=None) as connection:
        connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        observation = {"marker": 2, "horizon": 20_000, "image": np.zeros(MIB, np.uint8)}
        connection.socket.settimeout(1)
        with contextlib.suppress(OSError, ConnectionClosed):
            while not stop.is_set():
                connection.send(pack(observation))
        stop.wait()
        connection.socket.close()


def ask_all(address, seconds):
    """32 clients: the answers of each, and how long each answer took."""

    async def gathered():
        until = time.monotonic() + seconds
        return await asyncio.gather(*(ask_for(address, n, until, latencies) for n in range(32)))

    latencies: list[float] = []
    return asyncio.run(gathered()), latencies


@pytest.mark.slow
def test_many_clients_and_bad_ones():
    """No answer is lost or mixed up, memory does not grow, and nobody notices the bad clients."""
    with ServerProcess(delay=0.005, max_batch=8) as server:
        stop = threading.Event()

        def misbehave():
            while not stop.wait(0.2):
                killed_client(server.address)
                garbage_client(server.address)

        _, undisturbed = ask_all(server.address, LOAD / 4)
        silent = {"target": silent_client, "args": (server.address, stop)}
        bad = [threading.Thread(target=misbehave)] + [threading.Thread(**silent) for _ in range(3)]
        for thread in bad:
            thread.start()
        try:
            ask_all(server.address, LOAD / 4)
            memory = server.metric("process_resident_memory_bytes")
            answered = server.metric('pruner_requests_total{outcome="ok"}')
            counts, latencies = ask_all(server.address, LOAD)
            answered = server.metric('pruner_requests_total{outcome="ok"}') - answered
            grown = (server.metric("process_resident_memory_bytes") - memory) / MIB
        finally:
            stop.set()
            for thread in bad:
                thread.join()
        before, during = (np.percentile(each, (50, 99)) * 1e3 for each in (undisturbed, latencies))
        print(
            f"\n32 clients, {LOAD:.0f} s: {sum(counts)} answers, {min(counts)} to {max(counts)} a "
            f"client; p50 and p99 {before.round(1)} ms alone, {during.round(1)} ms beside bad "
            f"clients; memory grew by {grown:.1f} MiB"
        )
        assert 0 <= answered - sum(counts) < sum(counts) / 2  # and those of the bad ones
        assert min(counts) > max(counts) / 2
        assert server.metric('pruner_batch_size_bucket{le="4.0"}') < sum(counts)
        assert during[0] < 10 * before[0]
        assert grown < 32

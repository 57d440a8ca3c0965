"""openpi's client as it is on PyPI, with its broker and runtime, against our server."""

import time

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus

from parity_tests.run.policies import LIBERO, EchoModel, echo_policy, pruned
from parity_tests.run.servers import EchoPolicy, serving
from pruner_run import msgpack_numpy
from pruner_run.data.examples import random_observation
from pruner_run.kept_bits import kept_patches


@pytest.fixture(scope="session")
def client(openpi_client):
    """Connects to a port of loopback."""
    from openpi_client.websocket_client_policy import WebsocketClientPolicy

    return lambda server, **options: WebsocketClientPolicy("127.0.0.1", server.port, **options)


class PruningModel(EchoModel):
    """Keeps three patches of each camera."""

    def kept(self):
        return dict.fromkeys(("base_0_rgb", "left_wrist_0_rgb"), np.arange(16)[None] < 3)


@pytest.fixture(scope="module")
def libero():
    """A policy of LIBERO's transforms around no model, served."""
    policy = echo_policy(pruned(LIBERO), model=PruningModel())
    with serving(policy, max_message_bytes=2**20) as server:
        yield policy, server


def test_it_infers(client, libero):
    policy, server = libero
    found = client(server)
    assert found.get_server_metadata() == policy.metadata
    answer = found.infer(policy.example())
    assert answer["actions"].shape == (LIBERO.model.action_horizon, 7)
    assert answer["server_timing"]["infer_ms"] > 0


def test_the_messages_are_the_same(openpi_client, libero):
    from openpi_client import msgpack_numpy as theirs

    policy, _ = libero
    for message in (policy.example(), policy.infer(policy.example()), policy.metadata):
        packed = theirs.packb(message)
        assert msgpack_numpy.pack(message) == packed
        assert theirs.packb(msgpack_numpy.unpack(packed)) == packed


def test_it_reconnects_after_a_restart(client):
    with serving(EchoPolicy()) as server:
        found = client(server)
        assert found.infer({"marker": 1})["actions"].max() == 1
        port = server.port
        server.stop()
        with pytest.raises(ConnectionClosed):
            found.infer({"marker": 2})
        with pytest.raises(ConnectionRefusedError):
            client(server)
    with serving(EchoPolicy(), port=port) as server:
        assert client(server).infer({"marker": 3})["actions"].max() == 3


def test_a_wrong_key(client):
    with serving(EchoPolicy(), api_key="right") as server:
        assert client(server, api_key="right").infer({"marker": 1})
        for options in ({"api_key": "wrong"}, {}):
            with pytest.raises(InvalidStatus, match="HTTP 401") as refused:
                client(server, **options)
            assert b"expected 'Api-Key' and the server's key" in refused.value.response.body


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"observation/image": None}, r"images: expected \['observation/image'\], got"),
        (
            {"observation/image": np.zeros((64, 64, 3), np.int64)},
            r"observation/image: expected \[H, W, 3\] or .* of uint8.*, got .* of int64",
        ),
        (
            {"observation/image": np.zeros((224, 3), np.uint8)},
            r"observation/image: .*got \[224, 3\]",
        ),
        ({"observation/state": np.zeros(7)}, "observation/state: expected 8 numbers, got 7"),
        ({"observation/state": np.full(8, np.nan)}, "observation/state: expected finite numbers"),
        ({"observation/state": "text"}, "observation/state: expected a vector of numbers, got"),
        ({"prompt": 5}, "prompt: expected a text, got"),
        ({"prompt": None}, "prompt: expected an instruction"),
    ],
)
def test_observations_that_do_not_fit(client, libero, change, said):
    policy, server = libero
    observation = {k: v for k, v in (policy.example() | change).items() if v is not None}
    with pytest.raises(RuntimeError, match=f"Error in inference server:\nerror: {said}"):
        client(server).infer(observation)


def test_a_message_that_is_too_large(client, libero):
    policy, server = libero
    large = {"observation/image": np.zeros((1000, 1000, 3), np.uint8)}
    with pytest.raises(ConnectionClosed, match=r"message too big.*exceeds limit of 1048576 bytes"):
        client(server).infer(policy.example() | large)


def test_the_broker_and_the_runtime(client, openpi_client, libero):
    """An episode of openpi's runtime, its actions one at a time from chunks."""
    from openpi_client.action_chunk_broker import ActionChunkBroker
    from openpi_client.runtime.agents.policy_agent import PolicyAgent
    from openpi_client.runtime.environment import Environment
    from openpi_client.runtime.runtime import Runtime

    policy, server = libero
    horizon = LIBERO.model.action_horizon
    applied = []

    class Simulator(Environment):
        def reset(self):
            self.steps = 0

        def is_episode_complete(self):
            return self.steps >= 2 * horizon

        def get_observation(self):
            generator = np.random.default_rng(self.steps)
            return random_observation(policy.metadata, generator, prompt="go on")

        def apply_action(self, action):
            self.steps += 1
            applied.append(action)

    broker = ActionChunkBroker(client(server), action_horizon=horizon)
    started = time.monotonic()
    Runtime(Simulator(), PolicyAgent(broker), subscribers=[], max_hz=0).run()
    assert time.monotonic() - started < 30
    assert [action["actions"].shape for action in applied] == [(7,)] * 2 * horizon
    assert applied[0]["pruning"] == applied[1]["pruning"]
    assert kept_patches(applied[0])["base_0_rgb"].sum() == 3

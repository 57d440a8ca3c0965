"""openpi's own outputs (JAX, float32, So400m vision and dummy experts), from both backends."""

import hashlib
import pathlib
from typing import Any

import numpy as np
import pytest

from parity_tests.golden import fill, golden_inputs
from parity_tests.harness import BACKENDS, Batch, relative_norm
from parity_tests.record import check
from parity_tests.tolerances import tolerance
from pruner_spec import sequence
from pruner_spec.config import Pi0Config
from pruner_spec.flow import euler_time_embeddings
from pruner_spec.layout import OPENPI_JAX, from_named
from pruner_spec.observation import Observation

GOLDEN = pathlib.Path(__file__).parent / "golden"
FILES = {"h10_l32": "openpi_pi05_h10_l32", "pi0_h50_l48": "openpi_pi0_h50_l48"}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=FILES)
def golden(request) -> "Golden":
    return Golden(request.param)


@pytest.fixture(scope="module", params=BACKENDS)
def outputs(request, golden) -> dict[str, np.ndarray]:
    """What our model gives for the golden inputs, under the golden names."""
    backend = BACKENDS[request.param]
    model = backend.model(golden.config, golden.parameters())
    if request.param == "torch":
        model.module.vision.forward = remembered(model.module.vision.forward)
    embeddings = euler_time_embeddings(10, golden.config.action_expert.width)
    observed = model.compiled(everything)(golden.observation, *golden.arrays, embeddings)
    sampled = model.sample(golden.observation, golden.arrays[1])
    return observed | {"sample_actions": sampled, "backend": request.param}


def remembered(forward: Any) -> Any:
    """The vision tower, which takes seconds to answer and is asked for the same images thrice."""
    last: list[Any] = []

    def once(images: Any, *options: Any) -> Any:
        if not last or not images.equal(last[0]):
            last[:] = [images, forward(images, *options)]
        return last[1]

    return once


class Golden:
    """One golden file: the config and the inputs that made it, and its numbers."""

    def __init__(self, case: str) -> None:
        inputs = golden_inputs.model_inputs(case)
        self.inputs = inputs
        self.numbers = np.load(GOLDEN / f"{FILES[case]}.npz")
        self.config = Pi0Config(
            dtype="float32",
            paligemma_variant="dummy",
            action_expert_variant="dummy",
            pi05=inputs["pi05"],
            action_horizon=inputs["action_horizon"],
            max_token_len=inputs["max_token_len"],
        )
        self.observation = Observation(
            images=inputs["images"],
            image_masks=inputs["image_masks"],
            state=inputs["state"],
            tokenized_prompt=inputs["tokenized_prompt"],
            tokenized_prompt_mask=inputs["tokenized_prompt_mask"],
        )
        self.arrays = tuple(inputs[name] for name in ("actions", "noise", "time"))

    def parameters(self) -> dict[str, Any]:
        """openpi's JAX tree, filled as the golden numbers' was."""
        return fill.fill_tree(OPENPI_JAX.shapes(self.config))


def everything(
    module: Any, observation: Any, actions: Any, noise: Any, time: Any, embeddings: Any
) -> dict:
    """All that the golden files hold, by the public methods that both backends share."""
    observation = module.prepare(observation)
    prefix = module.embed_prefix(observation)
    fraction = time[:, None, None]
    noisy = fraction * noise + (1 - fraction) * actions
    suffix = module.embed_suffix(observation.state, noisy, time)
    joint_prefix, joint_suffix = module.joint(prefix, suffix)
    mask, positions = module.attention(prefix)
    length = prefix.tokens.shape[1]
    prefill, cache = module.gemma.prefill(
        prefix.tokens, mask[:, :length, :length], positions[:, :length]
    )
    found = {
        "prefix_tokens": prefix.tokens,
        "prefix_input_mask": prefix.valid,
        "suffix_tokens": suffix.tokens,
        "suffix_adarms_cond": suffix.condition,
        "loss": module.compute_loss(observation, actions, noise, time, train=True),
        "v_t": module.action_out_proj(joint_suffix[:, -actions.shape[1] :]),
        "joint_prefix_out": joint_prefix,
        "joint_suffix_out": joint_suffix,
        "prefill_out": prefill,
        "prefill_k": cache.key,
        "prefill_v": cache.value,
    }
    states, velocities = [noise], []
    for embedding in embeddings:
        velocity = module.velocity(prefix, cache, observation.state, states[-1], embedding)
        velocities.append(velocity)
        states.append(states[-1] + float(np.float32(-0.1)) * velocity)
    steps = {f"denoise_v {step}": v for step, v in enumerate(velocities)}
    steps |= {f"denoise_x {step}": x for step, x in enumerate(states)}
    return {name: value for name, value in (found | steps).items() if value is not None}


def stored_part(name: str, found: np.ndarray) -> np.ndarray:
    """The part of an output that its golden array holds."""
    strides = {
        "prefix_tokens": (slice(None), slice(None, None, 5)),
        "joint_prefix_out": (slice(None), slice(None, None, 13)),
        "prefill_out": (slice(None), slice(None, None, 13)),
        "prefill_k": (slice(None), slice(None), slice(None, None, 29)),
        "prefill_v": (slice(None), slice(None), slice(None, None, 29)),
    }
    return found[strides.get(name, ...)]


def test_the_fillers_are_those_that_made_the_golden_numbers(golden):
    shas = golden.numbers
    for name in ("state", "actions", "noise", "tokenized_prompt"):
        digest = hashlib.sha256(np.ascontiguousarray(golden.inputs[name]).tobytes()).hexdigest()
        assert digest == str(shas[f"input_sha__{name}"])


NAMES = (
    "prefix_tokens",
    "suffix_tokens",
    "suffix_adarms_cond",
    "loss",
    "v_t",
    "joint_prefix_out",
    "joint_suffix_out",
    "prefill_out",
    "prefill_k",
    "prefill_v",
    "sample_actions",
)


@pytest.mark.parametrize("name", NAMES)
def test_output(golden, outputs, name):
    if name not in golden.numbers:
        assert (name, golden.config.pi05) == ("suffix_adarms_cond", False)
        assert name not in outputs
        return
    measured = np.abs(stored_part(name, outputs[name]) - golden.numbers[name]).max()
    check("openpi", "float32", f"{outputs['backend']} | openpi: {name}", float(measured))


def test_every_denoising_step(golden, outputs):
    for kind in ("denoise_v", "denoise_x"):
        expected = golden.numbers[kind]
        for step, want in enumerate(expected):
            measured = np.abs(outputs[f"{kind} {step}"][:, ::7] - want).max()
            who = f"{outputs['backend']} | openpi: {kind}"
            check("openpi", "float32", who, float(measured), f"step {step}")


def test_masks(golden, outputs):
    np.testing.assert_array_equal(outputs["prefix_input_mask"], golden.numbers["prefix_input_mask"])
    assert not golden.numbers["prefix_ar_mask"].any()
    place = np.arange(golden.config.suffix_length)
    np.testing.assert_array_equal(
        sequence.block_start(golden.config, place, 0), golden.numbers["suffix_ar_mask"]
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients(backend):
    """Of the mean loss with respect to every parameter, in openpi's own layout."""
    golden = Golden("h10_l32")
    numbers = np.load(GOLDEN / f"{FILES['h10_l32']}_grads.npz")
    model = BACKENDS[backend].model(golden.config, golden.parameters())
    model.module.gradient_checkpointing = "full"  # the same numbers in less memory
    found = model.gradients(Batch(golden.observation, *golden.arrays, pruner_noise=None))
    for name, gradient in from_named(found, golden.config, OPENPI_JAX):
        flat = gradient.reshape(-1).astype(np.float64)
        part = flat[:: max(1, flat.size // 257)][:300]
        expected, norm = numbers[f"{name}#slice"], float(numbers[f"{name}#norm"])
        if name.endswith("key/bias"):  # 0 in exact arithmetic: what is there is rounding
            query = float(numbers[name.replace("key", "query") + "#norm"])
            bound = tolerance("vanishing gradient", "float32") * query
            assert max(norm, np.linalg.norm(flat)) <= bound
            continue
        who = f"{backend} | openpi"
        check("openpi gradient", "float32", who, relative_norm(part, expected), name)
        check("openpi gradient", "float32", who, relative_norm(np.linalg.norm(flat), norm), name)

"""`PI0Pytorch`: what openpi's trainer and policy call, they can call here."""

import logging
import types

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from parity_tests.cases import ADAPTERS, tiny_config
from parity_tests.harness import BACKENDS, draw_batch, error, parameters
from parity_tests.record import check
from pruner_spec.layout import OPENPI_TORCH, from_named

if "torch" not in BACKENDS:
    pytest.skip("PyTorch is left out", allow_module_level=True)

import pruner_torch
from pruner_torch import openpi
from pruner_torch.inference import Sampler
from pruner_torch.openpi import PI0Pytorch


def openpi_config(**settings: object) -> types.SimpleNamespace:
    """An object with some of openpi's fields, and one that is none of ours."""
    fields = {
        "pi05": True,
        "paligemma_variant": "dummy",
        "action_expert_variant": "dummy",
        "dtype": "float32",
        "max_token_len": 32,
        "pytorch_compile_mode": "max-autotune",
    }
    return types.SimpleNamespace(**(fields | settings))


def tiny(**settings: object) -> PI0Pytorch:
    """A tiny model with weights in which nothing is constant."""
    config = tiny_config(dtype="float32", **settings)
    model = PI0Pytorch(config, seed=None)
    weights = parameters(config)
    model.pi0 = BACKENDS["torch"].model(config, weights).module.cpu()
    return model


def openpi_observation(batch, channels_first: bool = True):
    """openpi's object: attributes, images channels first."""
    observation = batch.observation.map(lambda array: torch.tensor(np.asarray(array)))
    images = {
        name: image.permute(0, 3, 1, 2) if channels_first else image
        for name, image in observation.images.items()
    }
    return types.SimpleNamespace(
        images=images,
        image_masks=observation.image_masks,
        state=observation.state,
        tokenized_prompt=observation.tokenized_prompt,
        tokenized_prompt_mask=observation.tokenized_prompt_mask,
    )


@pytest.mark.slow
def test_the_acceptance_of_users():
    """dummy experts, the full vision tower, three random cameras, 32 tokens, noise 0.5."""
    model = PI0Pytorch(openpi_config(token_pruning_enabled=True, token_prune_noise_scale=0.5))
    torch.manual_seed(0)
    images = [torch.rand(2, 3, 224, 224) * 2 - 1 for _ in range(3)]
    masks = [torch.ones(2, dtype=torch.bool)] * 3
    tokens = torch.randint(2, 257_152, (2, 32))
    arguments = (images, masks, tokens, torch.ones(2, 32, dtype=torch.bool))

    model.train()
    embeddings, padding, attention = model.embed_prefix(*arguments)
    assert embeddings.shape == (2, 800, 64)
    assert padding.shape == attention.shape == (2, 800)
    assert model.last_kept_per_sample is None
    embeddings.square().mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert gradients["pi0.vision.head.kernel"].abs().sum() > 0
    assert gradients["pi0.gemma.embedder.embedding"].abs().sum() > 0

    model.eval()
    with torch.no_grad():
        embeddings, padding, _ = model.embed_prefix(*arguments)
    assert embeddings.shape[1] < 200
    kept = model.last_kept_per_sample
    assert kept.tolist() == (padding.sum(dim=1) - 32).tolist()
    assert (kept >= 3).all()


def test_the_log_line(caplog):
    with caplog.at_level(logging.INFO):
        PI0Pytorch(tiny_config(token_pruning_enabled=True), seed=None)
    assert "Enabled LightVLA-style token pruning (hidden_size=72)" in caplog.text


def test_any_object_with_openpis_fields_is_a_config():
    model = PI0Pytorch(openpi_config(vision_variant="tiny/32"), seed=None)
    assert model.config.pi05
    assert model.config.action_horizon == 50
    assert not model.token_pruning_enabled
    assert pruner_torch.PI0Pytorch is PI0Pytorch


@pytest.mark.parametrize("channels_first", [True, False])
def test_sampling_is_the_models_own(channels_first):
    model = tiny(token_pruning_enabled=True)
    batch = draw_batch(model.config)
    observation = openpi_observation(batch, channels_first)
    found = model.sample_actions("cpu", observation, torch.tensor(batch.noise), num_steps=3)
    expected = model.pi0.sample_actions(batch.observation, batch.noise, num_steps=3)
    np.testing.assert_array_equal(found, expected)
    assert model.sample_actions("cpu", observation).shape == (2, 11, 7)
    assert model.get_token_pruning_stats()["enabled"]


@pytest.mark.parametrize(
    ("compile_", "with_pruning", "expected"),
    [
        (None, None, None),
        ("0", None, None),
        ("0", "1", None),
        ("1", None, True),
        ("1", "1", True),
        ("1", "0", None),
        (None, "1", True),
    ],
)
def test_openpis_environment_says_whether_to_compile(monkeypatch, compile_, with_pruning, expected):
    """On a CPU, where nothing else is fast by default."""
    for name, value in (("", compile_), ("_PRUNING", with_pruning)):
        if value is None:
            monkeypatch.delenv(f"OPENPI_TORCH_COMPILE{name}", raising=False)
        else:
            monkeypatch.setenv(f"OPENPI_TORCH_COMPILE{name}", value)
    device = torch.device("cpu")
    settings = openpi._inference_settings(is_pruning=True, device=device)
    assert (settings and settings.compiled) == expected


def test_another_word_in_the_environment_is_refused(monkeypatch):
    monkeypatch.setenv("OPENPI_TORCH_COMPILE", "maybe")
    with pytest.raises(ValueError, match="OPENPI_TORCH_COMPILE: expected 0 or 1, got 'maybe'"):
        openpi._inference_settings(is_pruning=True, device=torch.device("cpu"))


@pytest.mark.slow
def test_compiled_actions_are_the_models_own(monkeypatch):
    """And stay so when the parameters are trained further, or loaded anew."""
    monkeypatch.setenv("OPENPI_TORCH_COMPILE", "1")
    model = tiny(token_pruning_enabled=True).eval()
    batch = draw_batch(model.config)
    observation, noise = openpi_observation(batch), torch.from_numpy(batch.noise)

    def same() -> None:
        found = model.sample_actions("cpu", observation, noise, num_steps=2)
        expected = model.pi0.sample_actions(batch.observation, noise, num_steps=2)
        check("same computation", "float32", "torch, compiled", error(found, expected))

    same()
    first = model._deployed
    same()
    assert model._deployed is first
    assert isinstance(first[1], Sampler)
    with torch.no_grad():
        model.pi0.gemma.action.layers[0].mlp.gate.kernel.mul_(1.5)
    same()
    assert model._deployed is not first
    model.load_state_dict({name: 0.9 * x for name, x in model.state_dict().items()})
    same()


@pytest.mark.parametrize("scope", ["camera", "joint"])
def test_training_draws_its_own_noise(scope):
    model = tiny(
        token_pruning_enabled=True, token_prune_noise_scale=1.0, token_prune_scope=scope
    ).train()
    batch = draw_batch(model.config)
    observation, actions = openpi_observation(batch), torch.tensor(batch.actions)
    noise, time = torch.tensor(batch.noise), torch.tensor(batch.time)
    losses = [model(observation, actions, noise, time) for _ in range(2)]
    assert losses[0].shape == (2, 11)
    assert not torch.equal(*losses)
    model.set_token_pruner_noise_scale(0.0)
    quiet = [model(observation, actions, noise, time) for _ in range(2)]
    torch.testing.assert_close(*quiet, rtol=0, atol=0)
    expected = model.pi0.compute_loss(batch.observation, batch.actions, batch.noise, batch.time)
    torch.testing.assert_close(quiet[0], expected, rtol=0, atol=0)
    assert model(observation, actions).isfinite().all()
    model.eval()
    hard = model(observation, actions, noise, time)
    expected = model.pi0.compute_loss(
        batch.observation, batch.actions, batch.noise, batch.time, train=False
    )
    torch.testing.assert_close(hard, expected, rtol=0, atol=0)


@pytest.mark.parametrize("adapters", ["none", "both", "action"])
def test_openpis_state_dict_loads(adapters):
    """Under openpi's own tensor names, as `safetensors.torch.load_model` gives them."""
    config = tiny_config(dtype="float32", **ADAPTERS[adapters])
    weights = parameters(config)
    theirs = {
        name: torch.tensor(np.asarray(tensor))
        for name, tensor in from_named(weights, config, OPENPI_TORCH)
    }
    model = PI0Pytorch(config)
    model.load_state_dict(theirs, strict=True)
    batch = draw_batch(config)
    found = model.pi0.sample_actions(batch.observation, batch.noise)
    expected = BACKENDS["torch"].model(config, weights).sample(batch.observation, batch.noise)
    check("same computation", "float32", "torch, openpi's names", error(found, expected))
    del theirs["action_in_proj.weight"]
    with pytest.raises(ValueError, match="action_in_proj"):
        model.load_state_dict(theirs, strict=True)


def test_gradient_checkpointing_can_be_switched():
    model = tiny()
    model.gradient_checkpointing_enable()
    assert model.pi0.gradient_checkpointing == "full"
    model.gradient_checkpointing_disable()
    assert model.pi0.gradient_checkpointing == "none"


@pytest.mark.parametrize("kind", ["bfloat16", "requires gradients"])
def test_openpis_state_dict_may_hold_any_tensors(kind):
    """As openpi's bfloat16 files, and a model's own parameters, have them."""
    config = tiny_config(dtype="bfloat16")
    tensors = {
        name: torch.tensor(np.asarray(tensor))
        for name, tensor in from_named(parameters(config), config, OPENPI_TORCH)
    }
    given = {
        name: tensor.to(torch.bfloat16) if kind == "bfloat16" else tensor.requires_grad_()
        for name, tensor in tensors.items()
    }
    model = PI0Pytorch(config)
    model.load_state_dict(given, strict=True)
    found = model.pi0.action_in_proj.kernel
    expected = given["action_in_proj.weight"].detach().T.to(found.dtype)
    assert torch.equal(found, expected)

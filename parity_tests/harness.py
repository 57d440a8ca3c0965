"""One face for both backends: NumPy in, NumPy out.

A backend whose framework is not installed is not in `BACKENDS`; what compares the two is skipped
then, and what holds one to the reference still runs.
"""

import contextlib
import dataclasses
import importlib.util
import os
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from pruner_spec.config import CAMERAS, Pi0Config
from pruner_spec.observation import Observation
from pruner_spec.parameters import parameter_table, random_parameters

WITHOUT = os.environ.get("PARITY_WITHOUT", "").split(",")
DEVICE = os.environ.get("PARITY_DEVICE", "cpu")  # or "cuda", for both backends


class JaxBackend:
    """pruner_jax."""

    name = "jax"

    def full_precision(self) -> None:
        import jax

        jax.config.update("jax_default_matmul_precision", "highest")

    @contextlib.contextmanager
    def precision(self, dtype: str) -> Iterator[None]:
        """Enables float64 where a case is about it, and only there.

        What such a case proves is the mathematics: XLA may leave out its optimizations, which take
        most of the time. Cases in float32 are about rounding, and are compiled as users' are.
        """
        import jax

        before = jax.config.read("jax_disable_most_optimizations")
        jax.config.update("jax_disable_most_optimizations", before or dtype == "float64")
        try:
            with jax.enable_x64(dtype == "float64"):
                yield
        finally:
            jax.config.update("jax_disable_most_optimizations", before)

    def module(self, name: str) -> Any:
        return importlib.import_module(f"pruner_jax.{name}")

    def array(self, value: Any, dtype: str | None = None) -> Any:
        import jax.numpy as jnp

        value = np.asarray(value)
        is_float = value.dtype.kind == "f"
        return jnp.asarray(value, dtype=dtype if dtype and is_float else None)

    def numpy(self, value: Any) -> np.ndarray:
        return np.asarray(value)

    def gradient(self, function: Any, *arguments: Any) -> tuple[np.ndarray, ...]:
        """Gradients of a scalar function with respect to each argument."""
        import jax

        found = jax.grad(function, argnums=tuple(range(len(arguments))))(*arguments)
        return tuple(map(np.asarray, found))

    def layer(self, stacked: Any, place: int) -> Any:
        """One of the layers that `layers.stack` made."""
        import jax
        from flax import nnx

        graph, state = nnx.split(stacked)
        return nnx.merge(graph, jax.tree.map(lambda leaf: leaf[place], state))

    def model(self, config: Pi0Config, parameters: Mapping[str, np.ndarray]) -> "JaxModel":
        return JaxModel(config, parameters)


class TorchBackend:
    """pruner_torch."""

    name = "torch"

    def full_precision(self) -> None:
        import torch

        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False

    @contextlib.contextmanager
    def precision(self, dtype: str) -> Iterator[None]:
        yield

    def module(self, name: str) -> Any:
        return importlib.import_module(f"pruner_torch.{name}")

    def array(self, value: Any, dtype: str | None = None) -> Any:
        import torch

        tensor = torch.tensor(np.asarray(value), device=DEVICE)
        return tensor.to(getattr(torch, dtype)) if dtype and tensor.is_floating_point() else tensor

    def numpy(self, value: Any) -> np.ndarray:
        import torch

        value = value.detach().cpu()
        if value.dtype == torch.bfloat16:
            return value.float().numpy().astype(ml_dtypes.bfloat16)
        if value.dtype == torch.float8_e4m3fn:
            return value.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn)
        return value.numpy()

    def gradient(self, function: Any, *arguments: Any) -> tuple[np.ndarray, ...]:
        """Gradients of a scalar function with respect to each argument."""
        import torch

        for argument in arguments:
            argument.requires_grad_(True)
        return tuple(map(self.numpy, torch.autograd.grad(function(*arguments), arguments)))

    def layer(self, stacked: Any, place: int) -> Any:
        """One of the layers that `layers.stack` made."""
        return stacked[place]

    def model(self, config: Pi0Config, parameters: Mapping[str, np.ndarray]) -> "TorchModel":
        return TorchModel(config, parameters)


def _installed(framework: str) -> bool:
    return framework not in WITHOUT and importlib.util.find_spec(framework) is not None


BACKENDS: dict[str, Any] = {
    backend.name: backend for backend in (JaxBackend(), TorchBackend()) if _installed(backend.name)
}


class JaxModel:
    """A `pruner_jax` model."""

    def __init__(self, config: Pi0Config, parameters: Mapping[str, np.ndarray]) -> None:
        from pruner_jax import checkpoint

        self.config, self.backend = config, BACKENDS["jax"]
        with self.backend.precision(config.dtype):
            self.module = checkpoint.load(parameters, config)

    def loss(self, batch: "Batch", **options: Any) -> np.ndarray:
        import jax
        from flax import nnx

        graph, weights = nnx.split(self.module)

        @jax.jit
        def loss(weights: Any, *arrays: Any) -> Any:
            return nnx.merge(graph, weights).compute_loss(*arrays, **options)

        with self.backend.precision(self.config.dtype):
            return np.asarray(loss(weights, *batch.loss_arguments()))

    def gradients(self, batch: "Batch", **options: Any) -> dict[str, np.ndarray]:
        """Of the mean loss, by parameter name."""
        import jax
        from flax import nnx

        graph, weights = nnx.split(self.module)

        @jax.jit
        @jax.grad
        def gradient(weights: Any, *arrays: Any) -> Any:
            return nnx.merge(graph, weights).compute_loss(*arrays, **options).mean()

        with self.backend.precision(self.config.dtype):
            found = nnx.to_flat_state(gradient(weights, *batch.loss_arguments()))
            return {".".join(path): np.asarray(leaf[...]) for path, leaf in found}

    def sample(self, observation: Observation, noise: np.ndarray, **options: Any) -> np.ndarray:
        with self.backend.precision(self.config.dtype):
            return np.asarray(self.module.sample_actions(observation, noise, **options))

    def stats(self) -> dict[str, Any]:
        with self.backend.precision(self.config.dtype):
            return self.module.get_token_pruning_stats()

    def compiled(self, function: Any) -> Any:
        """A function of (module, *NumPy arrays), compiled; its result as NumPy arrays."""
        import jax
        from flax import nnx

        graph, weights = nnx.split(self.module)
        traced = jax.jit(lambda weights, *arrays: function(nnx.merge(graph, weights), *arrays))

        def call(*arrays: Any) -> Any:
            with self.backend.precision(self.config.dtype):
                arrays = jax.tree.map(self.backend.array, arrays)
                return jax.tree.map(np.asarray, traced(weights, *arrays))

        return call


class TorchModel:
    """A `pruner_torch` model."""

    def __init__(self, config: Pi0Config, parameters: Mapping[str, np.ndarray]) -> None:
        from pruner_torch import checkpoint

        self.config, self.backend = config, BACKENDS["torch"]
        self.module = checkpoint.load(parameters, config, device=DEVICE)

    def loss(self, batch: "Batch", **options: Any) -> np.ndarray:
        import torch

        with torch.no_grad():
            return self.module.compute_loss(*batch.loss_arguments(), **options).cpu().numpy()

    def gradients(self, batch: "Batch", **options: Any) -> dict[str, np.ndarray]:
        """Of the mean loss, by parameter name; 0 for what the loss does not depend on."""
        import torch

        self.module.zero_grad(set_to_none=True)
        self.module.compute_loss(*batch.loss_arguments(), **options).mean().backward()
        parameters = dict(self.module.named_parameters())
        found = {}
        for family in parameter_table(self.config).values():
            layers = [
                torch.zeros_like(parameters[name])
                if parameters[name].grad is None
                else parameters[name].grad
                for name in family.torch_names
            ]
            stacked = layers[0] if family.layers is None else torch.stack(layers)
            found[family.name] = self.backend.numpy(stacked)
        return found

    def sample(self, observation: Observation, noise: np.ndarray, **options: Any) -> np.ndarray:
        return self.module.sample_actions(observation, noise, **options).cpu().numpy()

    def stats(self) -> dict[str, Any]:
        return self.module.get_token_pruning_stats()

    def compiled(self, function: Any) -> Any:
        """A function of (module, *NumPy arrays); its result as NumPy arrays."""
        import torch
        from torch.utils import _pytree as pytree

        def call(*arrays: Any) -> Any:
            tensors = [
                array if isinstance(array, Observation) else self.backend.array(array)
                for array in arrays
            ]
            with torch.no_grad():
                return pytree.tree_map(self.backend.numpy, function(self.module, *tensors))

        return call


@dataclasses.dataclass(frozen=True)
class Batch:
    """Arrays of one batch; `pruner_noise` only where a case draws it."""

    observation: Observation
    actions: np.ndarray
    noise: np.ndarray
    time: np.ndarray
    pruner_noise: np.ndarray | None

    def loss_arguments(self) -> tuple[Any, ...]:
        return (self.observation, self.actions, self.noise, self.time, self.pruner_noise)

    def sample(self, place: int) -> "Batch":
        """The batch of one sample."""
        one = slice(place, place + 1)
        return Batch(
            observation=self.observation.map(lambda array: array[one]),
            actions=self.actions[one],
            noise=self.noise[one],
            time=self.time[one],
            pruner_noise=None if self.pruner_noise is None else self.pruner_noise[one],
        )


def forced_devices(count: int) -> dict[str, str]:
    """The environment of a process in which JAX sees so many CPU devices.

    Their collectives block a thread each of one pool, which is as large as the larger of devices
    and cores unless NPROC says otherwise. With a thread a device, two collectives of a step that do
    not wait for each other have been seen to take all threads, and neither to end.
    """
    flags = f"--xla_force_host_platform_device_count={count}"
    return {"XLA_FLAGS": flags, "NPROC": str(8 * count), "JAX_PLATFORMS": "cpu"}


def draw_batch(
    config: Pi0Config,
    lengths: tuple[int, ...] = (9, 20),
    present: tuple[tuple[bool, bool, bool], ...] = ((True, True, True), (True, True, False)),
    pruner_noise: bool = False,
    seed: int = 0,
) -> Batch:
    """A batch from a seed.

    Args:
        config: its sizes.
        lengths: prompt lengths, a sample each.
        present: per sample, which of the three cameras are there.
        pruner_noise: draws it too.
        seed: of everything.
    """
    generator = np.random.default_rng(seed)
    size, wide = len(lengths), "float64" if config.dtype == "float64" else "float32"
    tokens = generator.integers(2, config.paligemma.vocab_size, (size, config.max_token_len))
    prompt_mask = np.arange(config.max_token_len)[None, :] < np.array(lengths)[:, None]
    observation = Observation(
        images={
            camera: generator.uniform(-1, 1, (size, 224, 224, 3)).astype(wide) for camera in CAMERAS
        },
        image_masks={
            camera: np.array([sample[place] for sample in present])
            for place, camera in enumerate(CAMERAS)
        },
        state=generator.uniform(-1, 1, (size, config.action_dim)).astype(wide),
        tokenized_prompt=np.where(prompt_mask, tokens, 0).astype(np.int32),
        tokenized_prompt_mask=prompt_mask,
    )
    chunk = (size, config.action_horizon, config.action_dim)
    actions, noise = generator.standard_normal((2, *chunk)).astype(wide)
    time = generator.uniform(0.1, 0.9, size).astype(wide)
    drawn = None
    if pruner_noise:
        patches = config.vision.num_patches
        joint = config.token_prune_scope == "joint"
        pools = (3 * patches, 3 * patches) if joint else (3, patches, patches)
        drawn = generator.random((size, *pools)).astype(wide)
    return Batch(observation, actions, noise, time, drawn)


def parameters(config: Pi0Config, seed: int = 1) -> dict[str, np.ndarray]:
    """Weights in which nothing is constant, by name."""
    return dict(random_parameters(config, seed))


def others(found: np.ndarray, expected: np.ndarray, exact: np.ndarray) -> int:
    """How many float8 values are not those expected.

    Triton's interpreter rounds some otherwise: it takes either neighbour of a middle and either of
    a subnormal number, and loses the carry to the next power of two. There it counts all else that
    is not the nearest.

    Args:
        found, expected: float8 values.
        exact: what they are rounded from.
    """
    found, expected, exact = (x.astype(np.float64) for x in (found, expected, exact))
    if DEVICE == "cuda":
        return int(np.sum(found != expected))
    step = 2.0 ** np.maximum(np.frexp(np.abs(exact))[1] - 4, -9)
    room = np.where(np.abs(exact) < 2.0**-6, step, step / 2)
    is_power_of_two = np.frexp(np.abs(expected))[0] == 0.5
    return int(np.sum((np.abs(found - exact) > room) & ~is_power_of_two))


def error(found: Any, expected: Any) -> float:
    """Largest absolute difference over the largest absolute value expected (at least 1e-30)."""
    found, expected = (np.asarray(x, dtype=np.float64) for x in (found, expected))
    assert found.shape == expected.shape, (found.shape, expected.shape)
    if not found.size:
        return 0.0
    return float(np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-30))


def relative_norm(found: Any, expected: Any) -> float:
    """Norm of the difference over the norm of what is expected; 0 where both are 0."""
    found, expected = (np.asarray(x, dtype=np.float64) for x in (found, expected))
    assert found.shape == expected.shape, (found.shape, expected.shape)
    difference, norm = np.linalg.norm(found - expected), np.linalg.norm(expected)
    return float(difference / norm) if norm > 0 else float(difference)

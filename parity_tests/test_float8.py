"""Products of float8 values: what is rounded, what is multiplied, and what becomes of actions."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from parity_tests.cases import BATCHES, MODEL_CASES
from parity_tests.harness import BACKENDS, draw_batch, error, parameters
from parity_tests.record import check
from pruner_spec.float8 import scale_exponent
from pruner_spec.inference import InferenceSettings

pytestmark = pytest.mark.usefixtures("compile_fast")

backends = pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
FLOAT8 = ml_dtypes.float8_e4m3fn


def kernel_of(dtype: str) -> np.ndarray:
    """[41, 23], with outputs of all sizes, one of zeros, and one of the smallest numbers."""
    generator = np.random.default_rng(7)
    kernel = generator.standard_normal((41, 23)) * 10.0 ** generator.integers(-6, 6, 23)
    kernel[:, 3], kernel[:, 5] = 0, 1e-40
    return kernel.astype(dtype)


def written(backend: Any, quantized: Any) -> tuple[np.ndarray, np.ndarray]:
    """Values and scales of a `Quantized`."""
    return backend.numpy(quantized.values), backend.numpy(quantized.scale)


def quantized(backend: Any, kernel: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    with backend.precision("float64"):
        found = backend.module("float8").quantize(backend.array(kernel))
        assert found.shape == kernel.shape
        return written(backend, found)


@backends
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_kernel_is_rounded_as_numpy_rounds_it(backend, dtype):
    """To the last bit: so both backends deploy the same."""
    kernel = kernel_of(dtype).astype(np.float32).T
    values, found = quantized(backend, kernel_of(dtype))
    np.testing.assert_array_equal(found, scales_of(kernel))
    expected = (kernel / scales_of(kernel)[:, None]).astype(FLOAT8)
    np.testing.assert_array_equal(values.view(np.uint8), expected.view(np.uint8))


@backends
def test_rows_are_rounded_as_numpy_rounds_them_in_one_function(backend):
    """Nor does a compiler round otherwise: a million values, some of which lie near a middle."""
    x = np.random.default_rng(12).standard_normal((512, 2048)).astype(np.float32)
    x *= 10.0 ** np.random.default_rng(13).integers(-6, 6, (512, 1))
    found = compiled(backend, backend.module("float8").quantize_rows)(backend.array(x))
    values, scale = written(backend, found)
    np.testing.assert_array_equal(scale, scales_of(x))
    expected = (x / scales_of(x)[:, None]).astype(FLOAT8)
    np.testing.assert_array_equal(values.view(np.uint8), expected.view(np.uint8))


def compiled(backend: Any, function: Any) -> Any:
    """By XLA; PyTorch's functions are not compiled unless asked for."""
    if backend.name == "torch":
        return function
    import jax

    return jax.jit(function)


def scales_of(rows: np.ndarray) -> np.ndarray:
    """Of float32 rows, the least powers of two by which none of a row is above 448."""
    largest = np.maximum(np.abs(rows).max(axis=1), np.float32(1e-30))
    return 2.0 ** np.ceil(np.log2(largest.astype(np.float64) / 448)).astype(np.float32)


@backends
def test_the_largest_value_is_near_the_largest_there_is(backend):
    kernel = kernel_of("float32")
    values, scale = (x.astype(np.float64) for x in quantized(backend, kernel))
    assert np.isfinite(values).all()
    assert np.isfinite(scale).all()
    rows = np.arange(len(values)) != 5
    rows[3] = False
    largest = np.abs(values[rows]).max(axis=1)
    assert (largest >= 224).all()
    assert (largest <= 448).all()
    assert not values[[3, 5]].any()
    # Half a step of the largest values is 16 of 448, of smaller ones it is less.
    apart = np.abs(values * scale[:, None] - kernel.T)
    assert (apart <= 16 * scale[:, None]).all()


@pytest.mark.parametrize("fraction", [1, np.nextafter(np.float32(1.75), np.float32(1)), 1.75])
def test_a_value_at_the_edge_of_a_scale(fraction):
    """448 of a scale is its largest; the next number has the next scale."""
    value = np.float32(fraction * 2.0**-3)
    larger = np.nextafter(value, np.float32(1))
    found, after = (int(scale_exponent(x.view(np.int32))) - 127 for x in (value, larger))
    assert found == -11
    assert after == (-10 if fraction == 1.75 else -11)


@backends
def test_a_row_that_is_not_finite_spoils_its_product(backend):
    """And no other's."""
    float8, kernel = backend.module("float8"), backend.array(kernel_of("float32"))
    product = backend.module("kernels_plain").product
    x = np.ones((4, 41), np.float32)
    x[1, 2], x[2, 3] = np.nan, np.inf
    found = backend.numpy(product(backend.array(x), float8.quantize(kernel)))
    assert np.isnan(found[1:3]).all()
    assert np.isfinite(found[[0, 3]]).all()


@backends
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_a_product_is_that_of_what_was_rounded(backend, dtype):
    """Against float64 of the dequantised operands; and near the product of the operands.

    Compiled, too: a compiler may not take out what is rounded, and read again, in one function.
    """
    float8, generator = backend.module("float8"), np.random.default_rng(8)
    plain = generator.standard_normal((41, 23))
    x = generator.standard_normal((18, 41)) * 10.0 ** generator.integers(-6, 6, (18, 1))
    x[4] = 0
    with backend.precision(dtype):
        kernel = float8.quantize(backend.array(plain, dtype))
        given = backend.array(x, dtype)
        rows = float8.quantize_rows(given)
        product = backend.module("kernels_plain").product
        each = [backend.numpy(way(given, kernel)) for way in (product, compiled(backend, product))]
        assert product(given, kernel).dtype == given.dtype
        a, b = (
            values.astype(np.float64) * scale[:, None]
            for values, scale in (written(backend, rows), written(backend, kernel))
        )
    scale = np.abs(x).max(axis=-1, keepdims=True)
    scale[scale == 0] = 1
    for found in each:
        found = found.astype(np.float64) / scale
        check("float8 product", dtype, backend.name, error(found, a @ b.T / scale))
        check("float8 product", "rounding", backend.name, error(found, x @ plain / scale))


# In float32 none is pruned: scores that are another's may keep other patches.
ACTIONS = (
    ("pi05-implicit-2, third camera masked in one-adapted", "float64"),
    ("pi05-5 a camera-4, all kinds", "float64"),
    ("pi0-unpruned-4, all kinds", "float64"),
    ("pi0-unpruned-4, all kinds", "float32"),
    ("pi05-unpruned-2, third camera masked in one", "float32"),
)


@pytest.mark.parametrize(("name", "dtype"), ACTIONS)
def test_actions_of_a_model_in_float8(name, dtype):
    """The same in both backends, and near those of the plain way."""
    case = MODEL_CASES[name]
    config = case.config(dtype)
    batch, weights = draw_batch(config, **BATCHES[case.batch]), parameters(config)
    settings, found = InferenceSettings(float8=True), []
    for backend in BACKENDS.values():
        model = backend.model(config, weights)
        with backend.precision(dtype):
            noise = backend.array(batch.noise)
            sampler = backend.module("inference").Sampler(model.module, settings)
            actions = backend.numpy(sampler.sample_actions(batch.observation, noise))
            apart = sampler.distance(model.module, batch.observation, noise)
        found.append(actions)
        check("float8 distance", dtype, f"{backend.name} | plain", apart, name)
        if "implicit" not in name:  # where a patch may be kept in the place of another
            plain = model.sample(batch.observation, batch.noise)
            assert not np.array_equal(actions, plain)
            cosine = least_cosine(actions, plain)
            check("float8 cosine", dtype, f"{backend.name} | plain", 1 - cosine, name)
    if len(found) == 2:
        check("float8 actions", dtype, "jax | torch", error(*found), name)


def least_cosine(found: np.ndarray, expected: np.ndarray) -> float:
    """Of the angles between samples' actions."""
    found, expected = (x.reshape(len(x), -1).astype(np.float64) for x in (found, expected))
    lengths = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
    return float(((found * expected).sum(axis=1) / lengths).min())


@backends
def test_what_is_in_float8(backend):
    """The language model's MLPs, and nothing else."""
    config = MODEL_CASES["pi05-unpruned-1-adapted"].config("float32")
    model, float8 = backend.model(config, parameters(config)), backend.module("float8")
    deploy = backend.module("deployed").deploy
    plain, rounded = (deploy(model.module, float8=on) for on in (False, True))
    for name in ("gate_up", "down"):
        for layer, other in zip(rounded.language, plain.language, strict=True):
            assert isinstance(getattr(layer, name), float8.Quantized)
            assert getattr(layer, name).shape == tuple(getattr(other, name).shape)
        assert not any(isinstance(getattr(x, name), float8.Quantized) for x in rounded.action)
    for name in ("qkv", "out"):
        for layer in rounded.language:
            assert not isinstance(getattr(layer, name), float8.Quantized)
    kernel, other = rounded.language[0].gate_up, plain.language[0].gate_up
    assert kernel.values.nbytes == other.nbytes // 4


@pytest.mark.skipif("jax" not in BACKENDS, reason="is about JAX")
def test_what_xla_is_given(monkeypatch):
    """A product of float8 as it is, which is also what it computes; in float32 one of float32."""
    import jax
    import jax.numpy as jnp

    module, plain = (BACKENDS["jax"].module(name) for name in ("float8", "kernels_plain"))
    monkeypatch.setattr(BACKENDS["jax"].module("triton_call"), "capability", lambda: 90)
    generator = np.random.default_rng(10)
    kernel = module.quantize(jnp.asarray(generator.standard_normal((64, 48)), jnp.float32))
    x = jnp.asarray(generator.standard_normal((7, 64)), jnp.bfloat16)
    product = jax.jit(plain.product)
    text = product.lower(x, kernel).as_text()
    assert "(tensor<7x64xf8E4M3FN>, tensor<48x64xf8E4M3FN>) -> tensor<7x48xbf16>" in text
    found, expected = (np.asarray(product(each, kernel)) for each in (x, x.astype(jnp.float32)))
    check("float8 product", "bfloat16", "jax", error(found.astype(np.float64), expected))
    text = product.lower(x.astype(jnp.float32), kernel).as_text()
    assert "(tensor<7x64xf32>, tensor<48x64xf32>) -> tensor<7x48xf32>" in text


@pytest.mark.skipif("torch" not in BACKENDS, reason="is about PyTorch")
@pytest.mark.parametrize("rows", [1, 7])
def test_what_cublas_is_given(rows, monkeypatch):
    """PyTorch's own checks for a GPU pass: of layouts, scales and sizes.

    Sizes that it has no product for are multiplied in another way, as on a CPU.
    """
    import torch

    module = BACKENDS["torch"].module("float8")

    def empty(*sizes, dtype):
        return torch.empty(sizes, dtype=dtype, device="meta")

    def of(count):
        values, scale = (empty(count, 64, dtype=torch.float8_e4m3fn), torch.float32)
        return module.Quantized(values, empty(count, dtype=scale))

    assert not module._has_library(of(48), torch.bfloat16)
    monkeypatch.setattr(module, "_has_library", lambda *_: True)
    found = module.multiply(of(rows), of(48), torch.bfloat16)
    assert found.shape == (rows, 48)
    assert found.dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match="divisible by 16"):
        module.multiply(of(rows), of(24), torch.bfloat16)

"""The Triton kernels against float64 and against PyTorch's operations.

Triton interprets where there is no GPU, which it must be told before it is imported: one process
runs all cases of `kernel_cases`, and the tests here read what it found.
"""

import functools
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from parity_tests import kernel_cases
from parity_tests.harness import BACKENDS
from parity_tests.tolerances import tolerance
from pruner_torch import kernels, kernels_plain

if "torch" not in BACKENDS:
    pytest.skip("without torch", allow_module_level=True)

ROOT = pathlib.Path(__file__).parent.parent
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


def run(*arguments: str, **environment: str) -> list[dict[str, Any]]:
    """The rows that a module prints, run in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@functools.cache
def found() -> list[dict[str, Any]]:
    """What the cases found."""
    interpreted = {} if kernel_cases.FULL else {"TRITON_INTERPRET": "1"}
    return run("parity_tests.kernel_cases", **interpreted)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("dtype", kernel_cases.DTYPES)
@pytest.mark.parametrize("family", kernel_cases.FAMILIES)
def test_a_kernel_computes_what_it_says(family, dtype):
    """Poisoned memory around its inputs and under its outputs, and twice with the same bits."""
    level = "kernel" if kernel_cases.FULL else "kernel, interpreted"
    rows = [row for row in found() if (row["family"], row["dtype"]) == (family, dtype)]
    assert rows
    for row in rows:
        assert all(row[what] for what in ("triton", "shape", "same", "captured")), row
        assert row["error"]["largest"] <= tolerance(level, dtype), row
        assert row["plain"]["largest"] <= tolerance("kernel, interpreted", dtype), row
        if kernel_cases.FULL and dtype == "bfloat16":
            bound = tolerance("kernel over plain", dtype)
            assert row["error"]["mean"] <= bound * row["plain"]["mean"], row


@needs_triton
@pytest.mark.slow
def test_kernels_compile_for_hopper():
    """At the sizes of π0.5: nothing spills, shared memory suffices, tensor cores multiply."""
    for row in run("parity_tests.kernel_compilation", "90"):
        assert row["stack"] == 0, row
        assert row["shared"] <= row["limit"], row
        multiplies = row["launch"].startswith(("attend", "normed", "linear"))
        assert (row["products"] > 0) == multiplies, row


def test_without_a_gpu_pytorch_computes():
    x = torch.randn(3, 8)
    assert kernels.available(x.to("cuda")) if kernel_cases.FULL else not kernels.available(x)
    assert not kernels.available(x.to(torch.float64))
    assert torch.equal(
        kernels.rms_normalize(x, None, None), kernels_plain.rms_normalize(x, None, None)
    )


def test_float8_weights_are_near():
    kernel = torch.randn(64, 24) * torch.logspace(-3, 3, 24)
    kernel[:, 5] = 0
    small, scale = kernels.quantize(kernel)
    assert small.dtype == torch.float8_e4m3fn
    assert small.stride(0) == 1
    again = kernels_plain.dequantize(small, scale, torch.float32)
    largest = kernel.abs().amax(dim=0)
    assert ((again - kernel).abs() <= largest * tolerance("float8", "float32")).all()


X, ROW, KERNEL = torch.zeros(3, 8), torch.zeros(8), torch.zeros(8, 6)
FLOAT8, SCALE = kernels.quantize(torch.ones(8, 6))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kernels.rms_normalize(ROW, None, None), r"rows \[R, D\]"),
        (lambda: kernels.rms_normalize(X.T, None, None), "adjacent"),
        (lambda: kernels.rms_normalize(X, ROW[:4], None), "a scale of"),
        (lambda: kernels.rms_normalize(X, None, ROW[::2]), "a shift of"),
        (lambda: kernels.gelu_product(X[:, :5]), "an even width"),
        (lambda: kernels.normed_linear(X, ROW, ROW, KERNEL[:7]), "a kernel of 8 inputs"),
        (lambda: kernels.normed_linear(X, ROW, ROW, KERNEL.double()), "a kernel in"),
        (lambda: kernels.normed_linear(X, ROW, ROW, FLOAT8), "float8"),
        (lambda: kernels.normed_linear(X, ROW, ROW, KERNEL, SCALE), "float8"),
        (lambda: kernels.normed_linear(X, ROW, ROW, FLOAT8, SCALE[:5]), "a kernel_scale of"),
        (lambda: kernels.normed_gated(X, ROW, ROW, KERNEL[:, :5]), "an even width"),
        (lambda: kernels.linear_residual(X, KERNEL, X, None), "a residual of"),
        (lambda: kernels.linear_residual(X, KERNEL, X[:, :6], ROW), "a gate of"),
        (lambda: kernels.attend(*[torch.zeros(1, 2, 2, 4)] * 3, None), r"twice \[B, T, 1, H\]"),
        (
            lambda: kernels.rotate(X[None, :, :6], *[torch.zeros(1, 3, 1)] * 2, 2, *heads(2)),
            "qkv of",
        ),
        (lambda: kernels.rotate(X[None], *[torch.zeros(1, 3, 2)] * 2, 2, *heads(2)), "cos of"),
        (lambda: kernels.rotate(X[None], *[torch.zeros(1, 3, 1)] * 2, 2, *heads(3)), "out_query"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def heads(queries: int) -> list[Any]:
    """Outputs of a projection with heads of 2: so many of queries, one each of keys and values."""
    return [torch.zeros(1, 3, count, 2) for count in (queries, 1, 1)]

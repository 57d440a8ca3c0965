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
        assert all(row[what] for what in ("launched", "dtypes", "same", "captured")), row
        for part, error in row["errors"].items():
            # Sums of squares are in float32 at any dtype.
            kind = "float32" if part == "squares" else dtype
            assert error["largest"] <= tolerance(level, kind), row
            plain = row["plain"][part]["largest"]
            assert plain <= tolerance("kernel, interpreted", kind), row
        if kernel_cases.FULL and dtype == "bfloat16":
            bound = tolerance("kernel over plain", dtype)
            assert row["errors"]["x"]["mean"] <= bound * row["plain"]["x"]["mean"], row


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("dtype", kernel_cases.DTYPES)
def test_tiles_that_are_timed_compute_the_same(dtype):
    """And the fastest are launched from then on, without being timed again."""
    level = "kernel" if kernel_cases.FULL else "kernel, interpreted"
    rows = [row for row in found() if (row["family"], row["dtype"]) == ("tuned", dtype)]
    # A layer's four products; and attention, which has one cut in float32.
    assert len(rows) == (4 if dtype == "float32" else 5)
    for row in rows:
        assert row["candidates"] > 2, row
        assert row["error"] <= tolerance(level, dtype), row
        assert row["parts"], row
        assert not row["again"], row


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 89, 90])
def test_kernels_compile(capability):
    """At the sizes of π0.5: nothing spills, shared memory suffices, tensor cores multiply."""
    rows = run("parity_tests.kernel_compilation", str(capability))
    in_float8 = 2 if capability >= 89 else 0
    assert len({row["launch"] for row in rows}) == 19 + in_float8
    for row in rows:
        assert row["stack"] == 0, row
        assert row["shared"] <= row["limit"], row
        multiplies = row["launch"].startswith(("project", "gated", "merge", "attend"))
        assert (row["products"] > 0) == multiplies, row


def test_without_a_gpu_pytorch_computes():
    x, scale = torch.randn(3, 8), torch.randn(8)
    assert kernels.available(x.to("cuda")) if kernel_cases.FULL else not kernels.available(x)
    assert not kernels.available(x.to(torch.float64))
    rows, plain = (module.scale_rows(x, scale) for module in (kernels, kernels_plain))
    assert rows.x is plain.x
    assert torch.equal(rows.scaled, plain.scaled)
    assert torch.equal(rows.squares, plain.squares)


X, ROW, KERNEL = torch.zeros(3, 8), torch.zeros(8), torch.zeros(8, 6)
ROWS = kernels_plain.scale_rows(X, ROW)
EULER = (ROWS, ROW, ROW, KERNEL, torch.zeros(6), torch.zeros(1, 3, 6), -0.1)
ATTEND = torch.zeros(1, 3, 2, 4), torch.zeros(1, 5, 1, 4), torch.zeros(1, 5, 1, 4)


def project(change: str = "", by: Any = None) -> Any:
    """2 samples of 3 tokens, 1 head of queries and 2 groups of 4 columns; one argument another."""
    arguments = {
        "rows": kernels_plain.scale_rows(torch.zeros(6, 8), ROW),
        "kernel": torch.zeros(8, 20),
        "added": torch.zeros(20),
        "cos": torch.zeros(2, 3, 2),
        "sin": torch.zeros(2, 3, 2),
        "key": torch.zeros(2, 5, 2, 4),
        "value": torch.zeros(2, 5, 2, 4),
        "place": 2,
        "num_heads": 1,
    }
    assert not change or change in arguments
    return kernels.project(**arguments | ({change: by} if change else {}))


def test_what_fits_is_taken():
    query, _, _ = project()
    assert query.shape == (2, 3, 1, 4)
    assert kernels.merge(X, KERNEL, X[:, :6], None, ROW[:6]).x.shape == (3, 6)
    assert kernels.attend(*ATTEND, None).shape == (1, 3, 8)
    assert kernels.euler_step(*EULER).shape == (1, 3, 6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kernels.scale_rows(ROW, ROW), r"rows \[R, D\]"),
        (lambda: kernels.scale_rows(X.T, ROW[:3]), "adjacent"),
        (lambda: kernels.scale_rows(X, ROW[:4]), "a scale of"),
        (lambda: kernels.scale_rows(X[:, ::2], ROW[::2]), "adjacent"),
        (lambda: kernels.scale_rows(X[:, :4], ROW[::2]), "a scale of"),
        (lambda: project("rows", ROWS), "rows of"),
        (lambda: project("kernel", torch.zeros(7, 20)), "a kernel of 8 inputs"),
        (lambda: project("kernel", torch.zeros(8, 20).double()), "a kernel in"),
        (lambda: project("added", ROW), "added of"),
        (lambda: project("cos", torch.zeros(2, 3, 4)), "cos of"),
        (lambda: project("sin", torch.zeros(1, 3, 2)), "sin of"),
        (lambda: project("value", torch.zeros(2, 4, 2, 4)), "value of"),
        (lambda: project("key", torch.zeros(2, 5, 4, 2).mT), "adjacent"),
        (lambda: project("place", 3), "got place 3"),
        (lambda: project("num_heads", 2), "outputs of"),
        (lambda: kernels.gated(ROWS, KERNEL[:7], None), "a kernel of 8 inputs"),
        (lambda: kernels.gated(ROWS, KERNEL[:, :5], None), "an even width"),
        (lambda: kernels.gated(ROWS, KERNEL, ROW), "added of"),
        (lambda: kernels.merge(X, KERNEL, X, None, ROW[:6]), "a residual of"),
        (lambda: kernels.merge(X, KERNEL, X[:, :6], ROW, ROW[:6]), "a gate of"),
        (lambda: kernels.merge(X, KERNEL, X[:, :6], None, ROW), "a scale of"),
        (lambda: kernels.attend(ATTEND[0], ATTEND[0], ATTEND[0], None), r"twice \[B, T, 1, H\]"),
        (lambda: kernels.attend(*ATTEND, torch.zeros(1, 4).bool()), "a mask of"),
        (lambda: kernels.embed_actions(*embedded(ROW[:6], ROW[:6])), "a kernel of 4 inputs"),
        (lambda: kernels.embed_actions(*embedded(ROW, ROW[:6], 8)), "a bias of"),
        (lambda: kernels.embed_actions(*embedded(ROW[:6], ROW, 8)), "a scale of"),
        (lambda: kernels.euler_step(*EULER[:1], ROW[:4], *EULER[2:]), "a scale of"),
        (lambda: kernels.euler_step(*EULER[:2], ROW[:4], *EULER[3:]), "a shift of"),
        (lambda: kernels.euler_step(*EULER[:4], ROW, *EULER[5:]), "a bias of"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def embedded(bias: Any, scale: Any, actions: int = 4) -> tuple[Any, ...]:
    """Arguments of `embed_actions`."""
    return torch.zeros(1, 3, actions), KERNEL, bias, scale, torch.float32

"""The Triton kernels of the pruner, of the vision tower and of float8; `fused_cases` has the
cases."""

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

from parity_tests.harness import BACKENDS, DEVICE
from parity_tests.tolerances import tolerance
from pruner_torch import kernels

if "torch" not in BACKENDS:
    pytest.skip("without torch", allow_module_level=True)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="without Triton"),
]


@functools.cache
def found() -> dict[str, list[dict[str, Any]]]:
    """What the cases found: interpreted where there is no GPU."""
    done = subprocess.run(
        [sys.executable, "-m", "parity_tests.fused_cases"],
        cwd=pathlib.Path(__file__).parent.parent,
        env=os.environ | ({} if DEVICE == "cuda" else {"TRITON_INTERPRET": "1"}),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_scores_are_the_reference_s():
    """Of bfloat16 tokens too: their float32 scores."""
    assert len(found()["scores"]) >= 18
    for row in found()["scores"]:
        assert row["error"] <= tolerance("scores", "float32"), row


def test_a_selection_by_given_scores_is_the_same_to_the_last_bit():
    assert len(found()["elections"]) >= 100
    assert [row for row in found()["elections"] if not row["same"]] == []


def test_a_packed_prefix_is_the_same_to_the_last_bit():
    assert len(found()["prefixes"]) == 2 * 4 * 3
    assert [row for row in found()["prefixes"] if not row["same"]] == []
    assert all(row.get("called", True) for row in found()["prefixes"])


def test_a_sum_and_its_layer_norm():
    level = "kernel" if DEVICE == "cuda" else "kernel, interpreted"
    assert len(found()["layer_norms"]) == 6
    for row in found()["layer_norms"]:
        assert row["called"], row
        assert max(row["total"], row["error"]) <= tolerance(level, row["dtype"]), row


def test_patches_attend_to_each_other():
    level = "kernel" if DEVICE == "cuda" else "kernel, interpreted"
    assert len(found()["attentions"]) == 3
    for row in found()["attentions"]:
        assert row["called"], row
        assert row["error"] <= tolerance(level, row["dtype"]), row


def test_rows_in_float8():
    """The scales of the plain way, its values, and their product."""
    assert len(found()["float8_rows"]) == 10
    for row in found()["float8_rows"]:
        assert row["called"], row
        assert row["scales"], row
        assert row["others"] == 0, row
        assert row["product"] <= tolerance("kernel", row["dtype"]), row


WIDE, ROW = torch.zeros(2, 3, 8), torch.zeros(8)


def test_the_plain_way_is_the_framework_s():
    """Of a dtype that Triton has no kernel for."""
    x, y, row = (each.double() + 1 for each in (WIDE, WIDE, ROW))
    total, normed = kernels.add_layer_norm(x, y, row, row, 1e-6)
    assert torch.equal(total, x + y)
    assert torch.equal(normed, torch.ones_like(x))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((WIDE, WIDE[:1], ROW, ROW), r"y of \[2, 3, 8\]"),
        ((WIDE, WIDE.double(), ROW, ROW), "in torch.float32, got"),
        ((WIDE.mT, WIDE.mT, ROW[:3], ROW[:3]), "adjacent"),
        ((WIDE, WIDE, ROW[:7], ROW), "a scale of"),
        ((WIDE, WIDE, ROW, ROW[:7]), "a shift of"),
    ],
)
def test_what_does_not_fit(inputs, message):
    with pytest.raises(ValueError, match=message):
        kernels.add_layer_norm(*inputs, 1e-6)

"""Who may import whom, shown in processes of their own; and that tolerances stand in one table."""

import ast
import json
import os
import pathlib
import re
import subprocess
import sys
from typing import Any

import pytest

from parity_tests.harness import BACKENDS

ROOT = pathlib.Path(__file__).parent.parent

# The packages of each framework, and what of this project is written in it.
PACKAGES = {
    "jax": {"jax", "jaxlib", "flax", "optax", "orbax", "chex", "pruner_jax"},
    "torch": {"torch", "pruner_torch"},
}
CHECKPOINTS = {"orbax", "tensorstore", "safetensors"}

BLOCK = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {packages!r}:
            raise ModuleNotFoundError(f"{{name}} is blocked by the test", name=name)

sys.meta_path.insert(0, Absent())
"""

IMPORT_ALL = """
import importlib, json, pkgutil, sys

package = importlib.import_module({package!r})
modules = [each.name for each in pkgutil.walk_packages(package.__path__, {package!r} + ".")]
for name in modules:
    if name not in {but!r}:
        importlib.import_module(name)
print(json.dumps({{"modules": modules, "loaded": sorted({{*sys.modules}})}}))
"""

SAMPLE = """
import json
import numpy as np
from pruner_{framework} import checkpoint
from pruner_spec.config import Pi0Config
from pruner_spec.observation import Observation
from pruner_spec.parameters import random_parameters

config = Pi0Config(
    dtype="float32",
    paligemma_variant="tiny",
    action_expert_variant="tiny_expert",
    vision_variant="tiny/56",
    action_dim=7,
    action_horizon=3,
    max_token_len=9,
    pi05=True,
    token_pruning_enabled=True,
    token_prune_keep_tokens=5,
)
model = checkpoint.load(dict(random_parameters(config, 0)), config)
image = np.arange(224 * 224 * 3, dtype=np.uint8).reshape(1, 224, 224, 3)
observation = Observation.from_dict(
    {{
        "image": {{"base_0_rgb": image, "left_wrist_0_rgb": image[:, ::-1]}},
        "state": np.zeros((1, 7), np.float32),
        "tokenized_prompt": np.arange(9, dtype=np.int32)[None],
        "tokenized_prompt_mask": np.ones((1, 9), bool),
    }}
)
actions = np.asarray(model.sample_actions(observation, np.ones((1, 3, 7), np.float32), num_steps=2))
print(
    json.dumps(
        {{
            "shape": actions.shape,
            "finite": bool(np.isfinite(actions).all()),
            "moved": bool((actions != 1).all()),
            "kept": model.get_token_pruning_stats()["kept_per_camera"],
        }}
    )
)
"""

COMPARISONS = {
    "allclose",
    "approx",
    "assert_allclose",
    "assert_almost_equal",
    "assert_array_almost_equal",
    "assert_array_max_ulp",
    "assert_close",
    "isclose",
}
TOLERANCE_KEYWORDS = {
    *("atol", "rtol", "abs", "rel", "abs_tol", "rel_tol"),
    *("decimal", "significant", "maxulp", "nulp"),
}
SMALL = 0.01  # a number below this, compared with something, is a tolerance


def run(script: str) -> Any:
    """The JSON that a script prints last, run in a fresh process from the root."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def loaded_by(package: str, but: tuple[str, ...] = ()) -> tuple[set[str], set[str]]:
    """The package's modules, and all top-level packages that are loaded once they are."""
    found = run(IMPORT_ALL.format(package=package, but=but))
    return set(found["modules"]), {name.partition(".")[0] for name in found["loaded"]}


def test_the_spec_imports_no_framework():
    modules, loaded = loaded_by("pruner_spec")
    assert {"pruner_spec.config", "pruner_spec.layout", "pruner_spec.randomness"} <= modules
    assert not loaded & (PACKAGES["jax"] | PACKAGES["torch"] | CHECKPOINTS)
    assert not loaded & {"convert", "pruner_run", "parity_tests"}


def test_the_application_imports_no_framework():
    """But through modules of a framework's name, which are imported when it is chosen."""
    kinds = ("backend", "probe")
    backends = [f"pruner_run.{kind}_{name}" for kind in kinds for name in ("jax", "torch")]
    modules, loaded = loaded_by("pruner_run", but=backends)
    assert {"pruner_run.cli", "pruner_run.demo", "pruner_run.data.lerobot", *backends} <= modules
    assert not loaded & (PACKAGES["jax"] | PACKAGES["torch"])


def test_reading_checkpoints_imports_no_framework():
    modules, loaded = loaded_by("convert")
    assert "convert.reading" in modules
    assert not loaded & (PACKAGES["jax"] | PACKAGES["torch"])


@pytest.mark.parametrize("framework", PACKAGES)
def test_no_module_of_a_twin_names_the_other_framework(framework):
    """Not in a function either, where an import would fail only when it is called."""
    (other,) = PACKAGES.keys() - {framework}
    files = sorted((ROOT / f"pruner_{framework}").glob("*.py"))
    imported = {name.partition(".")[0] for path in files for name in imports(path.read_text())}
    assert {"numpy", "pruner_spec", framework} <= imported
    assert not imported & (PACKAGES[other] | {"pruner_run", "parity_tests"})


def test_the_kernels_name_no_framework():
    """Of this project they know the spec alone: either twin launches them."""
    files = sorted((ROOT / "pruner_kernels").glob("*.py"))
    imported = {name.partition(".")[0] for path in files for name in imports(path.read_text())}
    assert {"triton", "pruner_spec"} <= imported
    others = {"convert", "pruner_run", "parity_tests"}
    assert not imported & (PACKAGES["jax"] | PACKAGES["torch"] | others)


def imports(text: str) -> set[str]:
    """All modules that are imported anywhere in a module, given its text."""
    nodes = list(ast.walk(ast.parse(text)))
    found = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return found | {node.module for node in nodes if isinstance(node, ast.ImportFrom)}


@pytest.mark.slow
@pytest.mark.parametrize("framework", BACKENDS)
def test_a_backend_works_without_the_other_framework(framework):
    """Weights, pruning and denoising, where importing the other fails."""
    (other,) = PACKAGES.keys() - {framework}
    found = run(BLOCK.format(packages=PACKAGES[other]) + SAMPLE.format(framework=framework))
    assert found == {
        "shape": [1, 3, 7],
        "finite": True,
        "moved": True,
        "kept": {"base_0_rgb": [5], "left_wrist_0_rgb": [5]},
    }


def test_the_block_blocks():
    script = BLOCK.format(packages={"wave"}) + "\ntry:\n    import wave\nexcept ImportError:\n    "
    assert run(script + "print('true')") is True


def literal_tolerances(text: str) -> list[str]:
    """Where a module, given its text, has a tolerance that is not from the table, by line."""
    tree = ast.parse(text)
    constants = {
        target.id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name) and has_number(node.value)
    }
    found = [
        (value.lineno, f"{name} holds a tolerance")
        for name, value in constants.items()
        if re.search("TOLERANCE|ERROR", name)
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and called(node) in COMPARISONS:
            given = tolerances_of(node)
            if not given:
                found.append((node.lineno, f"{called(node)} with its default tolerance"))
            found += [
                (node.lineno, f"{called(node)} with {ast.unparse(value)}")
                for value in given
                if is_literal(value, constants)
            ]
        elif isinstance(node, ast.Compare):
            sides = (node.left, *node.comparators)
            ordered = isinstance(node.ops[0], ast.Lt | ast.LtE | ast.Gt | ast.GtE)
            if ordered and any(has_number(side, below=SMALL) for side in sides):
                found.append((node.lineno, ast.unparse(node)))
    return [f"line {line}: {what}" for line, what in sorted(found)]


def called(call: ast.Call) -> str:
    """The last part of the called function's name."""
    return ast.unparse(call.func).rpartition(".")[2]


def tolerances_of(call: ast.Call) -> list[ast.expr]:
    """The tolerances among a comparison's arguments."""
    compared = 1 if called(call) == "approx" else 2
    named = [word.value for word in call.keywords if word.arg in TOLERANCE_KEYWORDS]
    return call.args[compared:] + named


def is_literal(value: ast.expr, constants: dict[str, ast.expr]) -> bool:
    """Whether a tolerance is written out, here or as a constant of the module."""
    nodes = list(ast.walk(value))
    if any(isinstance(node, ast.Call) and called(node) == "tolerance" for node in nodes):
        return False
    return has_number(value) or any(
        isinstance(node, ast.Name) and node.id in constants for node in nodes
    )


def has_number(value: ast.expr, below: float = float("inf")) -> bool:
    """Whether there is a number other than 0 in an expression, and nearer to 0 than `below`."""
    return any(
        isinstance(node, ast.Constant)
        and isinstance(node.value, int | float)
        and 0 < abs(node.value) < below
        for node in ast.walk(value)
    )


@pytest.mark.parametrize(
    "path",
    [
        path
        for path in sorted((ROOT / "parity_tests").rglob("*.py"))
        if path.name != "tolerances.py"
    ],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_tolerances_stand_in_the_table(path):
    assert literal_tolerances(path.read_text()) == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("np.testing.assert_allclose(a, b, rtol=1e-5)", "assert_allclose with 1e-05"),
        ("np.testing.assert_allclose(a, b, 1e-5)", "assert_allclose with 1e-05"),
        ("np.testing.assert_allclose(a, b, rtol=0, atol=2 * 1e-5)", "with 2 * 1e-05"),
        ("np.testing.assert_allclose(a, b)", "assert_allclose with its default tolerance"),
        ("assert a == pytest.approx(b, rel=1e-6)", "approx with 1e-06"),
        ("assert a == approx(b, abs=1)", "approx with 1"),
        ("assert math.isclose(a, b, rel_tol=1e-9)", "isclose with 1e-09"),
        ("CLOSE = 1e-5\nassert np.allclose(a, b, atol=CLOSE)", "allclose with CLOSE"),
        ("TOLERANCES = {'a': 3}", "TOLERANCES holds a tolerance"),
        ("assert error < 1e-6", "error < 1e-06"),
        ("assert abs(a - b).max() <= 1e-4 * scale", "<= 0.0001 * scale"),
    ],
)
def test_a_literal_tolerance_is_found(text, found):
    (line,) = literal_tolerances(text)
    assert found in line


@pytest.mark.parametrize(
    "text",
    [
        "np.testing.assert_allclose(a, b, rtol=0, atol=tolerance('scores', 'float32'))",
        "np.testing.assert_allclose(a, b, 2 * tolerance('scores', 'float32'))",
        "np.testing.assert_array_equal(a, b)",
        "assert error <= bound",
        "assert overlap > 0.8",
        "assert count == 0.001",
        "SIZES = (1, 2)",
    ],
)
def test_what_is_not_a_literal_tolerance(text):
    assert literal_tolerances(text) == []

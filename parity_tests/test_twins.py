"""The twins have one outline: the same files, public names, order, arguments and shapes.

What differs is listed here, and nowhere else. Only their text is read; neither is imported.
"""

import ast
import difflib
import pathlib
import re
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).parent.parent
JAX, TORCH = ROOT / "pruner_jax", ROOT / "pruner_torch"

# The drop-in for users of openpi's PyTorch model, of which there is only one; CUDA graphs, which
# XLA captures by itself; checks of strides, which JAX's arrays have not; and launches that overlap,
# as XLA's do not, so that in JAX one call makes all of them.
FILES_OF_TORCH_ALONE = {"openpi.py", "graphs.py"} | {
    f"kernels_{part}.py" for part in ("checks", "packed")
}
FILES_OF_JAX_ALONE = {"triton_call.py", "tables.py", "chain.py", "ffi_handler.py"} | {
    f"kernels_{part}.py" for part in ("pointwise", "tables")
}
# Of one outline as far as they go, but for what they are told of a schedule's step and of strides.
FILES_OF_EACH = {"kernels.py"} | {f"kernels_{part}.py" for part in ("launch", "plain", "vision")}
# A framework's own; one twin may have them where the other has not.
# JAX compiles a whole step; PyTorch compiles layers, if it is asked to, or has Triton's kernels.
# In PyTorch who calls captures a CUDA graph; in JAX what is called is told whether to.
FRAMEWORK_ARGUMENTS = {"rngs", "device", "dtype", "key", "compiled", "operations", "graphs"}
FRAMEWORK_NAMES = {
    "pi0.py: Pi0.device",
    "inference.py: _APART",  # PyTorch has kernels of its own, which are tried first
    "inference.py: tried",
    "objective.py: to_device",
    "recomputation.py: _PRODUCTS",
    "recomputation.py: optimized",
    "sampling.py: joined_masks",  # of which JAX hands over as many as it likes at once
}
# A list of layers in PyTorch, one stacked layer in JAX; a step that JAX may have traced.
OTHER_ANNOTATIONS = {"layers.py: stack", "objective.py: draw", "randomness.py: stream_key"}

# How a model is spread over devices is each framework's own: of this file only these are compared.
COMMON_NAMES = {"sharding.py": {"AXES", "make_mesh", "largest"}}

ONE_SPELLING = {
    "DeviceMesh": "Mesh",
    "forward": "__call__",
    "Tensor": "Array",
    "torch.dtype": "jnp.dtype",
    "nn.Module": "nnx.Module",
}
KINDS_OF_METHODS = {"property", "functools.cached_property", "classmethod", "staticmethod"}

FILES = {path.name for path in JAX.glob("*.py")} - FILES_OF_JAX_ALONE
SHARED_FILES = sorted(FILES - FILES_OF_EACH)


def spelled_once(text: str) -> str:
    """A framework's names in one spelling, JAX's."""
    for theirs, ours in ONE_SPELLING.items():
        text = re.sub(rf"(?<![\w.]){re.escape(theirs)}\b", ours, text)
    return text


def source(node: ast.AST | None) -> str:
    """The node's text, or nothing."""
    return spelled_once(ast.unparse(node)) if node else ""


def is_public(name: str) -> bool:
    return not name.startswith("_") or name in ("__init__", "__call__")


def arguments(function: ast.FunctionDef, *, annotated: bool) -> list[str]:
    """An entry an argument, with its default; then what is returned, and how it is called."""
    given = function.args
    positional = given.posonlyargs + given.args
    defaults = [None] * (len(positional) - len(given.defaults)) + given.defaults
    entries = [(*each, "") for each in zip(positional, defaults, strict=True)]
    entries += [
        (*each, " by name") for each in zip(given.kwonlyargs, given.kw_defaults, strict=True)
    ]
    entries += [(argument, None, " rest") for argument in (given.vararg, given.kwarg) if argument]
    lines = []
    for argument, default, how in entries:
        annotation = source(argument.annotation) if annotated else ""
        lines.append(f"{argument.arg}: {annotation} = {source(default)}{how}")
    returns = [f"-> {source(function.returns)}"] if annotated else []
    kinds = [source(each) for each in function.decorator_list if source(each) in KINDS_OF_METHODS]
    return lines + returns + kinds


def outline(
    body: list[ast.stmt], where: str, unannotated: set[str]
) -> Iterator[tuple[str, list[str]]]:
    """Every public name of a module or class, in order, and what is to be the same about it."""
    for node in body:
        if isinstance(node, ast.FunctionDef):
            name = where + spelled_once(node.name)
            if is_public(spelled_once(node.name)):
                yield name, arguments(node, annotated=name not in unannotated)
        elif isinstance(node, ast.ClassDef) and is_public(node.name):
            yield where + node.name, [source(base) for base in node.bases]
            yield from outline(node.body, f"{where}{node.name}.", unannotated)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            target = source(node.targets[0] if isinstance(node, ast.Assign) else node.target)
            is_field = isinstance(node, ast.AnnAssign) and is_public(target)
            if is_field or target.isupper():
                annotation = source(node.annotation) if isinstance(node, ast.AnnAssign) else ""
                yield where + target, [f"{annotation} = {source(node.value)}"]


def without_a_frameworks_own(lines: list[str], other: list[str]) -> list[str]:
    """The lines but those of framework arguments that the other twin has not."""
    others = {line.partition(":")[0] for line in other}
    spared = FRAMEWORK_ARGUMENTS - others
    return [line for line in lines if line.partition(":")[0] not in spared]


def differences(file: str, jax: str, torch: str) -> list[str]:
    """What differs between the two twins of a file, given their text."""
    prefix, common = f"{file}: ", COMMON_NAMES.get(file)
    ours, theirs = (
        dict(outline(ast.parse(text).body, prefix, OTHER_ANNOTATIONS)) for text in (jax, torch)
    )
    if common is not None:
        ours, theirs = (
            {name: each[name] for name in each if name.removeprefix(prefix) in common}
            for each in (ours, theirs)
        )
        assert len(ours) == len(common)
    names = [[name for name in each if name not in FRAMEWORK_NAMES] for each in (ours, theirs)]
    found = [
        f"{'only in torch' if line[0] == '+' else 'only in jax'}, or in another order: {line[2:]}"
        for line in difflib.ndiff(*names)
        if line[0] in "+-"
    ]
    for name in (name for name in ours if name in theirs):
        jax_lines = without_a_frameworks_own(ours[name], theirs[name])
        torch_lines = without_a_frameworks_own(theirs[name], ours[name])
        if jax_lines != torch_lines:
            found.append(f"{name}: jax {jax_lines}, torch {torch_lines}")
    return found


def test_the_same_files():
    torch = {path.name for path in TORCH.glob("*.py")}
    assert torch - FILES_OF_TORCH_ALONE == FILES
    assert torch >= FILES_OF_TORCH_ALONE
    assert {"__init__.py", "pi0.py", "pruner.py", "gemma.py", "siglip.py"} <= torch


@pytest.mark.parametrize("file", SHARED_FILES)
def test_the_same_outline(file):
    assert differences(file, (JAX / file).read_text(), (TORCH / file).read_text()) == []


def test_every_exception_is_needed():
    assert FRAMEWORK_NAMES.isdisjoint(names_of(JAX))
    assert names_of(TORCH).keys() >= FRAMEWORK_NAMES
    for name in OTHER_ANNOTATIONS:
        assert names_of(JAX)[name] != names_of(TORCH)[name], name


def names_of(package: pathlib.Path) -> dict[str, list[str]]:
    """The outline of all its files that are shared, every one annotated."""
    return {
        name: lines
        for file in SHARED_FILES
        for name, lines in outline(ast.parse((package / file).read_text()).body, f"{file}: ", set())
    }


TWIN = """
EPSILON = 1e-6
log = get_logger()

@dataclasses.dataclass
class Found:
    tokens: Float[Array, "B N"]
    index: int = 0

class Layer(nnx.Module):
    def __init__(self, width: int, *, bias: bool = True) -> None: ...
    def __call__(self, x: Float[Array, "B D"]) -> Float[Array, "B D"]: ...
    def _private(self): ...
    @property
    def width(self) -> int: ...

def make(width: int, dtype: jnp.dtype) -> Layer: ...
def load(path: str) -> Layer: ...
"""

IN_TORCH = (
    TWIN.replace("Array", "Tensor")
    .replace("nnx.", "nn.")
    .replace("jnp.dtype", "torch.dtype")
    .replace("__call__", "forward")
    .replace("_private", "_own")
    .replace("get_logger()", "None")
    .replace("path: str", "path: str, *, device: str | None = None")
)


def test_the_frameworks_own_is_no_difference():
    assert differences("a.py", TWIN, IN_TORCH) == []


@pytest.mark.parametrize(
    ("before", "after", "named"),
    [
        ("1e-6", "1e-5", "EPSILON"),
        ("EPSILON =", "SMALL =", "SMALL"),
        ("class Found", "class Chosen", "Chosen"),
        ("(nn.Module)", "(Found)", "Layer"),
        (
            '    tokens: Float[Tensor, "B N"]\n    index: int = 0',
            "    index: int = 0",
            "Found.tokens",
        ),
        ('Float[Tensor, "B N"]', 'Float[Tensor, "N B"]', "Found.tokens"),
        ("index: int = 0", "index: int = 1", "Found.index"),
        ("width: int, *, bias", "width: int, bias", "Layer.__init__"),
        ("bias: bool = True", "bias: bool = False", "Layer.__init__"),
        ("bias: bool = True", "use_bias: bool = True", "Layer.__init__"),
        ("*, bias: bool = True", "*, bias: bool = True, eps: float = 0", "Layer.__init__"),
        ("forward", "apply", "Layer.apply"),
        ('x: Float[Tensor, "B D"]', 'x: Float[Tensor, "D B"]', "Layer.__call__"),
        ("    @property\n", "", "Layer.width"),
        ("def width", "def breadth", "Layer.breadth"),
        ("width: int, dtype: torch.dtype", "dtype: torch.dtype, width: int", "make"),
        ("def load", "def _load", "load"),
        ("def load", "def extra(): ...\ndef load", "extra"),
        ("device: str | None = None", "seed: int = 0", "load"),
    ],
)
def test_a_difference_is_found(before, after, named):
    assert before in IN_TORCH
    found = differences("a.py", TWIN, IN_TORCH.replace(before, after))
    assert any(f"a.py: {named}" in line for line in found), found


def test_another_order_is_a_difference():
    lines = IN_TORCH.splitlines()
    swapped = "\n".join([*lines[:-2], lines[-1], lines[-2]])
    found = differences("a.py", TWIN, swapped)
    assert sorted(line.partition(",")[0] for line in found) == ["only in jax", "only in torch"]

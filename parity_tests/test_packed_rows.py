"""Packed rows: how they lie, and what takes them on Hopper, held against float64."""

import itertools
import pathlib
import re
import subprocess
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from parity_tests.harness import BACKENDS, DEVICE, error
from parity_tests.tolerances import tolerance
from pruner_kernels import few_rows
from pruner_torch import kernels, kernels_plain
from pruner_torch.deployed import ExpertLayer
from pruner_torch.kernels_plain import PackedQuery, Rows

if "torch" not in BACKENDS:
    pytest.skip("without torch", allow_module_level=True)

ROOT = pathlib.Path(__file__).parent.parent
WIDTH, MLP, HEADS, HEAD_DIM, ACTIONS = 1024, 4096, 8, 256, 32  # of π0.5's action expert
EXPERT = {"width": WIDTH, "mlp": MLP, "heads": HEADS, "groups": 1, "head_dim": HEAD_DIM}
HOPPER = (
    DEVICE == "cuda"
    and torch.cuda.get_device_capability() == few_rows.CAPABILITY
    and few_rows.available()
)
needs_hopper = pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
needs_nvrtc = pytest.mark.skipif(not few_rows.available(), reason="NVRTC is not installed")


def place(row: int, k: int) -> tuple[int, int, int, int]:
    """Where `few_rows.cu` says that element k of a row is."""
    return k // 32, k % 8 // 2, row, k % 32 // 8 * 2 + k % 2


@pytest.mark.parametrize("count", [1, 5, 8, 50])
def test_rows_are_packed_as_the_kernels_read_them(count):
    x = torch.randn(count, 96)
    packed = kernels_plain.pack(x)
    assert packed.shape == few_rows.packed_shape(count, 96)
    for row, k in itertools.product(range(count), range(96)):
        assert packed[place(row, k)] == x[row, k]
    assert torch.equal(kernels_plain.unpack(packed, count), x)
    assert not packed[:, :, count:].any()


def test_queries_are_packed_in_tiles():
    """Of (token, head) pairs, each as rows are."""
    batch, length, heads, head_dim = shape = (2, 5, 4, 64)
    x = torch.randn(shape)
    query = kernels_plain.pack_query(x)
    assert query.shape == shape
    assert query.packed.shape == few_rows.queries_shape(*shape)
    pairs = x.view(batch, -1, head_dim)
    for pair, k in itertools.product(range(length * heads), range(head_dim)):
        tile, row = divmod(pair, few_rows.QUERIES)
        assert torch.equal(query.packed[(slice(None), tile, *place(row, k))], pairs[:, pair, k])
    assert torch.equal(kernels_plain.unpack_query(query), x)


@pytest.mark.parametrize(
    ("change", "applies"),
    [
        ({}, True),
        ({"rows": 64}, True),
        ({"rows": 65}, False),
        ({"rows": 0}, False),
        ({"groups": 2}, False),
        ({"bits": 32}, False),
        ({"width": 2048}, False),  # the language model's: more weights than registers
        ({"width": 1000}, False),
        ({"mlp": 16384}, False),
        ({"mlp": 256}, False),
        ({"heads": 1}, False),
        ({"heads": 1, "head_dim": 512}, True),
        ({"heads": 16, "head_dim": 32}, False),
    ],
)
def test_where_it_applies(change, applies):
    assert few_rows.applies(**{"rows": 50, **EXPERT, **change}) == applies


def launches(rows: int, width: int, mlp: int, heads: int, head_dim: int) -> list[few_rows.Launch]:
    most, parts = few_rows.MAX_KEYS, width // 64
    given = [
        few_rows.project(rows, width, 1, heads, head_dim, rows, rows + 9, 9, True),
        few_rows.project(rows, width, parts, heads, head_dim, rows, rows, 0, False),
        few_rows.gated(rows, width, parts, mlp),
        few_rows.merge(rows, heads * head_dim, width),
        few_rows.merge(rows, mlp, width),
    ]
    if few_rows.attends(most, head_dim):
        given.append(few_rows.attend(1, rows, heads, head_dim, rows + 9, rows + 9, True))
        given.append(few_rows.attend(1, rows, heads, head_dim, most, most, False))
    given.append(few_rows.embed_actions(rows, ACTIONS, width))
    given.append(few_rows.euler_step(rows, width, parts, ACTIONS, -0.1))
    return given


@needs_nvrtc
@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes",
    [(50, WIDTH, MLP, HEADS, HEAD_DIM), (64, WIDTH, MLP, HEADS, HEAD_DIM), (1, 128, 512, 8, 64)],
)
def test_launches_compile(sizes):
    """With the shared memory that is said, which the compiler holds against what is used."""
    for launch in launches(*sizes):
        name, code = few_rows.compiled(launch)
        assert name.encode() in code
        assert launch.shared <= few_rows.HOPPER


@needs_nvrtc
def test_what_does_not_compile_is_said_and_left_to_triton(caplog):
    launch = few_rows.Launch("gated<1024, 16, 4096>", 50, (1, 1, 1), 16)
    with pytest.raises(RuntimeError, match=r"gated<1024, 16, 4096> does not compile.*static"):
        few_rows.compiled(launch)
    with caplog.at_level("WARNING"):
        assert not few_rows.compiles(launch)
    assert "Triton's kernels are taken" in caplog.text


def normal(draw: np.random.Generator, *shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(draw.standard_normal(shape)).to(DEVICE, dtype)


def cases(dtype: torch.dtype, sizes: tuple[tuple[int, int], ...]) -> Iterator[tuple[str, Any, Any]]:
    """Names, functions of `kernels`, and their arguments, rows not packed yet.

    Numbers of rows that are whole tiles of 8 and that are not, in one sample and in several.
    """
    for batch, length in sizes:
        draw, count = np.random.default_rng(7), batch * length

        def small(*shape: int, dtype: torch.dtype = dtype, draw: Any = draw) -> torch.Tensor:
            return normal(draw, *shape, dtype=dtype)

        def wide(*shape: int, small: Any = small) -> torch.Tensor:
            return small(*shape, dtype=torch.float32)

        def kernel(inputs: int, outputs: int, small: Any = small) -> torch.Tensor:
            return (small(outputs, inputs) * inputs**-0.5).T

        room, at = length + 7, 3
        caches = [small(batch, room, 1, HEAD_DIM) for _ in "kv"]
        angle, name = wide(batch, length, HEAD_DIM // 2), f"{batch} x {length}"
        for parts in (1, 16):
            squares = WIDTH / parts * (0.5 + wide(parts, count).square())
            rows = Rows(small(count, WIDTH), small(count, WIDTH), squares)
            outputs = (HEADS + 2) * HEAD_DIM
            around = (angle.cos(), angle.sin(), *caches, at, HEADS)
            given = (rows, kernel(WIDTH, outputs), wide(outputs), *around)
            yield f"project {name}, {parts} parts", "project", given
            given = (rows, kernel(WIDTH, 2 * MLP), wide(2 * MLP))
            yield f"gated {name}, {parts} parts", "gated", given
        for inputs in (HEADS * HEAD_DIM, MLP):
            vectors = small(WIDTH), 1 + wide(WIDTH)
            x, residual = small(count, inputs), small(count, WIDTH)
            given = (x, kernel(inputs, WIDTH), residual, *vectors)
            yield f"merge {name} of {inputs}", "merge", given
        for keys in (length + 7, 178, 306, 1018):
            query = 2 * HEAD_DIM**-0.5 * small(batch, length, HEADS, HEAD_DIM)
            past = [small(batch, keys, 1, HEAD_DIM) for _ in "kv"]
            mask = wide(batch, keys) < 0.3
            mask[1:2] = False  # of several samples the second has no key at all
            for masked in (None, mask):
                kind = "all" if masked is None else "masked"
                yield f"attend {name} of {keys}, {kind}", "attend", (query, *past, masked)
        noisy, bias = wide(batch, length, ACTIONS), wide(WIDTH)
        given = (noisy, wide(ACTIONS, WIDTH) / 8, bias, 1 + wide(WIDTH), dtype)
        yield f"embed_actions {name}", "embed_actions", given
        squares = WIDTH / 16 * (0.5 + wide(16, count).square())
        rows = Rows(small(count, WIDTH), small(count, WIDTH), squares)
        onto = wide(WIDTH, ACTIONS) / 32, wide(ACTIONS), noisy, -0.1
        yield f"euler_step {name}", "euler_step", (rows, 1 + wide(WIDTH), wide(WIDTH), *onto)


def packed(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same, the first packed; of attention and of what embeds actions, that it is to be."""
    first, *others = arguments
    if isinstance(others[-1], torch.dtype):
        return *arguments, True
    if isinstance(first, Rows):
        first = Rows(first.x, kernels_plain.pack(first.scaled), first.squares)
    elif first.ndim == 4:
        return kernels_plain.pack_query(first), *others, True
    else:
        first = kernels_plain.pack(first)
    return first, *others


def computed(module: Any, function: str, arguments: tuple[Any, ...]) -> list[np.ndarray]:
    """What a function gives, of rows as they are; keys and values that are given remain."""
    copies = [each.clone() if isinstance(each, torch.Tensor) else each for each in arguments]
    found = getattr(module, function)(*copies)
    first = arguments[0]
    count = len(first.x) if isinstance(first, Rows) else first.shape[0] * first.shape[1]
    if function == "euler_step":
        found = [found]
    elif isinstance(found, Rows):
        scaled = kernels_plain.unpack(found.scaled, len(found.x))
        found = [found.x, scaled, found.squares.sum(0)]
    elif function == "project":
        query, *caches = found
        query = kernels_plain.unpack_query(query) if isinstance(query, PackedQuery) else query
        found = [query, *caches]
    else:
        rows = kernels_plain.unpack(found, count)
        found = [rows.reshape(count, -1)]
    return [BACKENDS["torch"].numpy(each) for each in found]


def in_float64(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    def exact(each: Any) -> Any:
        if isinstance(each, Rows):
            return Rows(*(exact(x) for x in (each.x, each.scaled, each.squares)))
        floating = isinstance(each, torch.Tensor) and each.is_floating_point()
        return each.double() if floating else each

    return tuple(map(exact, arguments))


@pytest.mark.parametrize(
    ("name", "function", "arguments"), list(cases(torch.float32, ((2, 5),))), ids=lambda each: ""
)
def test_without_such_a_gpu_packed_rows_give_the_same(name, function, arguments):
    """By a library's products, which `kernels` takes for packed rows in float32."""
    expected = computed(kernels_plain, function, arguments)
    for module in (kernels, kernels_plain):
        for found, exact in zip(
            computed(module, function, packed(arguments)), expected, strict=True
        ):
            assert np.array_equal(found, exact), name


SIZES = ((1, 1), (1, 10), (1, 33), (1, 50), (2, 20), (4, 16))


@needs_hopper
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_what_takes_packed_rows(size):
    """In bfloat16 against float64; twice with the same bits."""
    for name, function, arguments in cases(torch.bfloat16, (size,)):
        expected = computed(kernels_plain, function, in_float64(arguments))
        given = packed(arguments)
        first, again = (computed(kernels, function, given) for _ in range(2))
        for found, other, exact in zip(first, again, expected, strict=True):
            assert error(found, exact) <= tolerance("kernel", "bfloat16"), name
            assert np.array_equal(found, other), name


@needs_hopper
@pytest.mark.parametrize("change", ["", "dtype", "inputs first", "no such GPU", "actions"])
def test_who_packs(change):
    """An expert's layers whose kernels lie outputs first, in bfloat16."""
    shapes = [(WIDTH, (HEADS + 2) * HEAD_DIM), (HEADS * HEAD_DIM, WIDTH)]
    shapes += [(WIDTH, 2 * MLP), (MLP, WIDTH)]
    kind = {"dtype": torch.float32}.get(change, torch.bfloat16)
    there = "cpu" if change == "no such GPU" else DEVICE
    made = [torch.zeros(outputs, inputs, dtype=kind, device=there).T for inputs, outputs in shapes]
    if change == "inputs first":
        made[2] = made[2].contiguous()
    qkv, out, gate_up, down = made
    layer = ExpertLayer(None, qkv, out, None, gate_up, down)
    actions = 7 if change == "actions" else ACTIONS
    assert kernels.packs(50, layer, HEAD_DIM, actions) == (change == "")
    assert not kernels_plain.packs(50, layer, HEAD_DIM, actions)


@needs_nvrtc
@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 33, 50, 64])
def test_threads_have_the_registers_that_they_use(rows, tmp_path):
    """Those that bring give most of theirs to those that compute, which no compiler watches."""
    disassembler = pytest.importorskip("triton").__path__[0] + "/backends/nvidia/bin/cuobjdump"
    source = (ROOT / "pruner_kernels" / "few_rows.cu").read_text()
    bringing, computing = (
        int(re.search(rf"{who}_REGISTERS = (\d+)", source)[1]) for who in ("BRINGING", "COMPUTING")
    )
    assert 128 * bringing + 256 * computing <= 1 << 16
    for launch in launches(rows, WIDTH, MLP, HEADS, HEAD_DIM):
        if launch.kernel.startswith(("project", "gated", "merge")):  # whose threads divide the work
            file = tmp_path / "launch.cubin"
            file.write_bytes(few_rows.compiled(launch)[1])
            listing = subprocess.run(
                [disassembler, "-sass", str(file)], check=True, capture_output=True, text=True
            ).stdout
            assert used(listing, after="DEALLOC") < bringing, launch
            assert used(listing, after="TRY_ALLOC") < computing, launch


def used(listing: str, after: str) -> int:
    """The highest register of all that may run after an instruction."""
    lines = [line for line in listing.splitlines() if re.match(r"\s+/\*[0-9a-f]{4}\*/", line)]
    places = {int(line.split("*")[1], 16): i for i, line in enumerate(lines)}
    todo, seen = [next(i for i, line in enumerate(lines) if after in line)], set()
    while todo:
        i = todo.pop()
        if i in seen or i == len(lines):
            continue
        seen.add(i)
        line, always = lines[i], not re.search(r"@!?U?P\d", lines[i])
        target = re.search(r"\b(BRA|BSSY|CALL)\b.* 0x([0-9a-f]+) ;", line)
        if target:
            todo.append(places[int(target[2], 16)])
        leaves = re.search(r"\b(EXIT|BRA 0x)", line)
        if not (leaves and always):
            todo.append(i + 1)
    widths = {".128": 4, ".64": 2}
    highest = 0
    for i in seen:
        width = max((size for name, size in widths.items() if name in lines[i]), default=1)
        numbers = [int(number) for number in re.findall(r"\bR(\d+)\b", lines[i])]
        highest = max([highest, *(number + width - 1 for number in numbers)])
    return highest

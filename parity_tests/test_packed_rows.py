"""Packed rows: how they lie, and the products that take them on Hopper."""

import functools
from typing import Any

import numpy as np
import pytest

from parity_tests import packed_cases
from parity_tests.harness import BACKENDS, DEVICE, error
from parity_tests.packed_cases import STEP, Case
from parity_tests.tolerances import tolerance
from pruner_kernels import few_rows

EXPERT = {"width": 1024, "mlp": 4096, "heads": 8, "groups": 1, "head_dim": 256}


def modules(backend: str) -> Any:
    """`kernels` and `kernels_plain`."""
    if backend == "torch":
        from pruner_torch import kernels, kernels_plain
    else:
        from pruner_jax import kernels, kernels_plain
    return kernels, kernels_plain


def on_hopper() -> bool:
    if DEVICE != "cuda" or not few_rows.available():
        return False
    import torch

    return torch.cuda.get_device_capability() == few_rows.CAPABILITY


needs_hopper = pytest.mark.skipif(not on_hopper(), reason="needs a Hopper GPU")
needs_nvrtc = pytest.mark.skipif(not few_rows.available(), reason="NVRTC is not installed")


def place(row: int, k: int) -> tuple[int, int, int, int]:
    """Where `few_rows.cu` says that element k of a row is."""
    return k // 32, k % 8 // 2, row, k % 32 // 8 * 2 + k % 2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("count", [1, 5, 8, 50])
def test_rows_are_packed_as_the_kernels_read_them(backend, count):
    _, plain = modules(backend)
    x = np.random.default_rng(7).standard_normal((count, 96)).astype(np.float32)
    found = plain.pack(BACKENDS[backend].array(x))
    assert tuple(found.shape) == few_rows.packed_shape(count, 96)
    packed = BACKENDS[backend].numpy(found)
    for row in range(count):
        for k in range(96):
            assert packed[place(row, k)] == x[row, k]
    assert np.array_equal(BACKENDS[backend].numpy(plain.unpack(found, count)), x)
    assert not packed[:, :, count:].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_queries_are_packed_in_tiles(backend):
    """Of (token, head) pairs, each as rows are."""
    _, plain = modules(backend)
    batch, length, heads, head_dim = shape = (2, 5, 4, 64)
    x = np.random.default_rng(7).standard_normal(shape).astype(np.float32)
    query = plain.pack_query(BACKENDS[backend].array(x))
    assert query.shape == shape
    assert tuple(query.packed.shape) == few_rows.queries_shape(*shape)
    packed, pairs = BACKENDS[backend].numpy(query.packed), x.reshape(batch, -1, head_dim)
    for pair in range(length * heads):
        for k in range(head_dim):
            at = place(pair % few_rows.QUERIES, k)
            assert np.array_equal(packed[:, pair // few_rows.QUERIES, *at], pairs[:, pair, k])
    assert np.array_equal(BACKENDS[backend].numpy(plain.unpack_query(query)), x)


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
    return [
        few_rows.project(rows, width, 1, heads, head_dim, rows, rows + 9, 9, True),
        few_rows.project(rows, width, width // 64, heads, head_dim, rows, rows, 0, False),
        few_rows.gated(rows, width, width // 64, mlp),
        few_rows.merge(rows, heads * head_dim, width),
        few_rows.merge(rows, mlp, width),
        few_rows.attend(1, rows, heads, head_dim, rows + 9, rows + 9, True),
        few_rows.attend(1, rows, heads, head_dim, few_rows.MAX_KEYS, few_rows.MAX_KEYS, False),
    ]


@needs_nvrtc
@pytest.mark.slow
@pytest.mark.parametrize("form", ["ptx", "cubin"])
@pytest.mark.parametrize(
    "sizes", [(50, 1024, 4096, 8, 256), (64, 1024, 4096, 8, 256), (1, 128, 512, 8, 64)]
)
def test_launches_compile(sizes, form):
    """With the shared memory that is said, which the compiler holds against what is used."""
    for launch in launches(*sizes):
        name, code = few_rows.compiled(launch, form, form == "ptx", few_rows.AMONG)
        assert name.encode() in code
        assert launch.shared <= few_rows.HOPPER


@needs_nvrtc
def test_what_does_not_compile_is_said():
    launch = few_rows.Launch("gated<1024, 16, 4096>", (), 50, (1, 1, 1), 16)
    with pytest.raises(RuntimeError, match=r"gated<1024, 16, 4096> does not compile.*static"):
        few_rows.compiled(launch, "ptx", False, few_rows.AHEAD)


def result(backend: str, case: Case, packed: bool, wide: bool, plain: bool) -> list[np.ndarray]:
    """What a function gives: rows as they are, keys and values as they were left."""
    kernels, kernels_plain = modules(backend)
    array = functools.partial(_array, backend, wide)
    if case.function == "attend":
        return _attended(backend, case, packed, array, kernels_plain if plain else kernels)
    pack = kernels_plain.pack if packed else lambda x: x
    x, kernel = pack(array(case.rows["scaled"])), array(case.kernel).T
    vectors = [_vector(backend, array(each, narrow=False)) for each in case.vectors]
    others: list[Any] = list(case.others)
    if case.function == "merge":
        vectors[0] = _vector(backend, array(case.vectors[0]))  # a gate is in the model's dtype
        residual = array(case.rows["residual"])
        arguments = (x, kernel, residual, *vectors)
    else:
        others[:2] = [array(each, narrow=False) for each in others[:2]]
        others[2:4] = [array(each) for each in others[2:4]]
        count = len(case.rows["scaled"])
        empty = array(np.zeros((count, case.kernel.shape[1])))
        rows = kernels_plain.Rows(empty, x, array(case.rows["squares"], narrow=False))
        arguments = (rows, kernel, *vectors, *others)
    call = functools.partial(getattr(kernels_plain if plain else kernels, case.function))
    if backend == "jax":
        import jax

        numbers = len(arguments) - 2 if case.function == "project" else len(arguments)
        fixed = arguments[numbers:]
        found = jax.jit(lambda *arrays: call(*arrays, *fixed))(*arguments[:numbers])
    else:
        found = call(*arguments)
    if hasattr(found, "squares"):
        scaled = kernels_plain.unpack(found.scaled, len(found.x))
        found = (found.x, scaled, found.squares.sum(0))
    elif case.function == "project" and isinstance(found[0], kernels_plain.PackedQuery):
        found = (kernels_plain.unpack_query(found[0]), *found[1:])
    elif case.function == "gated":
        found = (kernels_plain.unpack(found, len(case.rows["scaled"])),)
    return [BACKENDS[backend].numpy(each) for each in found]


def _attended(backend: str, case: Case, packed: bool, array: Any, module: Any) -> list[np.ndarray]:
    _, plain = modules(backend)
    *caches, mask = case.others
    query, key, value = (array(each) for each in (case.rows["query"], *caches))
    mask = None if mask is None else BACKENDS[backend].array(mask)
    count = query.shape[0] * query.shape[1]
    found = module.attend(plain.pack_query(query) if packed else query, key, value, mask, packed)
    return [BACKENDS[backend].numpy(plain.unpack(found, count))]


def _array(backend: str, wide: bool, values: np.ndarray, narrow: bool = True) -> Any:
    """In bfloat16 or float32; with `wide`, the same numbers in float64."""
    import ml_dtypes

    values = values.astype(ml_dtypes.bfloat16 if narrow else np.float32)
    values = values.astype(np.float64) if wide else values
    if backend == "jax":
        import jax.numpy as jnp

        return jnp.asarray(values)
    import torch

    if values.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(values.astype(np.float32)).to(DEVICE, torch.bfloat16)
    return torch.from_numpy(values).to(DEVICE)


def _vector(backend: str, table: Any) -> Any:
    if backend == "torch":
        return table[STEP]
    import jax.numpy as jnp

    from pruner_jax.tables import TableRow

    return TableRow(table, jnp.int32(STEP))


# One sample's products, and attention.
SOME = [*list(packed_cases.cases())[:4], *list(packed_cases.cases())[-4:]]


@pytest.mark.skipif(DEVICE != "cpu", reason="XLA's fusions round as they please on a GPU")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", SOME, ids=lambda case: case.name)
def test_without_such_a_gpu_packed_rows_give_the_same(backend, case):
    dense, packed = (result(backend, case, packed, False, True) for packed in (False, True))
    for found, expected in zip(packed, dense, strict=True):
        assert np.array_equal(found, expected)


@needs_hopper
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", list(packed_cases.cases()), ids=lambda case: case.name)
def test_a_product_of_packed_rows(backend, case):
    """Twice with the same bits."""
    first, again = (result(backend, case, True, False, False) for _ in range(2))
    for found, expected in zip(first, _expected(case), strict=True):
        assert error(found, expected) <= tolerance("kernel", "bfloat16")
    for found, expected in zip(again, first, strict=True):
        assert np.array_equal(found, expected)


def _expected(case: Case) -> list[np.ndarray]:
    """In float64, in PyTorch; of what is scaled, by what x was rounded to is not known here."""
    return result("torch", case, False, True, True)

"""Products of packed rows on Hopper, held against `kernels_plain` in float64, in both backends."""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

WIDTH, MLP, HEADS, HEAD_DIM = 1024, 4096, 8, 256  # of π0.5's action expert
STEPS, STEP = 3, 1  # of a schedule's tables, and the one that a launch is at


@dataclasses.dataclass(frozen=True)
class Case:
    """A function of `kernels`, and its arguments.

    Attributes:
        name: with its sizes.
        function: of `kernels`.
        rows: what is packed before: of x, and where the product has a norm its squares too; or
            queries.
        kernel: [outputs, inputs], as it lies in memory.
        vectors: [STEPS, N]: what is added; or a gate and a scale.
        others: what follows.
    """

    name: str
    function: str
    rows: dict[str, np.ndarray]
    kernel: np.ndarray
    vectors: tuple[np.ndarray, ...]
    others: tuple[Any, ...] = ()


def cases() -> Iterator[Case]:
    """Numbers of rows that are whole tiles of 8 and that are not; in one sample and in several."""
    for (batch, length), parts in itertools.product(
        ((1, 1), (1, 10), (1, 33), (1, 50), (2, 20), (4, 16)), (1, 16)
    ):
        draw, count = np.random.default_rng(7), batch * length
        normal = draw.standard_normal
        squares = draw.uniform(0.5, 4, (parts, count)) * WIDTH / parts
        rows = {"scaled": normal((count, WIDTH)), "squares": squares}
        name = f"{batch} x {length}, {parts} parts"

        def kernel(inputs: int, outputs: int, normal: Any = normal) -> np.ndarray:
            return normal((outputs, inputs)) / np.sqrt(inputs)

        outputs, room, place = (HEADS + 2) * HEAD_DIM, length + 7, 3
        angle = normal((batch, length, HEAD_DIM // 2))
        cache = normal((2, batch, room, 1, HEAD_DIM))
        yield Case(
            f"project {name}",
            "project",
            rows,
            kernel(WIDTH, outputs),
            (normal((STEPS, outputs)),),
            (np.cos(angle), np.sin(angle), *cache, place, HEADS),
        )
        added = (normal((STEPS, 2 * MLP)),)
        yield Case(f"gated {name}", "gated", rows, kernel(WIDTH, 2 * MLP), added)
        if parts == 1:
            for inputs in (HEADS * HEAD_DIM, MLP):
                given = {"scaled": normal((count, inputs)), "residual": normal((count, WIDTH))}
                vectors = normal((STEPS, WIDTH)), 1 + normal((STEPS, WIDTH))
                name = f"merge {batch} x {length} of {inputs}"
                yield Case(name, "merge", given, kernel(inputs, WIDTH), vectors)
    for batch, length, keys in ((1, 50, 60), (1, 50, 178), (2, 20, 306), (4, 3, 130)):
        draw = np.random.default_rng(7)
        normal, shape = draw.standard_normal, (2, batch, keys, 1, HEAD_DIM)
        query = {"query": 2 * HEAD_DIM**-0.5 * normal((batch, length, HEADS, HEAD_DIM))}
        mask = draw.random((batch, keys)) < 0.6
        mask[1:2] = False  # of two samples the second has no key at all
        for name, given in (("all", None), ("masked", mask)):
            name = f"attend {batch} x {length} of {keys}, {name}"
            yield Case(name, "attend", query, np.zeros((1, 1)), (), (*normal(shape), given))

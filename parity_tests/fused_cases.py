"""What `kernels_pruner`, `add_layer_norm` and `kernels_float8` compute, held against the reference
and the plain way.

Run as a program, it tries every case and prints what it found as JSON: in a process of its own,
since Triton is told to interpret before it is imported. Around the inputs is NaN.
"""

import dataclasses
import json
import os
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from parity_tests.cases import BUDGETS, PRUNER_CASES, PRUNING, tiny_config
from parity_tests.harness import DEVICE, error, others
from pruner_spec import pruner as reference
from pruner_torch import (
    float8,
    kernels,
    kernels_float8,
    kernels_plain,
    kernels_pruner,
    kernels_vision,
    pruner,
)
from pruner_torch.pi0 import Encoded, Pi0

FULL = DEVICE == "cuda"
DTYPES = ("float32", "bfloat16")
EPSILON = 1e-6
Row = dict[str, Any]


def surrounded(values: np.ndarray, dtype: str) -> Tensor:
    """A view [..., rows, columns] with NaN behind each row and after all of them."""
    room = (*values.shape[:-2], values.shape[-2] + 2, values.shape[-1] + 8)
    tensor = torch.full(room, float("nan"), dtype=getattr(torch, dtype), device=DEVICE)
    view = tensor[..., : values.shape[-2], : values.shape[-1]]
    return view.copy_(torch.from_numpy(values))


def there(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array).to(DEVICE)


def double(x: Tensor) -> np.ndarray:
    return x.to(torch.float64).cpu().numpy()


def same(found: Tensor, expected: Tensor) -> bool:
    """Bit for bit, NaN where NaN is expected, and of one dtype."""
    if found.dtype != expected.dtype or found.shape != expected.shape:
        return False
    return bool(((found == expected) | (found.isnan() & expected.isnan())).all())


def scores() -> Iterator[Row]:
    for case in PRUNER_CASES.values():
        if case.patches > 256 and not FULL:
            continue
        inputs = case.inputs()
        for dtype in DTYPES:
            patches, task = (surrounded(x, dtype) for x in (inputs.patches, inputs.task))
            found = kernels_pruner.importance_score(patches, task, there(inputs.task_mask))
            expected = reference.importance_score(double(patches), double(task), inputs.task_mask)
            yield {"case": f"{case.name}, {dtype}", "error": error(double(found), expected)}


def ballots() -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Scores and masks of patches: of the cases; full of ties; and not all finite."""
    for case in PRUNER_CASES.values():
        if case.patches <= 256 or FULL:
            inputs = case.inputs()
            yield case.name, inputs.noise, inputs.patch_mask
    generator = np.random.default_rng(3)
    tied = generator.integers(0, 3, (5, 40, 40)).astype(np.float64)
    mask = np.arange(40)[None, :] >= np.array([0, 4, 30, 39, 40])[:, None]
    yield "ties", tied, mask
    broken = tied.copy()
    broken[0, 3], broken[1, :, 7], broken[2, 35, 36] = np.nan, np.inf, -np.inf
    broken[3, 39, 39] = np.nan  # the one that is valid
    yield "not finite", broken, mask
    yield "one patch", tied[:, :1, :1], mask[:, -1:]


def elections() -> Iterator[Row]:
    for name, values, mask in ballots():
        score = there(values.astype(np.float32))
        budget = torch.arange(len(values), device=DEVICE)
        budgets: dict[str, dict[str, Any]] = BUDGETS | {"a number each": {"keep_tokens": budget}}
        for how, settings in budgets.items():
            given = (settings.get("keep_tokens"), settings.get("min_keep", 1))
            for patch_mask in (there(mask), there(mask[:, :1]).expand(mask.shape)):
                expected = pruner._select(score, patch_mask, *given)
                found = pruner.Selection(*kernels_pruner.elect(score, patch_mask, *given))
                equal = same(found.kept, expected.kept) and same(found.counts, expected.counts)
                yield {"case": f"{name}, {how}", "same": equal}


def encoded_of(config: Any, dtype: str) -> Encoded:
    """Random tokens of 3 samples, the second of which has a camera's NaN."""
    generator = np.random.default_rng(5)
    shape = (3, 3, config.vision.num_patches, config.paligemma.width)
    patches = generator.standard_normal(shape)
    patches[1, 2, 4, 0] = np.nan
    prompt = generator.standard_normal((3, 21, shape[-1]))
    return Encoded(
        patches=surrounded(patches, dtype)[:, :, :, :].contiguous(),
        camera_mask=there(
            np.array([[True, True, True], [True, False, True], [False, True, False]])
        ),
        prompt=surrounded(prompt, dtype),
        prompt_mask=there(np.arange(21)[None, :] < np.array([21, 9, 1])[:, None]),
    )


def prefixes() -> Iterator[Row]:
    """By a selection of the kernels, which are called; packed to few slots, and to all."""
    for dtype in DTYPES:
        for name in ("implicit", "implicit, joint", "5 a camera", "a quarter, joint"):
            config = tiny_config(dtype=dtype, **PRUNING[name])
            model, encoded = Pi0(config, device=DEVICE), encoded_of(config, dtype)
            with mock.patch.object(kernels_pruner, "elect", wraps=kernels_pruner.elect) as elect:
                found = model.select(encoded, kernels)
            expected = model.select(encoded, kernels_plain)
            healthy = dataclasses.replace(encoded, patches=encoded.patches.nan_to_num())
            agree = [model.select(healthy, way) for way in (kernels, kernels_plain)]
            yield {
                "case": f"{name}, {dtype}",
                "called": elect.call_count == 1,
                "same": same(found.nonfinite > 0, expected.nonfinite > 0)
                and same(agree[0].kept, agree[1].kept)
                and same(agree[0].counts, agree[1].counts),
            }
            for room in (int(found.kept.sum(dim=-1).max()), found.kept.shape[1]):
                ways = [model.prune(encoded, found, room, way) for way in (kernels, kernels_plain)]
                fields = [field.name for field in dataclasses.fields(ways[0])]
                equal = all(same(*(getattr(way, field) for way in ways)) for field in fields)
                yield {"case": f"{name}, {dtype}, {room} slots", "same": equal}


def layer_norms() -> Iterator[Row]:
    generator, launch = np.random.default_rng(6), kernels_vision.add_layer_norm
    for dtype in DTYPES:
        for rows, width in ((3, 1152), (5, 72), (1, 16)):
            x, y = (surrounded(generator.standard_normal((2, rows, width)), dtype) for _ in "xy")
            # Far from 0, where the mean must go before it is squared.
            x += 8
            scale, shift = (
                there(generator.standard_normal(width)).to(x.dtype) for _ in ("scale", "shift")
            )
            with mock.patch.object(kernels_vision, "add_layer_norm", wraps=launch) as called:
                total, normed = kernels.add_layer_norm(x, y, scale, shift, EPSILON)
            z = double(total)
            z = z - z.mean(-1, keepdims=True)
            z = z / np.sqrt(np.square(z).mean(-1, keepdims=True) + EPSILON)
            yield {
                "case": f"{rows} x {width}",
                "dtype": dtype,
                "called": called.call_count == 1,
                "total": error(double(total), double(x) + double(y)),
                "error": error(double(normed), z * double(scale) + double(shift)),
            }


def attentions() -> Iterator[Row]:
    """Of whole tiles and parts of one; of heads that are a product and a rest, or less than one."""
    generator, launch = np.random.default_rng(8), kernels_vision.attend_patches
    for images, patches, heads, head_dim in ((1, 70, 2, 72), (2, 70, 3, 24), (1, 9, 2, 6)):
        shape = images, patches, 3, heads, head_dim
        qkv = there(generator.standard_normal(shape)).to(torch.bfloat16)
        with mock.patch.object(kernels_vision, "attend_patches", wraps=launch) as called:
            attended = kernels.attend_patches(qkv.flatten(2), heads)
        query, key, value = np.moveaxis(double(qkv), 2, 0)
        logits = np.einsum("bikh,bjkh->bkij", query, key) * head_dim**-0.5
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        expected = np.einsum("bkij,bjkh->bikh", weights, value).reshape(images, patches, -1)
        yield {
            "case": f"{images} x {patches} of {heads} x {head_dim}",
            "dtype": "bfloat16",
            "called": called.call_count == 1,
            "error": error(double(attended), expected),
        }


def float8_rows() -> Iterator[Row]:
    """Rows of all sizes, one of zeros; how many values are others, and the product of all."""
    generator, launch = np.random.default_rng(9), kernels_float8.quantize_rows
    for dtype in DTYPES:
        for rows, width in ((3, 1152), (5, 80), (1, 16), (110, 2048), (2, 4304)):
            values = generator.standard_normal((rows, width))
            values *= 10.0 ** generator.integers(-6, 6, (rows, 1))
            values[rows // 2] *= rows == 1
            x, plain = surrounded(values, dtype), there(generator.standard_normal((width, 48)))
            kernel = float8.quantize(plain)
            with mock.patch.object(kernels_float8, "quantize_rows", wraps=launch) as called:
                product = kernels_float8.product(x, kernel)
            found, expected = launch(x), float8.quantize_rows(x)
            a, b = (double(each.values) * double(each.scale)[:, None] for each in (found, kernel))
            scale = double(expected.scale)[:, None]
            size = np.maximum(scale, 1)
            yield {
                "case": f"{rows} x {width}",
                "dtype": dtype,
                "called": called.call_count == 1,
                "scales": same(found.scale, expected.scale),
                "others": others(double(found.values), double(expected.values), double(x) / scale),
                "product": error(double(product) / size, a @ b.T / size),
            }


FAMILIES = {
    family.__name__: family
    for family in (scores, elections, prefixes, layer_norms, attentions, float8_rows)
}


def main() -> None:
    assert FULL or os.environ.get("TRITON_INTERPRET") == "1"
    with np.errstate(all="ignore"), torch.no_grad():
        print(json.dumps({name: list(family()) for name, family in FAMILIES.items()}))


if __name__ == "__main__":
    main()

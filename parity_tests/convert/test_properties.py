"""Conversions of any model, from any storage: there and back is the identity, bit for bit."""

import dataclasses
import math
import pathlib
import tempfile

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from convert import jax_to_pytorch, pytorch_to_jax
from parity_tests.convert.checkpoints import jax_tensors, torch_tensors
from parity_tests.convert.test_conversion import assert_identical, orbax_arrays
from parity_tests.harness import BACKENDS
from pruner_spec.config import GemmaVariant, LoraVariant, Pi0Config, VisionVariant
from pruner_spec.layout import OPENPI_TORCH

pytestmark = [
    pytest.mark.skipif("jax" not in BACKENDS, reason="Orbax needs JAX"),
    pytest.mark.slow,
]
# The same examples every time: what fails here must fail there.
repeatable = settings(deadline=None, derandomize=True, database=None)

SIZES = range(13, 60)


@st.composite
def models(draw):
    """A small model whose sizes differ pairwise, so that no two axes can be taken for each other.

    Depths and numbers of heads are 1 at times, where an axis is easily lost.
    """
    sizes = iter(draw(st.permutations(SIZES)))
    heads, kv_heads, depth, vision_depth, vision_heads = draw(st.permutations(range(1, 6)))
    head_dim = draw(st.integers(7, 12))
    expert = {
        "depth": depth,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": next(sizes) + 60,
    }
    variants = [
        GemmaVariant(
            **expert,
            width=_but(sizes, heads * head_dim, kv_heads * head_dim),
            mlp_dim=next(sizes),
            lora=draw(st.none() | st.just(LoraVariant(rank=next(sizes), alpha=3.0))),
        )
        for _ in range(2)
    ]
    vision = VisionVariant(
        width=vision_heads * _but(sizes, vision_heads),
        depth=vision_depth,
        mlp_dim=next(sizes),
        num_heads=vision_heads,
        patch_size=draw(st.sampled_from([25, 31, 37, 45, 56, 74])),  # 64 patches and fewer
    )
    return Pi0Config(
        paligemma_variant=variants[0],
        action_expert_variant=variants[1],
        vision_variant=vision,
        action_dim=next(sizes),
        pi05=draw(st.booleans()),
    )


def _but(sizes, *others):
    """The next size that is none of these."""
    return next(size for size in sizes if size not in others)


@dataclasses.dataclass(frozen=True)
class Storage:
    """How TensorStore is told to store arrays.

    Attributes:
        is_ocdbt: in OCDBT's few files, or in a folder for each array.
        driver: "zarr" or "zarr3".
        compressor: of zarr; none for zarr 3.
        shares: into how many chunks an axis is cut, axis by axis and over again.
    """

    is_ocdbt: bool
    driver: str
    compressor: str | None
    shares: tuple[int, ...]

    def write(self, folder, tensors):
        """All arrays at once, and without waiting for the disk."""
        import tensorstore

        context = tensorstore.Context({"file_io_sync": False})
        base = {"driver": "file", "path": f"{folder}/"}
        kvstore = {"driver": "ocdbt", "base": base} if self.is_ocdbt else base
        with tensorstore.Transaction(atomic=False) as transaction:
            for name, array in tensors.items():
                place = f"{kvstore.get('path', '')}params.{name.replace('/', '.')}/"
                spec = {"driver": self.driver, "kvstore": kvstore | {"path": place}}
                spec["metadata"] = self._metadata(array, self._chunks(name, array))
                options = {"context": context, "transaction": transaction}
                tensorstore.open(spec, create=True, **options).result().write(array).result()

    def _chunks(self, name, array):
        """Drawn for an array, so that the axes' shares differ from array to array."""
        turn = len(name) % len(self.shares)
        shares = (self.shares[turn:] + self.shares[:turn]) * array.ndim
        return [math.ceil(size / share) for size, share in zip(array.shape, shares, strict=False)]

    def _metadata(self, array, chunks):
        if self.driver == "zarr3":
            return {
                "shape": array.shape,
                "data_type": array.dtype.name,
                "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunks}},
                "codecs": [{"name": "bytes"}, {"name": "zstd", "configuration": {"level": 1}}],
            }
        compressor = {"id": self.compressor} if self.compressor else None
        is_short = array.dtype == ml_dtypes.bfloat16
        return {
            "shape": array.shape,
            "chunks": chunks,
            "dtype": "bfloat16" if is_short else array.dtype.str,
            "compressor": compressor,
        }


storages = st.builds(
    Storage,
    is_ocdbt=st.booleans(),
    driver=st.sampled_from(["zarr", "zarr", "zarr3"]),
    compressor=st.sampled_from(["zstd", "zstd", "zlib", None]),
    shares=st.lists(st.integers(1, 3), min_size=1, max_size=3).map(tuple),
)


@settings(repeatable, max_examples=12)
@given(config=models(), storage=storages)
def test_there_and_back_is_the_identity(config, storage):
    """And what is recognised is the model, but for what only a config can say."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        tensors = jax_tensors(config)
        storage.write(folder / "jax/params", tensors)
        there = jax_to_pytorch(folder / "jax", folder / "torch", precision="float32", lora="keep")
        back = pytorch_to_jax(folder / "torch", folder / "back")
        assert_identical(orbax_arrays(folder / "back"), tensors)
    for found in (there.source.side.config, back.source.side.config, back.target.config):
        assert sizes_of(found) == sizes_of(config)


def sizes_of(config):
    """A config's sizes; an adapter's rank without its alpha."""
    experts = {
        name: dataclasses.replace(variant, lora=None if variant.lora is None else variant.lora.rank)
        for name, variant in (("language", config.paligemma), ("action", config.action_expert))
    }
    return experts | {"vision": config.vision, "action": config.action_dim, "pi05": config.pi05}


@settings(repeatable, max_examples=8)
@given(
    config=models(),
    storage=storages,
    dtype=st.sampled_from([np.float32, ml_dtypes.bfloat16, np.float16]),
    shard=st.sampled_from([None, "5KB", "50KB"]),
)
def test_float32_has_the_sources_values(config, storage, dtype, shard):
    """Whatever the source's dtype, and in however many files."""
    config = config.without_lora()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        storage.write(folder / "jax/params", jax_tensors(config, dtype))
        jax_to_pytorch(folder / "jax", folder / "torch", precision="float32", max_shard_size=shard)
        found = {}
        for path in (folder / "torch").glob("*.safetensors"):
            found |= load_file(path)
    del found[OPENPI_TORCH.unused[0]]
    expected = torch_tensors(config, dtype)
    assert_identical(found, {name: each.astype(np.float32) for name, each in expected.items()})

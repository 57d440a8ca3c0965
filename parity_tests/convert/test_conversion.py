"""Conversions there and back: bit for bit, complete, and refused where they cannot be."""

import dataclasses
import json
import pathlib
import shutil

import ml_dtypes
import numpy as np
import pytest
from etils import epath
from safetensors import safe_open
from safetensors.numpy import load_file

from convert import jax_to_pytorch, pytorch_to_jax
from convert.safetensors_file import open_safetensors
from parity_tests.cases import TINY_ADAPTED, tiny_config
from parity_tests.convert.checkpoints import (
    FORMATS,
    STATS,
    jax_tensors,
    save_jax,
    save_torch,
    torch_tensors,
)
from parity_tests.harness import BACKENDS
from pruner_spec import layout, lora
from pruner_spec.layout import OPENPI_JAX, OPENPI_TORCH
from pruner_spec.parameters import parameter_dtype, parameter_table, random_parameters

pytestmark = pytest.mark.skipif("jax" not in BACKENDS, reason="Orbax needs JAX")

CONFIGS = {
    "π0": tiny_config(pi05=False),
    "π0.5": tiny_config(),
    "π0, adapters": tiny_config(pi05=False, **TINY_ADAPTED),
    "π0.5, adapters": tiny_config(**TINY_ADAPTED),
}
PI05, ADAPTED = CONFIGS["π0.5"], CONFIGS["π0.5, adapters"]
PLAIN = {name: config for name, config in CONFIGS.items() if not config.has_lora}
UNUSED = OPENPI_TORCH.unused[0]
configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
plain = pytest.mark.parametrize("config", PLAIN.values(), ids=PLAIN)


def assert_identical(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def orbax_arrays(folder):
    """All arrays of an Orbax checkpoint by openpi's names, restored by Orbax as openpi does."""
    import jax
    import orbax.checkpoint as ocp

    with ocp.PyTreeCheckpointer() as checkpointer:
        metadata = checkpointer.metadata(folder / "params")
        tree = getattr(metadata, "item_metadata", metadata)
        item = {"params": tree["params"]}
        arguments = jax.tree.map(lambda _: ocp.ArrayRestoreArgs(restore_type=np.ndarray), item)
        restored = checkpointer.restore(
            folder / "params", ocp.args.PyTreeRestore(item=item, restore_args=arguments)
        )
    return layout.flatten(restored)


@configs
def test_there_and_back_is_the_identity(config, tmp_path):
    tensors = jax_tensors(config)
    source = save_jax(tmp_path / "jax", tensors)
    jax_to_pytorch(source, tmp_path / "torch", precision="float32", lora="keep")
    pytorch_to_jax(tmp_path / "torch", tmp_path / "back")
    assert_identical(orbax_arrays(tmp_path / "back"), tensors)
    for folder in ("torch", "back"):
        stats = tmp_path / folder / "assets/trossen/norm_stats.json"
        assert json.loads(stats.read_text()) == {"norm_stats": STATS}


@plain
def test_float32_is_the_sources_values(config, tmp_path):
    source = save_jax(tmp_path / "jax", jax_tensors(config))
    jax_to_pytorch(source, tmp_path / "torch", precision="float32", omit_unused_lm_head=True)
    found = load_file(tmp_path / "torch/model.safetensors")
    assert_identical(found, torch_tensors(config))


@plain
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_16_bits_keep_in_float32_what_openpi_keeps(config, precision, tmp_path):
    source = save_jax(tmp_path / "jax", jax_tensors(config))
    jax_to_pytorch(source, tmp_path / "torch", precision=precision, omit_unused_lm_head=True)
    short = np.dtype(ml_dtypes.bfloat16 if precision == "bfloat16" else np.float16)
    expected = {}
    for row in OPENPI_TORCH.rows_of(config):
        keeps = parameter_dtype(row.ours[0], "bfloat16") == "float32"
        for name in row.names(config):
            dtype = np.dtype(np.float32) if keeps else short
            expected[name] = torch_tensors(config)[name].astype(dtype)
    assert_identical(load_bfloat16(tmp_path / "torch/model.safetensors"), expected)


def load_bfloat16(path):
    return {k: np.asarray(array) for k, array in open_safetensors(epath.Path(path)).items()}


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float64])
def test_other_dtypes_of_the_source_are_widened_exactly(dtype, tmp_path):
    tensors = jax_tensors(PI05, dtype)
    source = save_jax(tmp_path / "jax", tensors)
    jax_to_pytorch(source, tmp_path / "torch", precision="float32", omit_unused_lm_head=True)
    found = load_file(tmp_path / "torch/model.safetensors")
    expected = {
        name: array.astype(np.float32) for name, array in torch_tensors(PI05, dtype).items()
    }
    assert_identical(found, expected)


def test_mixed_dtypes(tmp_path):
    tensors = jax_tensors(PI05)
    mixed = {
        name: array.astype(ml_dtypes.bfloat16) if "PaliGemma" in name else array
        for name, array in tensors.items()
    }
    jax_to_pytorch(save_jax(tmp_path / "jax", mixed), tmp_path / "torch", precision="float32")
    pytorch_to_jax(tmp_path / "torch", tmp_path / "back")
    expected = {name: array.astype(np.float32) for name, array in mixed.items()}
    assert_identical(orbax_arrays(tmp_path / "back"), expected)


@pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("suffix", ["", "/value"], ids=["plain", "value"])
def test_every_storage(options, suffix, tmp_path):
    source = save_jax(tmp_path / "run/30000", jax_tensors(PI05), suffix, **options)
    for number, place in enumerate((source, source / "params")):
        output = tmp_path / f"torch{number}"
        jax_to_pytorch(place, output, precision="float32", omit_unused_lm_head=True)
        assert_identical(load_file(output / "model.safetensors"), torch_tensors(PI05))
        assert (output / "assets/trossen/norm_stats.json").exists()


@pytest.mark.parametrize("share", [2, 3, 5])
def test_chunked_storage(share, tmp_path):
    """As several devices save: chunks along the largest axis, the last of them reaching over."""
    save_chunked(tmp_path / "jax/params", jax_tensors(PI05), share)
    jax_to_pytorch(tmp_path / "jax", tmp_path / "torch", precision="float32")
    found = load_file(tmp_path / "torch/model.safetensors")
    del found[UNUSED]
    assert_identical(found, torch_tensors(PI05))


def save_chunked(folder, tensors, share):
    """Each array's longest axis, and its first, in `share` chunks."""
    import tensorstore

    for name, array in tensors.items():
        longest = int(np.argmax(array.shape))
        chunks = [
            -(-size // share) if axis in (0, longest) else size
            for axis, size in enumerate(array.shape)
        ]
        spec = {
            "driver": "zarr",
            "kvstore": {
                "driver": "ocdbt",
                "base": {"driver": "file", "path": f"{folder}/"},
                "path": f"params.{name.replace('/', '.')}/",
            },
            "metadata": {
                "shape": array.shape,
                "chunks": chunks,
                "dtype": "<f4",
                "compressor": {"id": "zstd", "level": 1},
            },
        }
        tensorstore.open(spec, create=True).result().write(array).result()


@pytest.mark.parametrize("source_layout", [layout.JAX, layout.OPENPI_JAX], ids=["ours", "openpi's"])
def test_both_layouts_of_jax(source_layout, tmp_path):
    """Our JAX trainer's names, and openpi's."""
    named = dict(random_parameters(PI05, seed=3))
    tensors = dict(layout.from_named(named, PI05, source_layout))
    told = {name: getattr(PI05, name) for name in ("paligemma_variant", "action_expert_variant")}
    told["vision_variant"] = PI05.vision_variant
    source = save_jax(tmp_path / "jax", {k.replace(".", "/"): v for k, v in tensors.items()})
    (source / "config.json").write_text(json.dumps(told))
    jax_to_pytorch(source, tmp_path / "torch", precision="float32", omit_unused_lm_head=True)
    assert_identical(load_file(tmp_path / "torch/model.safetensors"), torch_tensors(PI05))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_adapters_are_merged(precision, tmp_path):
    named = dict(random_parameters(ADAPTED, seed=3))
    source = save_jax(tmp_path / "jax", dict(layout.from_named(named, ADAPTED, OPENPI_JAX)))
    jax_to_pytorch(source, tmp_path / "torch", precision=precision, omit_unused_lm_head=True)
    expected = merged(named, ADAPTED)
    found = load_bfloat16(tmp_path / "torch/model.safetensors")
    for name, tensor in layout.from_named(expected, PI05, OPENPI_TORCH):
        if name in found:
            np.testing.assert_array_equal(found[name], tensor.astype(found[name].dtype), name)
    assert found.keys() == OPENPI_TORCH.shapes(PI05).keys()


def merged(named, config):
    """What the weights are with their adapters, layer by layer in float32."""
    found = {name: named[name] for name in parameter_table(config.without_lora())}
    for kernel in found:
        a, b = lora.adapter_names(kernel)
        if a in named:
            expert = config.action_expert if ".action." in kernel else config.paligemma
            scale = lora.adapter_scale(kernel, expert.lora)
            deltas = [
                lora.delta(kernel, *factors, scale)
                for factors in zip(named[a], named[b], strict=True)
            ]
            found[kernel] = named[kernel] + np.stack(deltas)
    return found


def test_the_scale_of_adapters_may_be_given(tmp_path):
    named = dict(random_parameters(ADAPTED, seed=3))
    source = save_jax(tmp_path / "jax", dict(layout.from_named(named, ADAPTED, OPENPI_JAX)))
    done = jax_to_pytorch(source, tmp_path / "torch", precision="float32", lora_scale=3.0)
    variants = [done.source.side.config.paligemma, done.source.side.config.action_expert]
    assert [variant.lora.scale for variant in variants] == [3.0, 3.0]
    scaled = dataclasses.replace(
        ADAPTED, paligemma_variant=variants[0], action_expert_variant=variants[1]
    )
    found = load_file(tmp_path / "torch/model.safetensors")
    for name, tensor in layout.from_named(merged(named, scaled), PI05, OPENPI_TORCH):
        if name in found:
            np.testing.assert_array_equal(found[name], tensor, err_msg=name)


def test_a_kept_adapter_is_pefts(tmp_path):
    source = save_jax(tmp_path / "jax", jax_tensors(ADAPTED))
    jax_to_pytorch(source, tmp_path / "torch", lora="keep")
    config = json.loads((tmp_path / "torch/adapter/adapter_config.json").read_text())
    base = load_bfloat16(tmp_path / "torch/model.safetensors")
    factors = load_file(tmp_path / "torch/adapter/adapter_model.safetensors")
    assert not any("lora" in name for name in base)
    assert all(name.startswith("base_model.model.paligemma_with_expert.") for name in factors)
    assert all(factor.dtype == np.float32 for factor in factors.values())
    assert_peft_applies(config, base, factors)


def assert_peft_applies(config, base, factors):
    """That PEFT finds every module, with the rank of its factors and the factor of openpi."""
    import re

    modules = {name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in factors}
    linear = [name.removesuffix(".weight") for name in base if base[name].ndim == 2]
    assert {name for name in linear if re.fullmatch(config["target_modules"], name)} == modules
    for module in modules:
        keys = [key for key in config["rank_pattern"] if re.fullmatch(key, module)]
        assert len(keys) == 1
        rank = factors[f"base_model.model.{module}.lora_A.weight"].shape[0]
        assert config["rank_pattern"][keys[0]] == rank
        is_action, is_attention = "gemma_expert" in module, "self_attn" in module
        scale = (0.25 if is_action else 0.5) if is_attention else 1.0
        assert config["alpha_pattern"][keys[0]] == scale * rank


@pytest.mark.parametrize("name", ["rank_pattern", "alpha_pattern", "use_rslora"])
def test_another_configuration_of_a_kept_adapter_is_refused(name, tmp_path):
    source = save_jax(tmp_path / "jax", jax_tensors(ADAPTED))
    jax_to_pytorch(source, tmp_path / "torch", lora="keep")
    path = tmp_path / "torch/adapter/adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {name: True}))
    with pytest.raises(ValueError, match=rf"adapter_config\.json: {name}: expected"):
        pytorch_to_jax(tmp_path / "torch", tmp_path / "back")


def test_tied_and_unused_tensors(tmp_path):
    source = save_jax(tmp_path / "jax", jax_tensors(PI05))
    jax_to_pytorch(source, tmp_path / "torch")
    with safe_open(tmp_path / "torch/model.safetensors", framework="numpy") as file:
        assert file.metadata() == {"format": "pt"} | OPENPI_TORCH.aliases
        assert set(file.keys()) == OPENPI_TORCH.shapes(PI05).keys() | {UNUSED}
    head = load_bfloat16(tmp_path / "torch/model.safetensors")[UNUSED]
    assert head.shape == (1024, 56)
    assert head.dtype == ml_dtypes.bfloat16
    assert not head.any()


def test_two_runs_give_the_same_bytes(tmp_path):
    source = save_jax(tmp_path / "jax", jax_tensors(PI05))
    for output in ("one", "two"):
        jax_to_pytorch(source, tmp_path / output)
    one, two = (sorted((tmp_path / name).rglob("*.*")) for name in ("one", "two"))
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]


def test_the_file_is_what_the_library_writes(tmp_path):
    from safetensors.numpy import save

    source = save_jax(tmp_path / "jax", jax_tensors(PI05))
    jax_to_pytorch(source, tmp_path / "torch", precision="float32")
    path = tmp_path / "torch/model.safetensors"
    tensors = load_file(path)
    found, expected = path.read_bytes(), save(tensors, {"format": "pt"} | OPENPI_TORCH.aliases)
    data = sum(tensor.nbytes for tensor in tensors.values())
    assert found[-data:] == expected[-data:]
    headers = [json.loads(each[8 : len(each) - data]) for each in (found, expected)]
    assert headers[0] == headers[1]


def test_shards(tmp_path):
    source = save_jax(tmp_path / "jax", jax_tensors(PI05))
    jax_to_pytorch(source, tmp_path / "torch", precision="float32", max_shard_size="200KB")
    index = json.loads((tmp_path / "torch/model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "torch").glob("model-*.safetensors"))
    assert len(files) > 3
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    found = {}
    for file in files:
        tensors = load_file(file)
        assert {index["weight_map"][name] for name in tensors} == {file.name}
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= 200_000
        found |= tensors
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())
    del found[UNUSED]
    assert_identical(found, torch_tensors(PI05))
    pytorch_to_jax(tmp_path / "torch", tmp_path / "back")
    assert_identical(orbax_arrays(tmp_path / "back"), jax_tensors(PI05))


@pytest.mark.parametrize("size", ["0", "5 bananas", "-1GB", "GB"])
def test_a_size_of_shards_that_is_none(size, tmp_path):
    source = save_jax(tmp_path / "jax", jax_tensors(PI05))
    with pytest.raises(ValueError, match="max_shard_size: expected a size such as '5GB', got"):
        jax_to_pytorch(source, tmp_path / "torch", max_shard_size=size)
    assert not (tmp_path / "torch").exists()


def test_openpis_own_pytorch_file_converts(tmp_path):
    """With the tied table under the other name, and without sizes beside it."""
    from safetensors.numpy import save_file

    [(alias, name)] = OPENPI_TORCH.aliases.items()
    tensors = {k: np.ascontiguousarray(v) for k, v in torch_tensors(PI05).items()}
    tensors[alias] = tensors.pop(name)
    (tmp_path / "torch").mkdir()
    save_file(tensors, tmp_path / "torch/model.safetensors")
    done = pytorch_to_jax(tmp_path / "torch", tmp_path / "back")
    assert_identical(orbax_arrays(tmp_path / "back"), jax_tensors(PI05))
    assert done.source.assumed == ("action_horizon", "max_token_len", "discrete_state_input")


def test_the_result_loads_in_both_backends(tmp_path):
    source = save_jax(tmp_path / "jax", jax_tensors(ADAPTED))
    jax_to_pytorch(source, tmp_path / "torch", precision="float32")
    expected = merged(dict(random_parameters(ADAPTED, seed=3)), ADAPTED)
    config = dataclasses.replace(PI05, dtype="float32")
    for backend in BACKENDS.values():
        checkpoint = backend.module("checkpoint")
        model = checkpoint.load(tmp_path / "torch", config)
        assert_identical(checkpoint.named_parameters(model), expected)


def test_paths_may_be_texts(tmp_path):
    source = save_jax(tmp_path / "jax", jax_tensors(PI05))
    jax_to_pytorch(str(source), str(tmp_path / "a folder, 100%/torch"))
    assert pathlib.Path(tmp_path / "a folder, 100%/torch/model.safetensors").exists()


def test_orbax_metadata_is_orbaxs(tmp_path):
    tensors = jax_tensors(ADAPTED)
    save_jax(tmp_path / "orbax", tensors)
    save_torch(tmp_path / "torch", torch_tensors(PI05))
    jax_to_pytorch(tmp_path / "orbax", tmp_path / "torch2", lora="keep")
    pytorch_to_jax(tmp_path / "torch2", tmp_path / "back")
    found, expected = (
        json.loads((tmp_path / folder / "params/_METADATA").read_text())
        for folder in ("back", "orbax")
    )
    assert found.pop("tree_metadata") == expected.pop("tree_metadata")
    assert found == expected


def test_an_alpha_that_nothing_says_is_said_to_be_assumed(tmp_path):
    """Of sizes with a name it is known, and what a flag or a config says is no assumption."""
    from pruner_spec.config import LoraVariant

    language = dataclasses.replace(ADAPTED.paligemma, lora=LoraVariant(rank=5, alpha=5.0))
    unnamed = dataclasses.replace(ADAPTED, paligemma_variant=language)
    for config, options, expected in (
        (ADAPTED, {}, False),
        (unnamed, {}, True),
        (unnamed, {"lora_scale": 2.0}, False),
    ):
        source = save_jax(tmp_path / "jax", jax_tensors(config))
        done = jax_to_pytorch(source, tmp_path / "torch", overwrite=True, **options)
        assert ("lora_scale" in done.source.assumed) is expected
        shutil.rmtree(source)

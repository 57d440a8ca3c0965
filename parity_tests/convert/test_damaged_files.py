"""Damaged files: refused by the name of what is damaged, leaving nothing."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from parity_tests.cases import TINY_ADAPTED, tiny_config
from parity_tests.convert.commands import named_in, refused, run
from parity_tests.harness import BACKENDS

pytestmark = pytest.mark.skipif("jax" not in BACKENDS, reason="Orbax needs JAX")

PI05 = tiny_config()
TORCH_BIAS = "action_out_proj.bias"
INDEX, SHARD = "model.safetensors.index.json", "model-00002-of-00006.safetensors"


# Damages of files: the checkpoint, what is done to it, and what the message has to name.


def cut_data(folder):
    for path in (folder / "params/d").iterdir():
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def garbage_in(path, share=1 / 2):
    """Random bytes in the middle, and as many as this share of the file."""
    data = bytearray(path.read_bytes())
    count = int(len(data) * share)
    start = (len(data) - count) // 2
    data[start : start + count] = np.random.default_rng(0).bytes(count)
    path.write_bytes(data)


def garbage_in_data(folder):
    for path in (folder / "params/d").iterdir():
        garbage_in(path)


def unlink(name):
    return lambda folder: (folder / name).unlink()


def text_in(name, text):
    return lambda folder: (folder / name).write_text(text)


def changed(name, **values):
    """An edit of a JSON file."""

    def change(folder):
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


STORAGE_DAMAGES = {
    "cut": ("jax", cut_data, ["/jax/params", "expected", "not valid for value of size"]),
    "garbage": ("jax", garbage_in_data, ["/jax/params", "expected", "got"]),
    "no data": (
        "jax",
        lambda folder: shutil.rmtree(folder / "params/d"),
        ["/jax/params: expected an Orbax checkpoint, got NOT_FOUND"],
    ),
    "manifest": (
        "jax",
        lambda folder: (folder / "params/manifest.ocdbt").write_bytes(bytes(40)),
        ["/jax/params: expected an Orbax checkpoint", "manifest"],
    ),
    "metadata": (
        "jax",
        text_in("params/_METADATA", "[]"),
        ["params/_METADATA: expected a JSON object, got a list"],
    ),
    "a chunk": (
        "jax in folders",
        lambda folder: garbage_in(folder / "params/params.action_out_proj.kernel/0.0", 1.0),
        ["params/action_out_proj/kernel: expected a whole array", "zstd"],
    ),
    "half a chunk": (
        "jax in folders",
        lambda folder: (folder / "params/params.action_out_proj.kernel/0.0").write_bytes(
            (folder / "params/params.action_out_proj.kernel/0.0").read_bytes()[:600]
        ),
        ["params/action_out_proj/kernel: expected a whole array", "cut off"],
    ),
    "no chunk": (
        "jax in folders",
        unlink("params/params.action_out_proj.kernel/0.0"),
        ["params/action_out_proj/kernel: expected a whole array", "0.0"],
    ),
    "an array's description": (
        "jax in folders",
        text_in("params/params.action_out_proj.kernel/.zarray", "{"),
        ["params: expected an Orbax checkpoint", "action_out_proj.kernel/.zarray", "Invalid JSON"],
    ),
}


@pytest.mark.parametrize(
    ("name", "damage", "fragments"), STORAGE_DAMAGES.values(), ids=STORAGE_DAMAGES
)
def test_damaged_orbax(name, damage, fragments, copy, output, capsys):
    source = copy(name)
    damage(source)
    message = refused(capsys, "jax", source, output)
    named_in(message, fragments)
    assert "tensorstore_spec" not in message


@pytest.mark.parametrize("seed", range(6))
def test_a_few_garbled_bytes_end_in_no_traceback(seed, copy, output, capsys):
    """Where neither format nor compression notices, nothing can; but nothing else may happen."""
    source = copy("jax")
    rng = np.random.default_rng(seed)
    files = sorted((source / "params/d").iterdir())
    path = files[seed % len(files)]
    data = bytearray(path.read_bytes())
    for place in rng.integers(0, len(data), 20):
        data[place] ^= 1 << rng.integers(8)
    path.write_bytes(data)
    status, _, error = run(capsys, "jax", "--checkpoint_dir", source, "--output_path", output)
    left = {each.name for each in output.parent.iterdir()}
    assert status in (0, 2), error
    assert left == {"notes.txt"} | ({"converted"} if status == 0 else set())


# safetensors: the header is JSON behind its length in 8 bytes.


def header_changed(change, file="model.safetensors"):
    def edit(folder):
        path = folder / file
        data = path.read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:end])
        change(header)
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])

    return edit


def entry_changed(**values):
    return header_changed(lambda header: header[TORCH_BIAS].update(values))


def bytes_changed(change):
    def edit(folder):
        path = folder / "model.safetensors"
        path.write_bytes(change(path.read_bytes()))

    return edit


def moved(by):
    """Moves a tensor's bytes, so that there is a gap before it, or an overlap."""

    def change(header):
        entry = header[TORCH_BIAS]
        entry["data_offsets"] = [place + by for place in entry["data_offsets"]]

    return header_changed(change)


SAFETENSORS_DAMAGES = {
    "empty": (bytes_changed(lambda data: b""), ["0 bytes that do not begin with a header"]),
    "length alone": (bytes_changed(lambda data: data[:8]), ["do not begin with a header"]),
    "header longer than the file": (
        bytes_changed(lambda data: (len(data)).to_bytes(8, "little") + data[8:]),
        ["do not begin with a header"],
    ),
    "header longer than any": (
        bytes_changed(lambda data: (2**63).to_bytes(8, "little") + data[8:]),
        ["do not begin with a header"],
    ),
    "header that is no JSON": (
        bytes_changed(lambda data: data[:8] + b"?" + data[9:]),
        ["a header that is not JSON"],
    ),
    "header that is no text": (
        bytes_changed(lambda data: data[:8] + b"\xff" + data[9:]),
        ["a header that is not JSON"],
    ),
    "header that is a list": (
        bytes_changed(lambda data: (2).to_bytes(8, "little") + b"[]"),
        ["a header that is a list"],
    ),
    "entry that is none": (
        header_changed(lambda header: header.update({TORCH_BIAS: 5})),
        [f"{TORCH_BIAS} described as 5"],
    ),
    "entry without offsets": (
        header_changed(lambda header: header[TORCH_BIAS].pop("data_offsets")),
        [f"{TORCH_BIAS} described as"],
    ),
    "offsets that are texts": (entry_changed(data_offsets="ab"), [f"{TORCH_BIAS} described as"]),
    "negative offsets": (entry_changed(data_offsets=[-28, 0]), [f"{TORCH_BIAS} described as"]),
    "negative shape": (entry_changed(shape=[-7, -1]), [f"{TORCH_BIAS} described as"]),
    "shape of fractions": (entry_changed(shape=[7.0]), [f"{TORCH_BIAS} described as"]),
    "shape of more": (entry_changed(shape=[8]), [f"{TORCH_BIAS} of F32 [8] in 28 bytes"]),
    "unknown dtype": (entry_changed(dtype="F4"), [f"{TORCH_BIAS}: expected a dtype of", "got F4"]),
    "dtype that is a list": (entry_changed(dtype=[]), [f"{TORCH_BIAS}: expected a dtype of"]),
    "gap": (moved(by=4), [f"{TORCH_BIAS} at byte"]),
    "overlap": (moved(by=-4), [f"{TORCH_BIAS} at byte"]),
    "short data": (bytes_changed(lambda data: data[:-1]), ["bytes where the header says"]),
    "trailing data": (bytes_changed(lambda data: data + b"\0"), ["bytes where the header says"]),
}


@pytest.mark.parametrize(
    ("damage", "fragments"), SAFETENSORS_DAMAGES.values(), ids=SAFETENSORS_DAMAGES
)
def test_damaged_safetensors(damage, fragments, copy, output, capsys):
    source = copy("torch")
    damage(source)
    message = refused(capsys, "torch", source, output)
    named_in(message, ["torch/model.safetensors: ", "expected a", *fragments])


def index_changed(change):
    def edit(folder):
        index = json.loads((folder / INDEX).read_text())
        change(index["weight_map"])
        (folder / INDEX).write_text(json.dumps(index))

    return edit


INDEX_DAMAGES = {
    "a missing file": (unlink(SHARD), [INDEX, f"got none for ['{SHARD}']"]),
    "a tensor that is nowhere": (
        index_changed(lambda files: files.update({"no.such.weight": SHARD})),
        [f"{INDEX}: expected arrays in the files it names, got none for ['no.such.weight']"],
    ),
    "a tensor it does not name": (
        index_changed(lambda files: files.pop(TORCH_BIAS)),
        [f"{INDEX}: expected every array of its files in it, not got ['{TORCH_BIAS}']"],
    ),
    "numbers for files": (
        index_changed(lambda files: files.update({TORCH_BIAS: 5})),
        [f"{INDEX}: expected JSON with a 'weight_map'"],
    ),
    "a list for files": (
        text_in(INDEX, '{"weight_map": []}'),
        ["expected JSON with a 'weight_map"],
    ),
    "a list": (text_in(INDEX, "[]"), [f"{INDEX}: expected JSON with a 'weight_map'"]),
    "a damaged shard": (
        lambda folder: (folder / SHARD).write_bytes(b"no tensors"),
        [f"{SHARD}: expected a safetensors file, got 10 bytes"],
    ),
}


@pytest.mark.parametrize(("damage", "fragments"), INDEX_DAMAGES.values(), ids=INDEX_DAMAGES)
def test_damaged_shards(damage, fragments, copy, output, capsys):
    source = copy("sharded")
    damage(source)
    named_in(refused(capsys, "torch", source, output), fragments)


ADAPTER_DAMAGES = {
    "no configuration": (
        unlink("adapter/adapter_config.json"),
        ["adapter: expected adapter_config.json beside the adapter, got none"],
    ),
    "a configuration that is no JSON": (
        text_in("adapter/adapter_config.json", "{"),
        ["adapter_config.json: expected a JSON object"],
    ),
    "a configuration that is a list": (
        text_in("adapter/adapter_config.json", "[]"),
        ["adapter_config.json: expected a JSON object, got a list"],
    ),
    "no factors": (
        unlink("adapter/adapter_model.safetensors"),
        ["adapter: expected adapter_model.safetensors in it, got none"],
    ),
    "beside the weights": (
        lambda folder: shutil.move(folder / "adapter/adapter_model.safetensors", folder),
        ["adapter_model.safetensors: expected adapters in", "beside the weights"],
    ),
    "weights of the model": (
        lambda folder: save_file(
            load_file(folder / "adapter/adapter_model.safetensors")
            | {f"base_model.model.{TORCH_BIAS}": np.zeros(7, np.float32)},
            folder / "adapter/adapter_model.safetensors",
        ),
        ["model.safetensors: expected arrays that its adapter has not", TORCH_BIAS],
    ),
}


@pytest.mark.parametrize(("damage", "fragments"), ADAPTER_DAMAGES.values(), ids=ADAPTER_DAMAGES)
def test_damaged_adapters(damage, fragments, copy, output, capsys):
    """Above all, adapters that are there in part are not left out in silence."""
    source = copy("adapted")
    damage(source)
    named_in(refused(capsys, "torch", source, output), fragments)


SIZES = dataclasses.asdict(PI05.paligemma)
CONFIG_DAMAGES = {
    "no JSON": (text_in("config.json", "{"), ["config.json: expected a JSON object"]),
    "no text": (
        lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe"),
        ["config.json: expected a JSON object"],
    ),
    "a list": (text_in("config.json", "[]"), ["config.json: expected a JSON object, got a list"]),
    "no such variant": (
        changed("config.json", paligemma_variant="gemma_9b"),
        ["config.json: paligemma_variant: ", "expected one of", "got 'gemma_9b'"],
    ),
    "no such tower": (
        changed("config.json", vision_variant="B/16"),
        ["config.json: vision_variant: ", "expected '<tower>/<patch size>'", "got 'B/16'"],
    ),
    "a number": (
        changed("config.json", paligemma_variant=5),
        ["config.json: paligemma_variant: expected a variant's name or its sizes, got 5"],
    ),
    "a size that is none": (
        changed("config.json", paligemma_variant=SIZES | {"num_heads": 0}),
        ["config.json: paligemma_variant: num_heads: expected an integer >= 1, got 0"],
    ),
    "a size that is a text": (
        changed("config.json", paligemma_variant=SIZES | {"width": "72"}),
        ["config.json: paligemma_variant: width: expected an integer >= 1, got '72'"],
    ),
    "an unknown size": (
        changed("config.json", paligemma_variant=SIZES | {"wide": 72}),
        ["config.json: paligemma_variant: ", "wide"],
    ),
    "a rank that is none": (
        changed("config.json", paligemma_variant=SIZES | {"lora": {"rank": 0, "alpha": 1}}),
        ["config.json: paligemma_variant: rank: expected an integer >= 1, got 0"],
    ),
    "an alpha that is none": (
        text_in(
            "config.json",
            json.dumps({"paligemma_variant": SIZES | {"lora": {"rank": 1, "alpha": float("nan")}}}),
        ),
        ["config.json: paligemma_variant: alpha: expected a finite number, got nan"],
    ),
    "assumed": (changed("config.json", assumed=None), ["config.json: assumed: expected a list"]),
    "a horizon": (
        changed("config.json", action_horizon=0, assumed=[]),
        ["action_horizon: expected an integer >= 1, got 0"],
    ),
    "π0": (
        changed("config.json", pi05=False),
        ["another model than was told", "pi05: expected False as it was told, got True"],
    ),
    "adapters": (
        changed("config.json", **TINY_ADAPTED),
        [
            "paligemma_variant: expected 'tiny_lora' as it was told, got 'tiny'",
            "action_expert_variant: expected 'tiny_expert_lora' as it was told, got 'tiny_expert'",
        ],
    ),
    "other actions": (
        changed("config.json", action_dim=8),
        ["action_dim: expected 8 as it was told, got 7"],
    ),
    "another policy": (
        text_in("config.json", '{"type": "act"}'),
        ["type: expected a LeRobot policy of ['pi0', 'pi05'], got 'act'"],
    ),
    "statistics that are no JSON": (
        text_in("assets/trossen/norm_stats.json", "no statistics"),
        ["assets/trossen/norm_stats.json: expected JSON with 'norm_stats'"],
    ),
    "statistics that are numbers": (
        text_in("assets/trossen/norm_stats.json", '{"norm_stats": {"state": [1, 2]}}'),
        ["assets/trossen/norm_stats.json: expected statistics by name, got"],
    ),
}


@pytest.mark.parametrize(("damage", "fragments"), CONFIG_DAMAGES.values(), ids=CONFIG_DAMAGES)
def test_damaged_files_beside_the_weights(damage, fragments, copy, output, capsys):
    source = copy("torch")
    damage(source)
    named_in(refused(capsys, "torch", source, output), fragments)

"""The folder that LeRobot's π0 and π0.5 policies load, apart from the weights, and the way back.

LeRobot keeps in files what openpi keeps in code: which cameras there are, how the prompt is made,
and how states and actions are normalised (see `lerobot_stats`). Only what LeRobot 0.4 to 0.6 all
know is written. It has no token pruner, so the settings of ours are left out.
"""

import json
from collections.abc import Mapping
from typing import Any

from convert.lerobot_stats import (
    CONFIG_FILE,
    EPSILON,
    FEATURES,
    MODES,
    POSTPROCESSOR_FILE,
    PREPROCESSOR_FILE,
    NormStats,
    checked,
    policy_type,
    steps_of,
    tensors,
)
from pruner_spec.config import CAMERAS, IMAGE_SIZE, Pi0Config

# LeRobot's tensors are named as openpi's PyTorch ones, behind this.
TENSOR_PREFIX = "model."

# All that LeRobot has.
VARIANTS = ("gemma_2b", "gemma_300m")
VISION_VARIANT = "So400m/14"
PRECISIONS = ("bfloat16", "float32")

_TOKENIZER = "google/paligemma-3b-pt-224"
_STATE_PROMPT = "pi05_prepare_state_tokenizer_processor_step"

# Runs everywhere; LeRobot's programs put the policy's device in its place.
_DEVICE = ("device_processor", {"device": "cpu", "float_dtype": None})

# A config field of ours: LeRobot's name for it, and its default there.
_FIELDS = {
    "dtype": ("dtype", "float32"),
    "paligemma_variant": ("paligemma_variant", "gemma_2b"),
    "action_expert_variant": ("action_expert_variant", "gemma_300m"),
    "action_dim": ("max_action_dim", 32),
    "action_horizon": ("chunk_size", 50),
}
# What LeRobot can set and openpi can't.
_FIXED = {"image_resolution": [IMAGE_SIZE, IMAGE_SIZE], "min_period": 4e-3, "max_period": 4.0}

Step = tuple[str, dict[str, Any]]


def policy_files(
    config: Pi0Config, norm_stats: NormStats | None, *, precision: str
) -> dict[str, bytes]:
    """The files that LeRobot loads beside the weights, by name; the same bytes at every call.

    Args:
        config: the model. For π0.5, `discrete_state_input` decides whether the state is written
            into the prompt: LeRobot's own π0.5 always does that, but the steps that are written
            here leave it out where openpi does, as in `pi05_libero`.
        norm_stats: openpi's "norm_stats": of "state" and of "actions" the "mean", "std", "q01" and
            "q99". None: nothing is normalised, and states and actions have all `action_dim`
            numbers.
        precision: dtype of the policy's parameters, "bfloat16" or "float32".

    Raises:
        ValueError: LeRobot has no such model, or a statistic is missing or can't be one.
    """
    _check_loadable(config, precision)
    mode = MODES[_type(config)]
    stats = {} if norm_stats is None else checked(norm_stats, mode, config.action_dim)
    widths = {key: stats[key]["mean"].size if stats else config.action_dim for key in FEATURES}
    image = {"type": "VISUAL", "shape": [3, IMAGE_SIZE, IMAGE_SIZE]}
    inputs = dict.fromkeys((f"observation.images.{name}" for name in CAMERAS), image)
    inputs |= {FEATURES["state"]: {"type": "STATE", "shape": [widths["state"]]}}
    outputs = {FEATURES["actions"]: {"type": "ACTION", "shape": [widths["actions"]]}}
    pre = _pipeline(PREPROCESSOR_FILE, _input_steps(config, inputs, outputs), bool(stats))
    post = _pipeline(POSTPROCESSOR_FILE, _output_steps(config, outputs), bool(stats))
    files = {
        CONFIG_FILE: _json(_policy_config(config, inputs, outputs, precision)),
        PREPROCESSOR_FILE: _json(pre),
        POSTPROCESSOR_FILE: _json(post),
    }
    states = [step["state_file"] for step in pre["steps"] + post["steps"] if "state_file" in step]
    return files | dict.fromkeys(states, tensors(stats))


def config_fields(
    policy_config: Mapping[str, Any], preprocessor: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The arguments of `Pi0Config` that LeRobot's files determine.

    Args:
        policy_config: the content of `config.json`; what it lacks has LeRobot's default.
        preprocessor: the content of `policy_preprocessor.json`, which alone tells
            `discrete_state_input`. None: that field is left out.

    Raises:
        ValueError: the policy is another one, or has settings that openpi's model doesn't have.
    """
    pi05 = policy_type(policy_config) == "pi05"
    for name, expected in _FIXED.items():
        got = policy_config.get(name, expected)
        if got != expected:
            raise ValueError(f"{name}: expected openpi's {expected}, got {got!r}")
    fields = {ours: policy_config.get(*theirs) for ours, theirs in _FIELDS.items()}
    state_dim = policy_config.get("max_state_dim", 32)
    if not pi05 and state_dim != fields["action_dim"]:
        raise ValueError(
            f"max_state_dim: expected max_action_dim ({fields['action_dim']}), got {state_dim!r}"
        )
    fields |= {"pi05": pi05, "vision_variant": VISION_VARIANT}
    fields["max_token_len"] = policy_config.get("tokenizer_max_length", 200 if pi05 else 48)
    if preprocessor is not None:
        steps = steps_of(preprocessor, PREPROCESSOR_FILE)
        names = [step.get("registry_name") for step in steps]
        fields["discrete_state_input"] = _STATE_PROMPT in names
    return fields


def _type(config: Pi0Config) -> str:
    return "pi05" if config.pi05 else "pi0"


def _check_loadable(config: Pi0Config, precision: str) -> None:
    allowed = {
        "paligemma_variant": (config.paligemma_variant, VARIANTS),
        "action_expert_variant": (config.action_expert_variant, VARIANTS),
        "vision_variant": (config.vision_variant, (VISION_VARIANT,)),
        "precision": (precision, PRECISIONS),
        # LeRobot's π0 has the state as a token, and no step to write it into the prompt as well.
        "discrete_state_input": (config.discrete_state_input, (False, config.pi05)),
    }
    for name, (value, expected) in allowed.items():
        if value not in expected:
            raise ValueError(
                f"{name}: expected what LeRobot's {_type(config)} has, one of "
                f"{sorted({*expected})}, got {value!r}"
            )


def _policy_config(
    config: Pi0Config, inputs: dict[str, Any], outputs: dict[str, Any], precision: str
) -> dict[str, Any]:
    return {
        "type": _type(config),
        "n_obs_steps": 1,
        "input_features": inputs,
        "output_features": outputs,
        "normalization_mapping": _norm_map(config),
        "paligemma_variant": config.paligemma_variant,
        "action_expert_variant": config.action_expert_variant,
        "dtype": precision,
        "chunk_size": config.action_horizon,
        "n_action_steps": config.action_horizon,
        "max_state_dim": config.action_dim,
        "max_action_dim": config.action_dim,
        "image_resolution": [IMAGE_SIZE, IMAGE_SIZE],
        "tokenizer_max_length": config.max_token_len,
    }


def _input_steps(config: Pi0Config, inputs: dict[str, Any], outputs: dict[str, Any]) -> list[Step]:
    """In LeRobot's order: its π0.5 normalises the state before it writes it into the prompt."""
    first = [("rename_observations_processor", {"rename_map": {}}), ("to_batch_processor", {})]
    normalizer = ("normalizer_processor", _normalization(config, inputs | outputs))
    text = [_prompt_step(config), ("tokenizer_processor", _tokenization(config)), _DEVICE]
    return [*first, normalizer, *text] if config.pi05 else [*first, *text, normalizer]


def _output_steps(config: Pi0Config, outputs: dict[str, Any]) -> list[Step]:
    return [("unnormalizer_processor", _normalization(config, outputs)), _DEVICE]


def _prompt_step(config: Pi0Config) -> Step:
    if config.discrete_state_input:
        # LeRobot before 0.5 pads the state to this length before it is written; openpi doesn't.
        return _STATE_PROMPT, {"max_state_dim": 1}
    # They do the same; π0's is unknown to LeRobot where only its π0.5 has been imported.
    return ("smolvla_new_line_processor" if config.pi05 else "pi0_new_line_processor"), {}


def _tokenization(config: Pi0Config) -> dict[str, Any]:
    return {
        "max_length": config.max_token_len,
        "task_key": "task",
        "padding_side": "right",
        "padding": "max_length",
        "truncation": True,
        "tokenizer_name": _TOKENIZER,
    }


def _normalization(config: Pi0Config, features: dict[str, Any]) -> dict[str, Any]:
    return {"eps": EPSILON, "features": features, "norm_map": _norm_map(config)}


def _norm_map(config: Pi0Config) -> dict[str, str]:
    mode = MODES[_type(config)]
    return {"VISUAL": "IDENTITY", "STATE": mode, "ACTION": mode}


def _pipeline(file: str, steps: list[Step], has_stats: bool) -> dict[str, Any]:
    name = file.removesuffix(".json")
    entries = [_entry(f"{name}_step_{place}", *step, has_stats) for place, step in enumerate(steps)]
    return {"name": name, "steps": entries}


def _entry(place: str, name: str, settings: dict[str, Any], has_stats: bool) -> dict[str, Any]:
    """A step's description; a file with statistics is named as LeRobot does."""
    entry = {"registry_name": name, "config": settings}
    if has_stats and "norm_map" in settings:
        entry["state_file"] = f"{place}_{name}.safetensors"
    return entry


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()

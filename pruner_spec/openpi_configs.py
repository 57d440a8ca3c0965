"""The models behind openpi's config names, so that a user can name one.

Source: openpi, `training/config.py`. π0-FAST's are listed for a clear refusal.
"""

import difflib
from typing import Any

from pruner_spec.config import Pi0Config

_DUMMY: dict[str, Any] = {"paligemma_variant": "dummy", "action_expert_variant": "dummy"}
_LORA: dict[str, Any] = {
    "paligemma_variant": "gemma_2b_lora",
    "action_expert_variant": "gemma_300m_lora",
}

OPENPI_CONFIGS: dict[str, Pi0Config] = {
    "pi0_aloha": Pi0Config(),
    "pi05_aloha": Pi0Config(pi05=True),
    "pi0_aloha_towel": Pi0Config(),
    "pi0_aloha_tupperware": Pi0Config(),
    "pi0_droid": Pi0Config(action_horizon=10),
    "pi05_droid": Pi0Config(pi05=True, action_horizon=15),
    "pi0_libero": Pi0Config(),
    "pi0_libero_low_mem_finetune": Pi0Config(**_LORA),
    "pi05_libero": Pi0Config(pi05=True, action_horizon=10, discrete_state_input=False),
    "pi0_aloha_pen_uncap": Pi0Config(),
    "pi05_aloha_pen_uncap": Pi0Config(pi05=True),
    "pi05_full_droid_finetune": Pi0Config(pi05=True, action_horizon=16),
    "pi05_droid_finetune": Pi0Config(pi05=True, action_horizon=16),
    "pi0_aloha_sim": Pi0Config(),
    "debug": Pi0Config(**_DUMMY),
    "debug_restore": Pi0Config(**_DUMMY),
    "debug_pi05": Pi0Config(pi05=True, **_DUMMY),
}

_FAST = (
    "pi0_fast_droid",
    "pi0_fast_libero",
    "pi0_fast_libero_low_mem_finetune",
    "pi0_fast_full_droid_finetune",
)


def openpi_config(name: str) -> Pi0Config:
    """The model that an openpi config trains or serves.

    Raises:
        ValueError: there is no such config, or it is π0-FAST's; names the nearest ones.
    """
    if name in OPENPI_CONFIGS:
        return OPENPI_CONFIGS[name]
    if name in _FAST:
        raise ValueError(f"config_name: expected a config of π0 or π0.5, got {name!r}, of π0-FAST")
    nearest = difflib.get_close_matches(name, OPENPI_CONFIGS, n=3, cutoff=0.4)
    known = f"did you mean {' or '.join(nearest)}?" if nearest else ""
    raise ValueError(
        f"config_name: expected one of {', '.join(OPENPI_CONFIGS)}; got {name!r}. {known}".rstrip()
    )

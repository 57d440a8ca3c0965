"""How commands ask for a checkpoint's policy."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from pruner_run.inference_flags import InferenceFlags

if TYPE_CHECKING:
    from pruner_run.policy import Policy


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyOptions(InferenceFlags):
    """How a checkpoint becomes a policy.

    Attributes:
        backend: the framework; that which the weights were written by, where it is installed.
        no_pruning: all patches are kept, whatever the config says.
        token_prune_keep_ratio: of a camera's patches, the share that is kept.
        token_prune_keep_tokens: patches that are kept a camera.
        asset_id: whose normalisation statistics, in place of the config's.
        tokenizer: a SentencePiece model, in place of the config's.
        inference: the way through the model, fast or plain; fast on a GPU, if not given.
        num_steps: of denoising.
        seed: of the noise.
    """

    backend: Literal["auto", "jax", "torch"] = "auto"
    no_pruning: tyro.conf.FlagCreatePairsOff[bool] = False
    token_prune_keep_ratio: float | None = None
    token_prune_keep_tokens: int | None = None
    asset_id: str | None = None
    tokenizer: Path | None = None
    inference: Literal["auto", "fast", "plain"] = "auto"
    num_steps: int = 10
    seed: int = 0

    def load(self, checkpoint_dir: str, config: str | None, **others: Any) -> "Policy":
        """The policy. Other arguments and errors are those of `policy.load`.

        Raises:
            ValueError: a flag does not go with `inference`.
        """
        from pruner_run import policy  # reads every config, which `pruner --help` need not

        self.check_flags("inference", self.inference)
        return policy.load(
            checkpoint_dir,
            config,
            self.backend,
            pruning=False if self.no_pruning else None,
            keep_ratio=self.token_prune_keep_ratio,
            keep_tokens=self.token_prune_keep_tokens,
            asset_id=self.asset_id,
            tokenizer_path=self.tokenizer,
            inference=self.inference,
            settings=self.settings,
            num_steps=self.num_steps,
            seed=self.seed,
            **others,
        )

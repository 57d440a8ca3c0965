"""The prompt as the model reads it: text, and for π0.5 the state, as SentencePiece ids.

π0.5 reads the robot's state as text, each number as one of 256 bins; π0 reads the instruction and a
newline. The formats, down to their spaces, are openpi's: the released checkpoints know no other.
"""

import logging
import os
import urllib.request
from pathlib import Path

import numpy as np
import sentencepiece
from jaxtyping import Bool, Float, Int, Int32

from pruner_run.assets import DEMO_TOKENIZER
from pruner_run.files import write_atomically
from pruner_spec.config import Pi0Config

PAD_ID = 0
STATE_BINS = 256

_URL = "https://storage.googleapis.com/big_vision/paligemma_tokenizer.model"
_IN_CACHE = "big_vision/paligemma_tokenizer.model"
_PATIENCE = 30.0  # seconds without a byte of the download

logger = logging.getLogger(__name__)


def openpi_cache() -> Path:
    """Where openpi keeps what it has downloaded."""
    return Path(os.environ.get("OPENPI_DATA_HOME", "~/.cache/openpi")).expanduser()


def load_tokenizer(path: str | Path | None, model: Pi0Config) -> "PromptTokenizer":
    """A model's tokenizer.

    Args:
        path: a SentencePiece model; None for PaliGemma's, from openpi's cache, into which it is
            downloaded where it is not there.
        model: whose prompts it makes.

    Raises:
        FileNotFoundError: there is no such file; the message says how to get PaliGemma's.
        ValueError: it is another file, or has more tokens than the model.
    """
    path = _paligemmas() if path is None else path
    tokenizer = PromptTokenizer(path, max_len=model.max_token_len)
    rows = model.paligemma.vocab_size
    if tokenizer.vocab_size > rows:
        raise ValueError(
            f"tokenizer_path: expected at most the model's {rows} tokens, got "
            f"{tokenizer.vocab_size} in {path}"
        )
    return tokenizer


def _paligemmas() -> Path:
    """PaliGemma's tokenizer in openpi's cache; where it is not there and cannot be got, its place,
    of which `PromptTokenizer` says what to do."""
    path = openpi_cache() / _IN_CACHE
    if path.is_file():
        return path
    logger.info("downloading %s to %s", _URL, path)
    try:
        with urllib.request.urlopen(_URL, timeout=_PATIENCE) as response:
            data = response.read()
        sentencepiece.SentencePieceProcessor(model_proto=data)  # not some proxy's page
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, data)
    except (OSError, RuntimeError) as error:
        logger.warning("%s cannot be downloaded: %s", _URL, error)
    return path


def digitize_state(state: Float[np.ndarray, "A"]) -> Int[np.ndarray, "A"]:
    """The bin of each number: 256 equal bins over [-1, 1].

    What lies below -1 is in bin -1 and what lies above 1 in bin 255, as in openpi.
    """
    edges = np.linspace(-1.0, 1.0, STATE_BINS + 1)[:-1]
    return np.digitize(state, edges) - 1


def format_prompt(prompt: str, state: Float[np.ndarray, "A"] | None = None) -> str:
    """The text that is tokenized: π0.5's with a state, π0's (but its newline) without."""
    text = prompt.strip().replace("_", " ").replace("\n", " ")
    if state is None:
        return text
    bins = " ".join(map(str, digitize_state(state)))
    return f"Task: {text}, State: {bins};\nAction: "


class PromptTokenizer:
    """A SentencePiece model and the prompt's fixed length.

    Attributes:
        max_len: Length of what `tokenize` returns: 200 for π0.5 and 48 for π0 in openpi.
        vocab_size: Every id is below it.
    """

    def __init__(self, path: str | Path, *, max_len: int):
        """Loads the model.

        Args:
            path: A SentencePiece `.model` file.
            max_len: Tokens a prompt is padded or cut to.

        Raises:
            FileNotFoundError: If there is no such file; the message says where to get PaliGemma's.
            ValueError: If it is no SentencePiece model or has no id for the beginning of a text.
        """
        path = Path(path)
        if max_len < 1:
            raise ValueError(f"max_len: expected at least 1, got {max_len}")
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: expected a SentencePiece model, found no file. To get PaliGemma's, once: "
                f"curl --create-dirs -o {path} {_URL} (for a try without a download, "
                f"{DEMO_TOKENIZER} is a small stand-in)"
            )
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
        except RuntimeError as error:
            raise ValueError(f"{path}: expected a SentencePiece model, got another file") from error
        if self._model.bos_id() < 0:
            raise ValueError(f"{path}: expected a model with an id for BOS, got one without")
        self.max_len = max_len
        self.vocab_size = self._model.vocab_size()

    def tokenize(
        self, prompt: str, state: Float[np.ndarray, "A"] | None = None
    ) -> tuple[Int32[np.ndarray, "L"], Bool[np.ndarray, "L"]]:
        """Ids of the prompt and which of them are not padding.

        A prompt that is too long is cut, with a warning.

        Args:
            prompt: The instruction.
            state: For π0.5's format, the normalised state as the robot has it, not yet padded to
                the model's action dim; None for π0's format.

        Raises:
            ValueError: If the state is not a vector of finite numbers.
        """
        if state is not None and (np.ndim(state) != 1 or not np.isfinite(state).all()):
            raise ValueError(f"state: expected a vector of finite numbers, got {state!r}")
        ids = self._model.encode(format_prompt(prompt, state), add_bos=True)
        if state is None:
            ids += self._model.encode("\n")  # on its own, so that it cannot join the text's pieces
        if len(ids) > self.max_len:
            logger.warning("prompt of %d tokens cut to max_len %d", len(ids), self.max_len)
        ids = ids[: self.max_len]
        tokens = np.full(self.max_len, PAD_ID, np.int32)
        tokens[: len(ids)] = ids
        return tokens, np.arange(self.max_len) < len(ids)

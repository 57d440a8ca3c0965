"""Trains the stand-in for PaliGemma's tokenizer, which has to be downloaded by users.

    python -m pruner_run.assets.make_demo_tokenizer

It agrees with PaliGemma's in everything but its pieces: the special ids, digits one by one, newline
a piece of its own, bytes for what it does not know, no space put in front. The corpus is written
here and holds no randomness but a seeded generator's: the file comes out the same every time.
"""

import io
import itertools
from pathlib import Path

import numpy as np
import sentencepiece

from pruner_run.assets import DEMO_TOKENIZER

VOCABULARY = 1000  # below the 1024 rows of a tiny model's embedding

TASKS = ["pick up", "grasp", "lift", "move", "push", "pull", "find", "hand over", "transfer", "put"]
COLOURS = ["red", "green", "blue", "yellow", "white", "black", "orange", "small", "large", "wooden"]
THINGS = [
    *["cube", "block", "cup", "mug", "bowl", "plate", "bottle", "spoon", "fork", "knife", "sponge"],
    *["towel", "drawer", "cabinet door", "peg", "socket", "box", "basket", "lid", "pot", "apple"],
]
ENDS = [
    "and place it on the table",
    "and put it in the basket",
    "into the top drawer",
    "to the left",
    "from the right arm to the left arm",
    "with the left gripper",
    "with the right hand",
    "on the stove",
    "in the sink",
    "next to the plate",
    "behind the bowl",
    "then open the drawer",
    "then close the cabinet",
    "and turn on the stove",
    "without touching anything else",
]


def corpus() -> list[str]:
    """Instructions as people write them to robots, and the prompts made of them."""
    rng = np.random.default_rng(0)
    lines = []
    for task, colour, thing in itertools.product(TASKS, COLOURS, THINGS):
        text = f"{task} the {colour} {thing} {ENDS[rng.integers(len(ENDS))]}"
        state = " ".join(map(str, rng.integers(0, 256, size=14)))
        lines += [text, text.capitalize() + ".", f"Task: {text}, State: {state};", "Action: "]
    return lines


def train() -> bytes:
    """The model file's contents."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCABULARY,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        user_defined_symbols=["\n"],
        byte_fallback=True,
        split_digits=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def main(path: Path = DEMO_TOKENIZER) -> None:
    """Trains the model and replaces the shipped file."""
    path.write_bytes(train())


if __name__ == "__main__":
    main()

"""Prompts: the two formats to the letter, bins, padding and cutting."""

import dataclasses
import logging

import numpy as np
import pytest
import sentencepiece

from parity_tests.cases import tiny_config
from pruner_run.assets import DEMO_TOKENIZER
from pruner_run.assets.make_demo_tokenizer import train
from pruner_run.tokenizer import PromptTokenizer, digitize_state, format_prompt, load_tokenizer

STATE = np.array([-1.0, -0.999, 0.0, 0.5, 1.0])


@pytest.fixture(scope="module")
def model() -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(DEMO_TOKENIZER))


def test_state_bins():
    width = 2.0 / 256
    state = np.array([-1.0, -1.0 + width, -1e-9, 0.0, 1.0 - width, 1.0 - 1e-9, 1.0, 3.0, -1.1])
    assert digitize_state(state).tolist() == [0, 1, 127, 128, 255, 255, 255, 255, -1]


def test_formats():
    assert format_prompt("pick up the cup") == "pick up the cup"
    assert format_prompt(" pick_up\nthe cup\n") == "pick up the cup"
    assert format_prompt("pick_up the cup ", STATE) == (
        "Task: pick up the cup, State: 0 0 128 192 255;\nAction: "
    )


def test_pi05_prompt(model):
    tokens, mask = PromptTokenizer(DEMO_TOKENIZER, max_len=60).tokenize("pick up the cup", STATE)
    assert tokens.shape == mask.shape == (60,)
    assert (tokens.dtype, mask.dtype) == (np.int32, np.bool_)
    length = int(mask.sum())
    assert mask.tolist() == [True] * length + [False] * (60 - length)
    assert tokens[length:].tolist() == [0] * (60 - length)
    assert tokens[0] == model.bos_id() == 2
    text = model.decode(tokens[1:length].tolist())
    assert text == "Task: pick up the cup, State: 0 0 128 192 255;\nAction: "


def test_pi0_prompt_ends_with_a_newline_of_its_own(model):
    tokens, mask = PromptTokenizer(DEMO_TOKENIZER, max_len=48).tokenize("pick up the cup")
    ids = tokens[mask].tolist()
    assert ids == [2, *model.encode("pick up the cup"), *model.encode("\n")]
    assert model.id_to_piece(ids[-1]) == "\n"


def test_a_prompt_that_fits_exactly_is_not_cut(caplog):
    whole, mask = PromptTokenizer(DEMO_TOKENIZER, max_len=48).tokenize("pick up the cup")
    length = int(mask.sum())
    tokens, mask = PromptTokenizer(DEMO_TOKENIZER, max_len=length).tokenize("pick up the cup")
    assert tokens.tolist() == whole[:length].tolist()
    assert mask.all()
    assert not caplog.records


def test_a_prompt_too_long_is_cut_with_a_warning(caplog):
    whole, mask = PromptTokenizer(DEMO_TOKENIZER, max_len=60).tokenize("pick up the cup", STATE)
    with caplog.at_level(logging.WARNING):
        tokens, cut = PromptTokenizer(DEMO_TOKENIZER, max_len=10).tokenize("pick up the cup", STATE)
    assert tokens.tolist() == whole[:10].tolist()
    assert cut.all()
    assert f"prompt of {mask.sum()} tokens cut to max_len 10" in caplog.text


def test_wrong_states_are_refused():
    tokenizer = PromptTokenizer(DEMO_TOKENIZER, max_len=60)
    for state in (np.zeros((2, 3)), np.array([0.0, np.nan])):
        with pytest.raises(ValueError, match="state: expected a vector of finite numbers, got"):
            tokenizer.tokenize("pick up the cup", state)


def test_wrong_models_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing\.model: .*paligemma_tokenizer\.model"):
        PromptTokenizer(tmp_path / "missing.model", max_len=48)
    (tmp_path / "other.model").write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"other\.model: expected a SentencePiece model"):
        PromptTokenizer(tmp_path / "other.model", max_len=48)
    with pytest.raises(ValueError, match="max_len: expected at least 1, got 0"):
        PromptTokenizer(DEMO_TOKENIZER, max_len=0)


def test_the_stand_in_has_paligemmas_conventions(model):
    assert (model.pad_id(), model.eos_id(), model.bos_id(), model.unk_id()) == (0, 1, 2, 3)
    assert model.vocab_size() <= 1000
    assert PromptTokenizer(DEMO_TOKENIZER, max_len=1).vocab_size == model.vocab_size()
    assert model.encode("128", out_type=str)[-3:] == ["1", "2", "8"]
    assert model.encode("\n", out_type=str) == ["\n"]
    assert model.decode(model.encode("Öffne die Schublade 抽屉")) == "Öffne die Schublade 抽屉"
    assert DEMO_TOKENIZER.stat().st_size < 300_000


def test_the_stand_in_is_reproducible():
    assert train() == DEMO_TOKENIZER.read_bytes()


def test_paligemmas_is_downloaded_once(tmp_path, monkeypatch):
    """Into openpi's cache; what is no tokenizer is not kept there."""
    monkeypatch.setenv("OPENPI_DATA_HOME", str(tmp_path / "cache"))
    source = tmp_path / "served.model"
    monkeypatch.setattr("pruner_run.tokenizer._URL", source.as_uri())
    source.write_text("<html>please log in</html>")
    with pytest.raises(FileNotFoundError, match="expected a SentencePiece model, found no file"):
        load_tokenizer(None, tiny_config())
    source.write_bytes(DEMO_TOKENIZER.read_bytes())
    found = load_tokenizer(None, tiny_config())
    source.unlink()
    assert load_tokenizer(None, tiny_config()).vocab_size == found.vocab_size


def test_a_models_tokenizer(tmp_path, monkeypatch):
    """One that is named, or PaliGemma's where openpi keeps it; never one with ids of no row."""
    found = load_tokenizer(DEMO_TOKENIZER, tiny_config(max_token_len=9))
    assert found.max_len == 9
    monkeypatch.setenv("OPENPI_DATA_HOME", str(tmp_path))
    cached = tmp_path / "big_vision/paligemma_tokenizer.model"
    with pytest.raises(FileNotFoundError, match=f"{cached}: .*curl --create-dirs -o {cached} http"):
        load_tokenizer(None, tiny_config())
    cached.parent.mkdir()
    cached.write_bytes(DEMO_TOKENIZER.read_bytes())
    assert load_tokenizer(None, tiny_config()).vocab_size == found.vocab_size
    small = dataclasses.replace(tiny_config().paligemma, vocab_size=found.vocab_size - 1)
    with pytest.raises(ValueError, match="tokenizer_path: expected at most the model's"):
        load_tokenizer(DEMO_TOKENIZER, tiny_config(paligemma_variant=small))

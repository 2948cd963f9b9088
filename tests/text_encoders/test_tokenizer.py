"""Equality of ids with transformers' CLIPTokenizer and T5Tokenizer, pad conventions, and the naming of words that do not fit."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import models, normalizers, trainers
from transformers import CLIPTokenizer, T5Tokenizer
from tu_diffuse.errors import DataError, ModelError
from tu_diffuse.text_encoders.sentencepiece_file import read_sentencepiece
from tu_diffuse.text_encoders.tokenizer import load_tokenizer

WORDS = st.sampled_from(["a", "red", "apple", "isn't", "they'RE", "12", "café", "cafe\u0301", "½", "ﬁ", "🍎", "👩‍👩‍👧", "!", "!!", "<|endoftext|>"])
SPECIAL = st.sampled_from(
    ["</s>", "<pad>", "<extra_id_3>", "<|startoftext|>", "<|ENDOFTEXT|>", "日本語", "\n", "\t", "\x00", "\x1f", "\x85", "\u200b"]
)
PROMPT = st.one_of(
    st.lists(st.one_of(WORDS, SPECIAL, st.text(max_size=6)), max_size=40).map(" ".join),
    st.lists(st.one_of(WORDS, SPECIAL), max_size=12).map("".join),
    st.text(max_size=120),
)
MANY = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])

FLAGGED = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
SD1_MAP = {
    "bos_token": {"content": "<|startoftext|>", **FLAGGED},
    "eos_token": {"content": "<|endoftext|>", **FLAGGED},
    "pad_token": "<|endoftext|>",
    "unk_token": {"content": "<|endoftext|>", **FLAGGED},
}
LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "bare": ({}, None),
    "sd1": ({"bos_token": SD1_MAP["bos_token"] | {"__type": "AddedToken"}, "unk_token": "<|endoftext|>"}, SD1_MAP),
    "sd2": ({"pad_token": "<|endoftext|>"}, SD1_MAP | {"pad_token": "!"}),
    "listed": (
        {
            "added_tokens_decoder": {"0": {"content": "!", **FLAGGED, "normalized": False, "special": True}},
            "pad_token": "!",
            "bos_token": "<|startoftext|>",
        },
        None,
    ),
}


@pytest.fixture(autouse=True)
def _quiet() -> None:
    logging.getLogger("transformers").setLevel(logging.ERROR)


def theirs(tokenizer: Any, text: str, length: int) -> tuple[list[int], list[int]]:
    out = tokenizer(text, padding="max_length", max_length=length, truncation=True)
    return out["input_ids"], out["attention_mask"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("saved", [False, True])
def test_clip_ids_equal_transformers(layout: str, saved: bool, clip_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = clip_folder(*LAYOUTS[layout])
    oracle = CLIPTokenizer.from_pretrained(folder)
    if saved:
        oracle.save_pretrained(tmp_path / "saved")
        folder = tmp_path / "saved"
        assert (folder / "tokenizer.json").is_file()
    ours = load_tokenizer(folder)

    @MANY
    @given(PROMPT)
    def check(text: str) -> None:
        tokens = ours.encode([text])
        ids, mask = theirs(oracle, text, 77)
        assert tokens.ids[0].tolist() == ids
        assert tokens.mask[0].tolist() == [bool(value) for value in mask]
        assert (tokens.overflow[0] != "") == (len(oracle(text)["input_ids"]) > 77)

    check()
    assert len(set(ours.encode(["a red apple"]).ids[0].tolist())) > 4


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("rule", ["nmt_nfkc", "identity"])
def test_t5_ids_equal_transformers(rule: str, saved: bool, t5_folders: dict[str, Path], tmp_path: Path) -> None:
    folder = t5_folders[rule]
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model"))
    pieces = [(processor.IdToPiece(i), processor.GetScore(i)) for i in range(len(processor))]
    pieces += [(f"<extra_id_{i}>", 0.0) for i in reversed(range(100))]
    charsmap = read_sentencepiece(folder / "spiece.model").charsmap
    assert bool(charsmap) == (rule == "nmt_nfkc")
    oracle = T5Tokenizer(vocab=pieces, _spm_precompiled_charsmap=charsmap or None, model_max_length=64)
    if saved:
        oracle.save_pretrained(tmp_path / "saved")
        folder = tmp_path / "saved"
    ours = load_tokenizer(folder)

    @MANY
    @given(PROMPT)
    def check(text: str) -> None:
        tokens = ours.encode([text])
        ids, mask = theirs(oracle, text, 64)
        assert tokens.ids[0].tolist() == ids
        assert tokens.mask[0].tolist() == [bool(value) for value in mask]
        assert (tokens.overflow[0] != "") == (len(oracle(text)["input_ids"]) > 64)

    check()


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(["a", "red", "apple", "café", "ﬁ", "½", "ＡＢ", "night", "日本語", "on the"]), min_size=1, max_size=12))
def test_t5_ids_equal_sentencepiece(t5_folders: dict[str, Path], words: list[str]) -> None:
    """The library that T5 was trained with, character normalisation included."""
    text = " ".join(words)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(t5_folders["nmt_nfkc"] / "spiece.model"))
    tokens = load_tokenizer(t5_folders["nmt_nfkc"], 512).encode([text])
    assert tokens.ids[0][tokens.mask[0]].tolist() == [*processor.Encode(text), processor.eos_id()]


def test_pad_conventions(clip_folder: Callable[..., Path], t5_folders: dict[str, Path]) -> None:
    folder = clip_folder({}, SD1_MAP)
    end = json.loads((folder / "vocab.json").read_text())["<|endoftext|>"]
    sd1 = load_tokenizer(folder).encode(["a star"])
    (folder / "special_tokens_map.json").write_text(json.dumps(SD1_MAP | {"pad_token": "!"}))
    sd2 = load_tokenizer(folder).encode(["a star"])
    assert sd1.ids[0, -1] == end
    assert sd2.ids[0, -1] == 0
    assert torch.equal(sd1.ids[sd1.mask], sd2.ids[sd2.mask])
    t5 = load_tokenizer(t5_folders["nmt_nfkc"]).encode(["a star", ""])
    assert t5.ids.shape == t5.mask.shape == (2, 64)
    assert t5.ids[1].tolist() == [1] + [0] * 63
    assert t5.mask[1].tolist() == [True] + [False] * 63
    assert t5.overflow == ["", ""]


@pytest.mark.parametrize("kind", ["clip", "t5"])
def test_overflow_names_the_words(kind: str, clip_folder: Callable[..., Path], t5_folders: dict[str, Path]) -> None:
    """The cut falls at a word, in the text as it was typed, with nothing lost and nothing told twice."""
    folder = clip_folder({}) if kind == "clip" else t5_folders["nmt_nfkc"]
    whole = load_tokenizer(folder, 500)
    text = "A Red apple,   left of\ta BLUE star on the café's white table at night below Unseenwordzq mountain"
    total = int(whole.encode([text]).mask.sum())
    assert whole.encode([text]).overflow == [""]
    seen: set[str] = set()
    for length in range(4, total):
        tokens = load_tokenizer(folder, length).encode([text, "a star"])
        overflow = tokens.overflow[0]
        assert tokens.mask[0].all()
        assert text.endswith(overflow)
        assert overflow != ""
        assert not (text[-len(overflow) - 1].isalpha() and overflow[0].isalpha())
        kept = tokens.ids[0][len(whole.prefix) : length - 1].tolist()
        assert kept == whole.encode([text]).ids[0][len(whole.prefix) : length - 1].tolist()
        seen.add(overflow)
    assert len(seen) > 8
    assert "mountain" in seen
    assert "Unseenwordzq mountain" in seen


def test_lone_surrogate_is_refused(clip_folder: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match="lone surrogate at position 2"):
        load_tokenizer(clip_folder({})).encode(["a \udcff star"])


def test_no_prompts(clip_folder: Callable[..., Path]) -> None:
    assert load_tokenizer(clip_folder({})).encode([]).ids.shape == (0, 77)


def test_bad_folders(clip_folder: Callable[..., Path], t5_folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="holds no"):
        load_tokenizer(tmp_path)
    folder = clip_folder({"model_max_length": 1e30})
    with pytest.raises(ModelError, match="model_max_length"):
        load_tokenizer(folder)
    with pytest.raises(ModelError, match="model_max_length = 2"):
        load_tokenizer(folder, 2)
    assert load_tokenizer(folder, 7).encode(["a star"]).ids.shape == (1, 7)
    (folder / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(ModelError, match="list"):
        load_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(ModelError, match="could not be read as JSON"):
        load_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "vocab.json").write_text("nonsense")
    with pytest.raises(ModelError, match="cannot be read"):
        load_tokenizer(folder)
    (tmp_path / "spiece.model").write_bytes((t5_folders["identity"] / "spiece.model").read_bytes()[:500])
    with pytest.raises(ModelError, match=r"spiece\.model"):
        load_tokenizer(tmp_path, 64)


def test_bpe_spiece_is_refused(tmp_path: Path) -> None:
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(["a red apple on a table"] * 9), model_prefix=str(tmp_path / "spiece"), model_type="bpe", vocab_size=30, minloglevel=2
    )
    with pytest.raises(ModelError, match="unigram"):
        load_tokenizer(tmp_path, 64)


def test_tokenizer_json_without_end_token_is_refused(tmp_path: Path) -> None:
    backend = Backend(models.BPE(unk_token="u"))
    backend.normalizer = normalizers.Lowercase()
    backend.train_from_iterator(["a red apple"], trainers.BpeTrainer(special_tokens=["u"], show_progress=False))
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ModelError, match="adds 0 special tokens"):
        load_tokenizer(tmp_path, 64)

"""Prompts past one chunk, and weights: against transformers' CLIP chunk by chunk, and against the formula."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from text_towers import BASE_IDS, clip_t5, towers
from torch import Tensor
from transformers import CLIPTokenizer
from tu_diffuse.text_encoders.encode import chunk_count, encode_clip_t5, encode_sd, encode_sdxl
from tu_diffuse.text_encoders.parts import ClipPart
from tu_diffuse.text_encoders.prompts import Part, Reading, parse
from tu_diffuse.text_encoders.tokenizer import load_tokenizer

CHUNKS, WEIGHTS = Reading(split=True), Reading(weighted=True, split=True)
LONG = "two green leaves on a white table, an oil painting of a dog; " * 14


@pytest.fixture
def folder(clip_folder: Callable[..., Path]) -> Path:
    return clip_folder({})


def ids_of(folder: Path, text: str) -> list[int]:
    return CLIPTokenizer.from_pretrained(folder)(text, add_special_tokens=False)["input_ids"]


@torch.no_grad()
def by_hand(folder: Path, model: torch.nn.Module, texts: list[str]) -> tuple[Tensor, Tensor]:
    """What transformers says of each text as a chunk of its own: the hidden states joined along the sequence, and the first one's pooled output."""
    tokens = CLIPTokenizer.from_pretrained(folder)(texts, padding="max_length", return_tensors="pt")
    assert tokens["input_ids"].shape == (len(texts), 77)
    output = model(tokens["input_ids"], output_hidden_states=True)
    return output.last_hidden_state.flatten(0, 1), output.hidden_states[-2].flatten(0, 1)


def test_chunks_equal_transformers_on_each(folder: Path) -> None:
    model, part = towers(folder, 32, None)
    words, texts = LONG.split(), [""]
    for word in words:  # as many whole words as fit in 75 tokens
        longer = f"{texts[-1]} {word}".strip()
        texts = [*texts[:-1], longer] if len(ids_of(folder, longer)) <= 75 else [*texts, word]
    assert len(texts) >= 3
    assert chunk_count([LONG], [part], CHUNKS) == len(texts)
    wanted, _ = by_hand(folder, model, texts)
    ours = encode_sd([LONG], part, reading=CHUNKS)
    assert ours.conditioning.tokens.shape == (1, 77 * len(texts), 32)
    assert float(wanted.std()) > 0.1
    assert float((ours.conditioning.tokens[0] - wanted).abs().max()) <= 1e-5
    assert ours.overflow == [{}]
    assert encode_sd([LONG], part).overflow[0]["clip"].endswith("a dog;")


def test_short_prompts_are_bit_identical(folder: Path) -> None:
    _, part = towers(folder, 32, None)
    exact = next(" ".join(LONG.split()[:n]) for n in range(200) if len(ids_of(folder, " ".join(LONG.split()[:n]))) in (74, 75))
    for text in ["a red apple", "", "(a) [b] {c}", exact]:
        before, after = encode_sd([text], part), encode_sd([text], part, reading=CHUNKS)
        assert torch.equal(before.conditioning.tokens, after.conditioning.tokens)
        assert after.overflow == [{}]
    plain, weighted = (encode_sd(["a red apple"], part, reading=reading).conditioning.tokens for reading in (CHUNKS, WEIGHTS))
    assert torch.equal(plain, weighted)
    assert torch.equal(plain, encode_sd(["a (red:1.0) apple"], part, reading=WEIGHTS).conditioning.tokens)


@given(st.lists(st.sampled_from(["a", "red", "isn't", "🍎🍎", "日本語", "white,", "(b)", "x" * 90, "\n"]), max_size=60).map(" ".join))
@settings(max_examples=60, deadline=None)
def test_rows_hold_every_token_once_and_begin_with_words(clip_vocab: Path, text: str) -> None:
    tokenizer = load_tokenizer(clip_vocab, 20)
    rows = tokenizer.chunks((Part(text),), split=True)
    whole = tokenizer.backend.encode(text, add_special_tokens=False)
    inside = [row[mask][1:-1] for row, mask in zip(rows.ids, rows.mask, strict=True)]
    assert torch.cat(inside).tolist() == whole.ids
    assert all(len(row) <= 18 for row in inside)
    first = 0
    for row in inside[:-1]:
        first += len(row)
        start = whole.offsets[first][0]
        word = text[text.rfind(" ", 0, start) + 1 : start] + text[start:].split(" ")[0]
        assert text[start - 1].isspace() or len(tokenizer.backend.encode(word, add_special_tokens=False).ids) > 18


def test_break_begins_a_chunk_and_the_shorter_prompt_gets_empty_ones(folder: Path) -> None:
    model, part = towers(folder, 32, None)
    ours = encode_sd(["a red apple BREAK a star"], part, reading=WEIGHTS).conditioning.tokens[0]
    assert torch.allclose(ours, by_hand(folder, model, ["a red apple", "a star"])[0], atol=1e-5)
    padded = encode_sd(["a star"], part, reading=WEIGHTS, least=3).conditioning.tokens[0]
    assert torch.allclose(padded, by_hand(folder, model, ["a star", "", ""])[0], atol=1e-5)
    cut = encode_sd([f"{LONG} BREAK {LONG}"], part, reading=Reading(weighted=True))
    assert cut.conditioning.tokens.shape[1] == 2 * 77
    assert cut.overflow[0]["clip"].count("a dog;") > 2


def test_sdxl_pools_the_first_chunk(folder: Path) -> None:
    (model, part), (model_2, part_2) = towers(folder, 32, None), towers(folder, 48, 24)
    ours = encode_sdxl(["a red apple BREAK a star"], part, part_2, BASE_IDS, reading=WEIGHTS).conditioning
    texts = ["a red apple", "a star"]
    wanted = torch.cat([by_hand(folder, one, texts)[1] for one in (model, model_2)], dim=-1)
    assert torch.allclose(ours.tokens[0], wanted, atol=1e-5)
    assert torch.allclose(ours.pooled, encode_sdxl(["a red apple"], part, part_2, BASE_IDS).conditioning.pooled, atol=1e-6)
    none = encode_sdxl([None], part, part_2, BASE_IDS, reading=WEIGHTS, least=2).conditioning
    assert none.tokens.shape == (1, 154, 80)
    assert not none.tokens.any()


def weighted_tokens(part: ClipPart, text: str, word: str) -> list[int]:
    """The places of a word's tokens in the row."""
    encoding = part.tokenizer.backend.encode(text, add_special_tokens=False)
    first = text.index(word)
    return [i + 1 for i, (start, end) in enumerate(encoding.offsets) if first <= start and end <= first + len(word)]


@pytest.mark.parametrize("weight", [1.3, 0.0, -0.5])
def test_weights_move_tokens_away_from_the_empty_prompts(weight: float, folder: Path) -> None:
    _, part = towers(folder, 32, None)
    part.model.requires_grad_(False)
    plain, empty = (encode_sd([text], part).conditioning.tokens[0] for text in ("a red apple, a star", ""))
    ours = encode_sd([f"a (red apple:{weight}), a star"], part, reading=WEIGHTS).conditioning.tokens[0]
    places = weighted_tokens(part, "a red apple, a star", "red apple")
    assert len(places) >= 2
    others = [i for i in range(77) if i not in places]
    assert torch.equal(ours[others], plain[others])
    assert torch.allclose(ours[places], empty[places] + weight * (plain - empty)[places], atol=1e-6)
    if weight == 0:
        assert torch.allclose(ours[places], empty[places], atol=1e-6)


def test_weights_reach_every_encoder_and_later_chunks(folder: Path, t5_folders: dict[str, Path]) -> None:
    part = clip_t5(folder, t5_folders["nmt_nfkc"])
    plain, weighted = (encode_clip_t5([text], part, WEIGHTS).conditioning for text in ("a red apple BREAK a star", "a red apple BREAK a (star:1.5)"))
    moved = (plain.tokens != weighted.tokens).any(dim=-1)[0]
    assert plain.tokens.shape[1] == 2 * 77 + 30 + 1
    assert not moved[:77].any()
    assert moved[77:154].any()
    assert moved[154:184].any()
    assert torch.equal(plain.mask, weighted.mask)
    for one in (plain, weighted):
        assert one.mask.dtype == torch.bool


def test_t5_reads_the_whole_text_up_to_its_own_limit(folder: Path, t5_folders: dict[str, Path]) -> None:
    part = clip_t5(folder, t5_folders["nmt_nfkc"])
    ours = encode_clip_t5([LONG], part, CHUNKS)
    assert set(ours.overflow[0]) == {"t5"}
    assert set(encode_clip_t5([LONG], part).overflow[0]) == {"clip", "t5"}
    chunks = chunk_count([LONG], [part.clip], CHUNKS)
    assert ours.conditioning.tokens.shape[1] == 77 * chunks + 30 + 1
    assert int(ours.conditioning.mask.sum()) == len(ids_of(folder, LONG)) + 2 * chunks + 30 + 1


def test_t5_sees_a_weighted_word_as_the_same_tokens(t5_folders: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(t5_folders["nmt_nfkc"], 64)
    [part] = parse("a red (apple:1.4), a star")
    rows = tokenizer.chunks((part,), split=False)
    assert torch.equal(rows.ids, tokenizer.encode(["a red apple, a star"]).ids)
    assert rows.weights is not None
    text = "".join(
        tokenizer.backend.id_to_token(int(i)) for i, weight in zip(rows.ids[0], rows.weights[0], strict=True) if weight == torch.tensor(1.4)
    )
    assert text.strip("▁") == "apple"


@pytest.mark.parametrize("weight", [0.5, 3.0])
@torch.no_grad()
def test_encoders_count_as_much_as_asked(weight: float, folder: Path, t5_folders: dict[str, Path]) -> None:
    part = clip_t5(folder, t5_folders["nmt_nfkc"])
    torch.nn.init.normal_(part.conditioner.refiner[0].to_out.weight)
    out = encode_clip_t5(["a star"], part, Reading(t5_weight=weight)).conditioning
    same = encode_clip_t5(["a star"], part).conditioning
    assert out.mask.dtype == torch.float32
    assert out.mask[0, :77].tolist() == same.mask[0, :77].float().tolist()
    assert out.mask[0, 77:-1].tolist() == [weight * bool(count) for count in same.mask[0, 77:-1]]
    assert out.mask[0, -1] == 1
    assert not torch.allclose(out.tokens, same.tokens, atol=1e-3)  # through the refiner
    assert not torch.allclose(out.pooled, same.pooled, atol=1e-3)
    one = encode_clip_t5(["a star"], part, Reading(clip_weight=1, t5_weight=1)).conditioning
    assert torch.equal(one.tokens, same.tokens)
    assert torch.equal(one.pooled, same.pooled)
    assert torch.equal(one.mask, same.mask)


@torch.no_grad()
def test_without_t5_its_tokens_are_masked(folder: Path, t5_folders: dict[str, Path]) -> None:
    part = clip_t5(folder, t5_folders["nmt_nfkc"])
    out = encode_clip_t5(["a star", ""], part, Reading(t5_weight=0)).conditioning
    assert "t5" not in part.__dict__  # it was not loaded
    embedded_keep = torch.tensor([True, False])
    ids = part.clip.tokenizer.encode(["a star", ""])
    clip = part.clip.model(ids.ids)
    masked = part.conditioner(
        clip.last_hidden_state, ids.mask, clip.projected, torch.randn(2, 5, 40), torch.ones(2, 5, dtype=torch.bool), embedded_keep, torch.zeros(2) > 0
    )
    counted = torch.cat([torch.arange(77), torch.tensor([-1])])
    assert torch.allclose(out.tokens[0][counted][:5], masked.tokens[0][counted][:5], atol=1e-5)
    assert torch.allclose(out.tokens[:, -1], masked.tokens[:, -1], atol=1e-5)
    assert torch.allclose(out.pooled, masked.pooled, atol=1e-5)
    assert out.mask.dtype == torch.bool

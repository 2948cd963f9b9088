"""Prompts to conditioning: equality with diffusers' own prompt encoding, one encoding for each distinct text, and the words beyond the limits."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from text_towers import BASE_IDS, clip_t5, towers
from torch import Tensor
from transformers import CLIPTokenizer
from tu_diffuse.errors import ModelError, UsageError
from tu_diffuse.text_encoders.clip import CLIPText
from tu_diffuse.text_encoders.conditioner import Conditioner
from tu_diffuse.text_encoders.encode import embed_clip_t5, encode_clip_t5, encode_sd, encode_sdxl
from tu_diffuse.text_encoders.parts import ClipPart, ClipT5Part
from tu_diffuse.text_encoders.tokenizer import load_tokenizer

PROMPTS = ["a red apple left of a blue star", "", "snow on the mountain, " * 30]


@pytest.fixture
def folder(clip_folder: Callable[..., Path]) -> Path:
    return clip_folder({})


@torch.no_grad()
def close(ours: Tensor, theirs: Tensor) -> bool:
    return ours.shape == theirs.shape and float(theirs.std()) > 0.1 and float((ours - theirs).abs().max()) <= 1e-5


@pytest.mark.parametrize("clip_skip", [0, 1, 3])
def test_sd_equals_diffusers(clip_skip: int, folder: Path) -> None:
    model, part = towers(folder, 32, None)
    if clip_skip:
        model.__dict__["text_model"] = model  # diffusers 0.42 reaches for the level that transformers >= 5.6 has not
    pipe = StableDiffusionPipeline(None, model, CLIPTokenizer.from_pretrained(folder), None, None, None, None, requires_safety_checker=False)
    theirs, _ = StableDiffusionPipeline.encode_prompt(pipe, PROMPTS, "cpu", 1, False, clip_skip=clip_skip if clip_skip else None)
    assert close(encode_sd(PROMPTS, part, clip_skip).conditioning.tokens, theirs)


@pytest.mark.parametrize("clip_skip", [0, 1])
@pytest.mark.parametrize("force_zeros", [True, False])
def test_sdxl_equals_diffusers(clip_skip: int, force_zeros: bool, folder: Path) -> None:
    (model, part), (model_2, part_2) = towers(folder, 32, None), towers(folder, 48, 24)
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    pipe = StableDiffusionXLPipeline(None, model, model_2, tokenizer, tokenizer, None, None, force_zeros_for_empty_prompt=force_zeros)
    tokens, no_tokens, pooled, no_pooled = pipe.encode_prompt(PROMPTS, clip_skip=clip_skip if clip_skip else None, do_classifier_free_guidance=True)
    ours = encode_sdxl(PROMPTS, part, part_2, BASE_IDS, clip_skip).conditioning
    assert close(ours.tokens, tokens)
    assert close(ours.pooled, pooled)
    assert ours.size_ids.tolist() == [list(BASE_IDS)] * 3
    none = encode_sdxl([None] * 3, part, part_2, BASE_IDS, force_zeros_for_empty_prompt=force_zeros).conditioning
    assert torch.allclose(none.tokens, no_tokens, atol=1e-5)
    assert torch.allclose(none.pooled, no_pooled, atol=1e-5)
    assert bool((none.tokens == 0).all()) == force_zeros
    mixed = encode_sdxl([None, "", "a star"], part, part_2, BASE_IDS, clip_skip, force_zeros).conditioning
    assert bool((mixed.tokens[0] == 0).all()) == force_zeros
    assert torch.allclose(mixed.tokens[1], ours.tokens[1], atol=1e-6)


def test_sdxl_refiner_takes_the_second_tower_only(folder: Path) -> None:
    (_, part), (_, part_2) = towers(folder, 32, None), towers(folder, 48, 24)
    ids = (1024.0, 1024.0, 0.0, 0.0, 6.0)
    refiner, base = encode_sdxl(PROMPTS, None, part_2, ids).conditioning, encode_sdxl(PROMPTS, part, part_2, BASE_IDS).conditioning
    assert torch.equal(refiner.tokens, base.tokens[..., 32:])
    assert torch.equal(refiner.pooled, base.pooled)
    assert refiner.size_ids.tolist() == [list(ids)] * 3
    assert encode_sdxl(PROMPTS, None, part_2, ids).overflow[2].keys() == {"clip_2"}


def test_clip_t5_joins_both_encoders(folder: Path, t5_folders: dict[str, Path]) -> None:
    part = clip_t5(folder, t5_folders["nmt_nfkc"])
    out = encode_clip_t5(PROMPTS, part)
    clip_ids, t5_ids = part.clip.tokenizer.encode(PROMPTS), part.t5.tokenizer.encode(PROMPTS)
    assert out.conditioning.tokens.shape == (3, 77 + 30 + 1, 48)
    assert out.conditioning.pooled.shape == (3, 20)
    said = torch.tensor([prompt != "" for prompt in PROMPTS])
    assert said.tolist().count(False) == 1
    masks = [clip_ids.mask & said[:, None], t5_ids.mask & said[:, None], torch.ones(3, 1, dtype=torch.bool)]
    assert torch.equal(out.conditioning.mask, torch.cat(masks, dim=1))
    with torch.no_grad():
        clip, t5 = part.clip.model(clip_ids.ids), part.t5.model(t5_ids.ids, t5_ids.mask)
        wanted = part.conditioner(clip.last_hidden_state, clip_ids.mask, clip.projected, t5, t5_ids.mask, keep_clip=said, keep_t5=said)
    assert close(out.conditioning.tokens, wanted.tokens)
    assert close(out.conditioning.pooled, wanted.pooled)
    assert not torch.allclose(out.conditioning.pooled[0], out.conditioning.pooled[2], atol=1e-3)
    assert out.overflow[0] == {}
    assert out.overflow[2].keys() == {"clip", "t5"}
    assert len(out.overflow[2]["t5"]) > len(out.overflow[2]["clip"])
    for words in out.overflow[2].values():
        assert PROMPTS[2].strip().endswith(words)


def test_identical_texts_are_encoded_once(folder: Path, t5_folders: dict[str, Path]) -> None:
    part = clip_t5(folder, t5_folders["nmt_nfkc"])
    batches: list[int] = []
    for model in (part.clip.model, part.t5.model):
        model.requires_grad_(False).register_forward_pre_hook(lambda _, args: batches.append(len(args[0])))
    embedded = embed_clip_t5(["a star", "", "a star", "a star"], part.clip, part.t5)
    assert batches == [2, 2]
    assert torch.equal(embedded.clip_tokens[0], embedded.clip_tokens[3])
    assert not torch.equal(embedded.clip_tokens[0], embedded.clip_tokens[1])
    assert torch.equal(embedded.t5_tokens[2], embedded.t5_tokens[0])
    assert len(embedded.overflow) == 4
    assert not embedded.t5_tokens.requires_grad
    encode_sd(["a", "b", "a"], part.clip)
    assert batches[2:] == [2]


def test_attention_mask_is_used_where_the_config_asks(folder: Path) -> None:
    _, part = towers(folder, 32, None)
    masked = CLIPText(replace(part.model.config, use_attention_mask=True), False).eval()
    masked.load_state_dict(part.model.state_dict())
    before, after = (encode_sd(["a star"], one).conditioning.tokens for one in (part, ClipPart(part.tokenizer, masked)))
    words = int(part.tokenizer.encode(["a star"]).mask.sum())
    assert torch.allclose(before[:, :words], after[:, :words], atol=1e-5)
    assert not torch.allclose(before[:, words + 1 :], after[:, words + 1 :], atol=1e-3)


def test_what_does_not_fit_is_refused(folder: Path, t5_folders: dict[str, Path]) -> None:
    (_, part), (_, part_2) = towers(folder, 32, None), towers(folder, 48, 24)
    for skip in (-1, 5):
        with pytest.raises(UsageError, match="from 0 to 4"):
            encode_sd(["a"], part, skip)
    with pytest.raises(UsageError, match="from 0 to 3"):
        encode_sdxl(["a"], part, part_2, BASE_IDS, 4)
    with pytest.raises(ModelError, match="text_projection"):
        encode_sdxl(["a"], part, part, BASE_IDS)
    with pytest.raises(ModelError, match="70 and 77"):
        encode_sdxl(["a"], ClipPart(load_tokenizer(folder, 70), part.model), part_2, BASE_IDS)
    with pytest.raises(ModelError, match="78 tokens"):
        ClipPart(load_tokenizer(folder, 78), part.model)
    small = CLIPText(replace(part.model.config, vocab_size=100), False)
    with pytest.raises(ModelError, match="less than 100"):
        encode_sd(["a star"], ClipPart(part.tokenizer, small))
    whole = clip_t5(folder, t5_folders["nmt_nfkc"])
    with pytest.raises(ModelError, match="text_projection"):
        ClipT5Part(part, whole.load_t5, whole.conditioner)
    other: Any = Conditioner(replace(whole.conditioner.config, t5_width=41))
    with pytest.raises(ModelError, match=r"T5\) are \(40,\).*\(41,\)"):
        _ = ClipT5Part(whole.clip, whole.load_t5, other).t5
    narrow: Any = Conditioner(replace(whole.conditioner.config, clip_width=33))
    with pytest.raises(ModelError, match=r"pooled\) are \(32, 24\).*\(33, 24\)"):
        ClipT5Part(whole.clip, whole.load_t5, narrow)

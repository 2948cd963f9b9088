"""How experts read prompts: text encoders from a model folder to memory, LoRAs and embeddings added, as functions from texts to conditionings."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from ...text_encoders.clip import CLIPText, CLIPTextConfig, clip_state_dict, with_rows
from ...text_encoders.conditioner import Conditioner, ConditionerConfig
from ...text_encoders.encode import Encoded, chunk_count, encode_clip_t5, encode_sd, encode_sd_t5, encode_sdxl, encode_sdxl_t5, encode_t5
from ...text_encoders.parts import ClipPart, ClipT5Part, SdT5Part, SdxlT5Part, T5Part
from ...text_encoders.prompts import Text
from ...text_encoders.t5 import T5Config, T5Encoder, t5_state_dict
from ...text_encoders.t5_residual import T5Residual, T5ResidualConfig
from ...text_encoders.tokenizer import load_tokenizer, with_words
from ...unet.experts import ExpertEntry, ExpertText
from ...unet.lora import adapted
from ...weights import without_storage
from ..adapters.adapters import NO_ADAPTERS, Adapters
from .folder import ModelFolder
from .place import Place, filled

AESTHETIC_SCORE, NEGATIVE_AESTHETIC_SCORE = 6.0, 2.5  # what the SDXL refiner is told of pictures to draw and to avoid

TextParts = ClipPart | T5Part | ClipT5Part | SdT5Part | SdxlT5Part | tuple[ClipPart | None, ClipPart]
"""SD's tower; T5; CLIP, T5 and their join; SD's tower with T5; SDXL's towers with T5; or SDXL's two towers (its refiner has only the second)."""

Encode = Callable[[Text], tuple[Encoded, Encoded]]
"""What is told of a picture to prompt and negative prompt, encoded."""

ReadersWith = Callable[[Adapters], Mapping[str, Encode]]
"""LoRAs and embeddings to how each expert reads prompts with them, by its name; those that read alike have the same function."""


def load_text(
    folder: ModelFolder,
    place: Place,
    text: ExpertText | None = None,
    towers: dict[str, ClipPart] | None = None,
) -> TextParts:
    """Load the text encoders of a model, as its family has them.

    Args:
        folder: the model.
        place: where they go.
        text: of an expert that reads prompts in its own way; None for the model's.
        towers: CLIP towers by component, which several readings share; those that are loaded here are added.
    """
    family = folder.family if text is None else text.family
    known = {} if towers is None else towers
    backend = place.attention

    def component(part: str) -> str:
        return part if text is None else text.parts[part]

    def clip(part: str) -> ClipPart:
        name = component(part)
        if name not in known:
            config = CLIPTextConfig.from_dict(folder.configs[name])
            projection = folder.parts[name] == "CLIPTextModelWithProjection"
            tower = without_storage(lambda: CLIPText(config, projection, backend))
            tokenizer = load_tokenizer(folder.path / component(part.replace("text_encoder", "tokenizer")))
            known[name] = ClipPart(tokenizer, filled(tower, folder.path / name, place, "model", clip_state_dict, variant=folder.variant))
        return known[name]

    def t5(part: str, masked: bool) -> T5Part:
        name = component(part)
        config = T5Config.from_dict(folder.configs[name])
        encoder = without_storage(lambda: T5Encoder(config, backend))
        tokenizer = load_tokenizer(folder.path / component(part.replace("text_encoder", "tokenizer")))
        return T5Part(tokenizer, filled(encoder, folder.path / name, place, "model", t5_state_dict, variant=folder.variant), masked)

    load_t5 = partial(t5, "text_encoder_2", masked=True)
    match family:
        case "sd":
            return clip("text_encoder")
        case "t5":  # as diffusers' StableDiffusionPipeline does it
            return t5("text_encoder", masked=bool(folder.configs[component("text_encoder")].get("use_attention_mask")))
        case "clip-t5":
            return ClipT5Part(clip("text_encoder"), load_t5, load_conditioner(folder, place, component("conditioner")))
        case "sd-t5":
            return SdT5Part(clip("text_encoder"), load_t5, load_t5_residual(folder, place, component("conditioner")))
        case "sdxl-t5" | "sdxl-refiner-t5":
            pair = (clip("text_encoder") if family == "sdxl-t5" else None, clip("text_encoder_2"))
            return SdxlT5Part(pair, partial(t5, "text_encoder_3", masked=True), load_t5_residual(folder, place, component("conditioner")))
        case "sdxl-refiner":
            return None, clip("text_encoder_2")
        case _:
            return clip("text_encoder"), clip("text_encoder_2")


def load_conditioner(folder: ModelFolder, place: Place, name: str = "conditioner") -> Conditioner:
    """Load the join of CLIP and T5, the component `name`, without the encoders."""
    config = ConditionerConfig.from_dict(folder.configs[name])
    return filled(without_storage(lambda: Conditioner(config, place.attention)), folder.path / name, place, variant=folder.variant, whole=True)


def load_t5_residual(folder: ModelFolder, place: Place, name: str = "conditioner") -> T5Residual:
    """Load what adds T5 to CLIP's tokens, the component `name`, without the encoders."""
    config = T5ResidualConfig.from_dict(folder.configs[name])
    return filled(without_storage(lambda: T5Residual(config, place.attention)), folder.path / name, place, variant=folder.variant, whole=True)


def load_texts(folder: ModelFolder, place: Place) -> dict[str, TextParts]:
    """Load all text encoders: what each expert reads prompts with, by its name; those that read alike get the same object."""
    towers: dict[str, ClipPart] = {}
    known: list[tuple[ExpertText | None, TextParts]] = []
    texts: dict[str, TextParts] = {}
    for entry in folder.experts:
        parts = next((parts for text, parts in known if text == entry.text), None)
        if parts is None:
            parts = load_text(folder, place, entry.text, towers)
            known.append((entry.text, parts))
        texts[entry.name] = parts
    return texts


def readers_of(folder: ModelFolder, texts: Mapping[str, TextParts], adapters: Adapters = NO_ADAPTERS) -> dict[str, Encode]:
    """How each expert reads prompts, by its name; those that read alike get the same function.

    Args:
        folder: the model.
        texts: from `load_texts`; their weights stay as they are.
        adapters: what to add to copies of them.
    """
    known: list[tuple[Any, Encode]] = []
    made: dict[Any, Any] = {}
    readers: dict[str, Encode] = {}
    for entry in folder.experts:
        change = adapters.change(entry.name)
        alike = (entry.text, {name: added.key for name, added in change.texts.items()}, {name: list(words) for name, words in change.words.items()})
        reader = next((encode for key, encode in known if key == alike), None)
        if reader is None:
            zero_negative = folder.zero_negative if entry.text is None else entry.text.zero_negative
            reader = _encoder(_adapted_text(texts[entry.name], entry, adapters, made), zero_negative)
            known.append((alike, reader))
        readers[entry.name] = reader
    return readers


def _adapted_text(parts: TextParts, entry: ExpertEntry, adapters: Adapters, made: dict[Any, Any]) -> TextParts:
    """What an expert reads prompts with, LoRAs and embeddings added; `made` holds the copies, which experts share."""

    change = adapters.change(entry.name)

    def component(part: str) -> str:
        return part if entry.text is None else entry.text.parts[part]

    def network(part: str, own: Any) -> Any:
        added = change.text(component(part))
        if not added.pairs:
            return own
        key = (component(part), added.key)
        if key not in made:
            made[key] = adapted(own, added.pairs)
        return made[key]

    def clip(part: str, own: ClipPart) -> ClipPart:
        words = change.words.get(component(part), {})
        if not words:
            return replace(own, model=network(part, own.model))
        key = (component(part), change.text(component(part)).key, tuple(words))
        if key not in made:
            tokenizer, ids = with_words(own.tokenizer, {word: len(vectors) for word, vectors in words.items()})
            rows = {row: vector for word, vectors in words.items() for row, vector in zip(ids[word], vectors, strict=True)}
            made[key] = ClipPart(tokenizer, with_rows(network(part, own.model), rows))
        return made[key]

    def pair(first: ClipPart | None, second: ClipPart) -> tuple[ClipPart | None, ClipPart]:
        return None if first is None else clip("text_encoder", first), clip("text_encoder_2", second)

    if isinstance(parts, ClipPart):
        return clip("text_encoder", parts)
    if isinstance(parts, T5Part):
        return replace(parts, model=network("text_encoder", parts.model))
    if isinstance(parts, ClipT5Part | SdT5Part | SdxlT5Part):
        beside = parts

        def load_t5() -> T5Part:
            return replace(beside.t5, model=network("text_encoder_3" if isinstance(beside, SdxlT5Part) else "text_encoder_2", beside.t5.model))

        joined: dict[str, Any] = {"load_t5": load_t5, "conditioner": network("conditioner", parts.conditioner)}
        if isinstance(parts, SdxlT5Part):
            return replace(parts, towers=pair(*parts.towers), **joined)
        return replace(parts, clip=clip("text_encoder", parts.clip), **joined)
    return pair(*parts)


@torch.no_grad()
def having_read(readers_with: ReadersWith, texts: Mapping[Adapters, Iterable[Text]]) -> ReadersWith:
    """Readers that only know what the given ones say of some texts, and do not keep the encoders."""
    known: dict[Adapters, dict[str, Encode]] = {NO_ADAPTERS: {}}
    for adapters, told in texts.items():
        readers, distinct = readers_with(adapters), list(dict.fromkeys(told))
        said = {encode: {text: encode(text) for text in distinct}.__getitem__ for encode in dict.fromkeys(readers.values())}
        known[adapters] = {name: said[encode] for name, encode in readers.items()}
    return known.__getitem__


def _encoder(parts: TextParts, zero_negative: bool) -> Encode:
    """The function that encodes a prompt and its negative."""
    if isinstance(parts, T5Part):
        return lambda text: (encode_t5([text.prompt], parts, text.reading), encode_t5([text.negative], parts, text.reading))
    if isinstance(parts, ClipT5Part):
        return lambda text: (encode_clip_t5([text.prompt], parts, text.reading), encode_clip_t5([text.negative], parts, text.reading))
    if isinstance(parts, ClipPart | SdT5Part):
        tower = parts.clip if isinstance(parts, SdT5Part) else parts

        def encode_alone(text: Text) -> tuple[Encoded, Encoded]:
            chunks = chunk_count([text.prompt, text.negative], [tower], text.reading)

            def encode(said: str) -> Encoded:
                if isinstance(parts, SdT5Part):
                    return encode_sd_t5([said], parts, text.reading, chunks)
                return encode_sd([said], parts, reading=text.reading, least=chunks)

            return encode(text.prompt), encode(text.negative)

        return encode_alone
    first, second = towers = parts.towers if isinstance(parts, SdxlT5Part) else parts

    def encode_pair(text: Text) -> tuple[Encoded, Encoded]:
        chunks = chunk_count([text.prompt, text.negative], [tower for tower in towers if tower is not None], text.reading)

        def encode(said: str, score: float) -> Encoded:
            told = [score] if first is None else [text.height, text.width]
            prompt, size_ids = None if said == "" else said, [text.height, text.width, 0, 0, *told]
            if isinstance(parts, SdxlT5Part):
                return encode_sdxl_t5([prompt], parts, size_ids, zero_negative, text.reading, chunks)
            return encode_sdxl([prompt], first, second, size_ids, 0, zero_negative, text.reading, chunks)

        return encode(text.prompt, AESTHETIC_SCORE), encode(text.negative, NEGATIVE_AESTHETIC_SCORE)

    return encode_pair

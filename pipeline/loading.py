"""From a checked model folder to networks in memory.

Networks are laid out without storage and filled from memory-mapped safetensors, so loading costs little more than reading the file once. Where an
architecture is not covered by our networks, the library's class takes its place behind the same contract (`library.py`).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from ..attention import AttentionBackend
from ..errors import ModelError, UsageError
from ..text_encoders.clip import CLIPText, CLIPTextConfig, clip_state_dict, with_rows
from ..text_encoders.conditioner import Conditioner, ConditionerConfig
from ..text_encoders.encode import (
    ClipPart,
    ClipT5Part,
    Encoded,
    SdT5Part,
    T5Part,
    chunk_count,
    encode_clip_t5,
    encode_sd,
    encode_sd_t5,
    encode_sdxl,
    encode_t5,
)
from ..text_encoders.prompts import Text
from ..text_encoders.t5 import T5Config, T5Encoder, t5_state_dict
from ..text_encoders.t5_residual import T5Residual, T5ResidualConfig
from ..text_encoders.tokenizer import load_tokenizer, with_words
from ..unet.config import UNetConfig
from ..unet.experts import ExpertEntry, ExpertText
from ..unet.lora import adapted
from ..unet.residency import ExpertPool, Keep, expert_pool, identities
from ..unet.unet import UNet
from ..vae.autoencoder import Autoencoder, modernise_keys
from ..vae.autoencoder_dc import AutoencoderDC, AutoencoderDCConfig
from ..vae.codec import LatentCodec
from ..vae.config import AutoencoderConfig
from ..weights import load_weights, without_storage
from .adapters.adapters import NO_ADAPTERS, Adapters, Shelf
from .editing.control import ControlNets
from .folder import ModelFolder, expert_bytes
from .quantize import check_quantize, quantized
from .request import Request, rounds

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
KEEP_BYTES = 4 * 2**30  # experts that are smaller on disk all stay in memory; of larger ones only the active and the next
READ_AHEAD = 512  # requests whose prompts are all read before anything else is loaded
TILE_ROWS = 64  # latent rows that a KL autoencoder decodes at a time: 512 pixels at once, taller pictures in strips of the same result
AESTHETIC_SCORE, NEGATIVE_AESTHETIC_SCORE = 6.0, 2.5  # what the SDXL refiner is told of pictures to draw and to avoid

TextParts = ClipPart | T5Part | ClipT5Part | SdT5Part | tuple[ClipPart | None, ClipPart]
"""SD's tower; T5; CLIP, T5 and their join; SD's tower with T5; or SDXL's two towers (its refiner has only the second)."""

Encode = Callable[[Text], tuple[Encoded, Encoded]]
"""What is told of a picture to prompt and negative prompt, encoded."""

ReadersWith = Callable[[Adapters], Mapping[str, Encode]]
"""LoRAs and embeddings to how each expert reads prompts with them, by its name; those that read alike have the same function."""


@dataclass(frozen=True)
class Place:
    """Where and how networks compute.

    Attributes:
        device: where they are.
        dtype: of their weights.
        attention: the kernel that was asked for.
        quantize: how the linear layers of text encoders and experts are stored, one of `quantize.KINDS`.
    """

    device: torch.device
    dtype: torch.dtype
    attention: AttentionBackend
    quantize: str = "none"


@dataclass(frozen=True, eq=False)
class Model:
    """A model in memory.

    Attributes:
        folder: what it was loaded from.
        place: where it is.
        readers_with: how each expert reads prompts with LoRAs and embeddings.
        readers: how each expert reads prompts, by its name; those that read alike have the same function.
        experts: the pool of experts; `table(timestep_at)` is the denoiser of one run.
        codec: latents to pixels and back.
        fallbacks: parts that the library's classes compute, for the picture's settings.
        adapters: the LoRAs and embeddings that `readers` has, and that are added to the experts.
        controls: the ControlNet, once a request asked for one.
    """

    folder: ModelFolder
    place: Place
    readers_with: ReadersWith
    readers: Mapping[str, Encode]
    experts: ExpertPool
    codec: LatentCodec
    fallbacks: tuple[str, ...]
    adapters: Adapters = NO_ADAPTERS
    controls: ControlNets = field(kw_only=True)


def load_model(
    folder: ModelFolder,
    *,
    dtype: str = "auto",
    device: str = "auto",
    attention: str = "auto",
    quantize: str = "none",
    texts: Mapping[Adapters, Iterable[Text]] | None = None,
) -> Model:
    """Load every part of a model.

    Args:
        folder: from `folder.open_folder`.
        dtype, device, attention, quantize: see `choose_place`.
        texts: all that will be drawn, by the LoRAs and embeddings that it is drawn with, where that is known: they are read at once, and the text
            encoders are let go before anything else is loaded.

    Raises:
        UsageError: see `choose_place`.
        UnsafeError: weights are there as pickles only.
        ModelError: weights are missing, damaged, or do not fit their config.
    """
    place = choose_place(dtype, device, attention, quantize)
    readers_with = partial(readers_of, folder, load_texts(folder, place))
    if texts is not None:
        readers_with = _having_read(readers_with, texts)
    readers = readers_with(NO_ADAPTERS)
    codec, codec_fallbacks = load_codec(folder, place)
    experts, expert_fallbacks = load_experts(folder, place)
    fallbacks, controls = (*codec_fallbacks, *expert_fallbacks), ControlNets(place.device, place.dtype)
    return Model(folder, place, readers_with, readers, experts, codec, fallbacks, controls=controls)


def texts_of(shelf: Shelf, requests: Sequence[Request]) -> dict[Adapters, list[Text]] | None:
    """What `load_model` reads at once for these requests; None where it is so much that the text encoders take less memory."""
    if len(requests) > READ_AHEAD:
        return None
    texts: dict[Adapters, list[Text]] = {}
    for request in requests:
        texts.setdefault(shelf.adapters(request.loras, request.embeddings), []).extend(request.text(part) for part in rounds(request))
    return texts


def adapted_to(model: Model, shelf: Shelf, request: Request) -> Model:
    """The model with the LoRAs and embeddings that a request names, in place of those that it has; nothing is loaded anew.

    What they leave alone is shared, and the weights that the model was loaded with stay as they are.

    Raises:
        UsageError: one of their files is not on the shelf.
    """
    adapters = shelf.adapters(request.loras, request.embeddings)
    if adapters is model.adapters:
        return model
    return replace(model, readers=model.readers_with(adapters), adapters=adapters)


def choose_place(dtype: str = "auto", device: str = "auto", attention: str = "auto", quantize: str = "none") -> Place:
    """Where and how to compute, by name.

    Args:
        dtype: "float32", "float16", "bfloat16", or "auto": float32 on a CPU, float16 elsewhere.
        device: see `choose_device`.
        attention: a name in `AttentionBackend`.
        quantize: see `quantize.check_quantize`.

    Raises:
        UsageError: a name that is not known, a device that is not there, or as `check_quantize`.
    """
    where = choose_device(device)
    if dtype != "auto" and dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype!r} is not known; use one of auto, {', '.join(DTYPES)}.")
    if attention not in [backend.value for backend in AttentionBackend]:
        raise UsageError(f"--attention {attention!r} is not known; use one of {', '.join(AttentionBackend)}.")
    number = DTYPES[dtype] if dtype != "auto" else torch.float32 if where.type == "cpu" else torch.float16
    return Place(where, number, AttentionBackend(attention), check_quantize(quantize, where))


def choose_device(name: str) -> torch.device:
    """The device of a name: "cpu", "cuda", "cuda:1", "mps", or "auto", the fastest there is.

    Raises:
        UsageError: a name that is not known, or a device that is not there.
    """
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return torch.device(next(device for device in ("cuda", "mps", "cpu") if there[device]))
    kind, colon, number = name.partition(":")
    if kind not in there or (colon and not (kind == "cuda" and number.isdecimal())):
        raise UsageError(f"--device {name!r} is not known; use one of auto, {', '.join(there)}, cuda:1.")
    if not there[kind] or (colon and int(number) >= torch.cuda.device_count()):
        raise UsageError(f"--device {name} is not there, or this PyTorch was built without it; use --device cpu, and see tu-diffuse doctor.")
    return torch.device(name)


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
    dtype, device, backend = place.dtype, place.device, place.attention

    def component(part: str) -> str:
        return part if text is None else text.parts[part]

    def clip(part: str) -> ClipPart:
        name = component(part)
        if name not in known:
            config = CLIPTextConfig.from_dict(folder.configs[name])
            projection = folder.parts[name] == "CLIPTextModelWithProjection"
            tower = without_storage(lambda: CLIPText(config, projection, backend))
            tokenizer = load_tokenizer(folder.path / component(part.replace("text_encoder", "tokenizer")))
            load_weights(tower, folder.path / name, "model", dtype, device, convert=clip_state_dict)
            known[name] = ClipPart(tokenizer, quantized(tower, place.quantize))
        return known[name]

    def t5(part: str, masked: bool) -> T5Part:
        name = component(part)
        config = T5Config.from_dict(folder.configs[name])
        encoder = without_storage(lambda: T5Encoder(config, backend))
        tokenizer = load_tokenizer(folder.path / component(part.replace("text_encoder", "tokenizer")))
        load_weights(encoder, folder.path / name, "model", dtype, device, convert=t5_state_dict)
        return T5Part(tokenizer, quantized(encoder, place.quantize), masked)

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
        case "sdxl-refiner":
            return None, clip("text_encoder_2")
        case _:
            return clip("text_encoder"), clip("text_encoder_2")


def load_conditioner(folder: ModelFolder, place: Place, name: str = "conditioner") -> Conditioner:
    """Load the join of CLIP and T5, the component `name`, without the encoders."""
    config = ConditionerConfig.from_dict(folder.configs[name])
    return load_weights(without_storage(lambda: Conditioner(config, place.attention)), folder.path / name, dtype=place.dtype, device=place.device)


def load_t5_residual(folder: ModelFolder, place: Place, name: str = "conditioner") -> T5Residual:
    """Load what adds T5 to CLIP's tokens, the component `name`, without the encoders."""
    config = T5ResidualConfig.from_dict(folder.configs[name])
    return load_weights(without_storage(lambda: T5Residual(config, place.attention)), folder.path / name, dtype=place.dtype, device=place.device)


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

    if isinstance(parts, ClipPart):
        return clip("text_encoder", parts)
    if isinstance(parts, T5Part):
        return replace(parts, model=network("text_encoder", parts.model))
    if isinstance(parts, ClipT5Part | SdT5Part):

        def load_t5() -> T5Part:
            return replace(parts.t5, model=network("text_encoder_2", parts.t5.model))

        return replace(parts, clip=clip("text_encoder", parts.clip), load_t5=load_t5, conditioner=network("conditioner", parts.conditioner))
    first, second = parts
    return None if first is None else clip("text_encoder", first), clip("text_encoder_2", second)


@torch.no_grad()
def _having_read(readers_with: ReadersWith, texts: Mapping[Adapters, Iterable[Text]]) -> ReadersWith:
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
    first, second = parts

    def encode_pair(text: Text) -> tuple[Encoded, Encoded]:
        chunks = chunk_count([text.prompt, text.negative], [tower for tower in parts if tower is not None], text.reading)

        def encode(said: str, score: float) -> Encoded:
            told = [score] if first is None else [text.height, text.width]
            prompt, size_ids = None if said == "" else said, [text.height, text.width, 0, 0, *told]
            return encode_sdxl([prompt], first, second, size_ids, 0, zero_negative, text.reading, chunks)

        return encode(text.prompt, AESTHETIC_SCORE), encode(text.negative, NEGATIVE_AESTHETIC_SCORE)

    return encode_pair


def load_codec(folder: ModelFolder, place: Place) -> tuple[LatentCodec, tuple[str, ...]]:
    """The autoencoder, and the name of the fallback where the library computes it."""
    config, dtype, device = folder.configs["vae"], place.dtype, place.device
    try:
        if folder.parts["vae"] == "AutoencoderDC":
            deep = AutoencoderDCConfig.from_dict(config)
            vae = without_storage(lambda: AutoencoderDC(deep))
        else:
            kl = AutoencoderConfig.from_dict(config)
            vae = without_storage(lambda: Autoencoder(kl, place.attention))
    except ModelError as refusal:
        from .library import library_vae  # costs seconds of imports, so only where it is needed

        return LatentCodec(library_vae(folder, dtype, device, refusal)), ("vae-by-diffusers",)
    tile_rows = TILE_ROWS if isinstance(vae, Autoencoder) else None
    return LatentCodec(load_weights(vae, folder.path / "vae", dtype=dtype, device=device, convert=modernise_keys), tile_rows), ()


def load_experts(folder: ModelFolder, place: Place, keep: Keep | None = None) -> tuple[ExpertPool, tuple[str, ...]]:
    """The experts' pool, which loads each when its turn comes; and the name of the fallback where the library computes them.

    Args:
        folder: the model.
        place: where they go.
        keep: see `ExpertPool`; None keeps all that are small.
    """
    if keep is None:
        keep = "all" if expert_bytes(folder) <= KEEP_BYTES else "active"
    prediction, timestep_at, dtype, device = folder.noise.prediction_type, folder.noise.timestep_at, place.dtype, place.device
    try:
        for entry in folder.experts:
            UNetConfig.from_dict(folder.configs[entry.subfolder])
    except ModelError as refusal:
        from .library import library_expert

        loaders = {entry.name: partial(library_expert, folder, entry, dtype, device, refusal, place.quantize) for entry in folder.experts}
        known = identities(folder.path, folder.experts)
        return ExpertPool(folder.experts, loaders, keep, known), ("unet-by-diffusers",)  # pyright: ignore[reportArgumentType]
    finish: Callable[[UNet], UNet] | None = None if place.quantize == "none" else partial(quantized, kind=place.quantize)
    return expert_pool(folder.path, folder.experts, prediction, timestep_at, dtype, device, place.attention, keep=keep, finish=finish), ()

"""From a checked model folder to networks in memory.

Networks are laid out without storage and filled from memory-mapped safetensors, so loading costs little more than reading the file once. Where an
architecture is not covered by our networks, the library's class takes its place behind the same contract (`library.py`).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from ...errors import ModelError, UsageError
from ...text_encoders.prompts import Text
from ...unet.config import UNetConfig
from ...unet.residency import ExpertPool, Finish, Keep, expert_pool, identities
from ...vae.autoencoder import Autoencoder, modernise_keys
from ...vae.autoencoder_dc import AutoencoderDC, AutoencoderDCConfig
from ...vae.codec import LatentCodec
from ...vae.config import AutoencoderConfig
from ...weights import without_storage
from ..adapters.adapters import NO_ADAPTERS, Adapters, Shelf
from ..editing.control import ControlNets
from ..request import Request, rounds
from .folder import ModelFolder, expert_bytes
from .place import Place, choose_place, filled
from .quantize import quantized
from .readers import Encode, ReadersWith, having_read, load_texts, readers_of

KEEP_BYTES = 4 * 2**30  # experts that are smaller on disk all stay in memory; of larger ones only the active and the next
READ_AHEAD = 512  # requests whose prompts are all read before anything else is loaded
TILE_ROWS = 64  # latent rows that a KL autoencoder decodes at a time: 512 pixels at once, taller pictures in strips of the same result


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
    offload: bool = False,
    texts: Mapping[Adapters, Iterable[Text]] | None = None,
) -> Model:
    """Load every part of a model.

    Args:
        folder: from `folder.open_folder`.
        dtype, device, attention, quantize, offload: see `place.choose_place`.
        texts: all that will be drawn, by the LoRAs and embeddings that it is drawn with, where that is known: they are read at once, and the text
            encoders are let go before anything else is loaded.

    Raises:
        UsageError: see `choose_place`.
        UnsafeError: weights are there as pickles only.
        ModelError: weights are missing, damaged, or do not fit their config.
    """
    place = choose_place(dtype, device, attention, quantize, offload)
    readers_with = partial(readers_of, folder, load_texts(folder, place))
    if texts is not None:
        readers_with = having_read(readers_with, texts)
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


def load_codec(folder: ModelFolder, place: Place) -> tuple[LatentCodec, tuple[str, ...]]:
    """The autoencoder, and the name of the fallback where the library computes it."""
    config = folder.configs["vae"]
    try:
        if folder.parts["vae"] == "AutoencoderDC":
            deep = AutoencoderDCConfig.from_dict(config)
            vae = without_storage(lambda: AutoencoderDC(deep))
        else:
            kl = AutoencoderConfig.from_dict(config)
            vae = without_storage(lambda: Autoencoder(kl, place.attention))
    except ModelError as refusal:
        from .library import library_vae  # costs seconds of imports, so only where it is needed

        return LatentCodec(library_vae(folder, place.dtype, place.device, refusal)), ("vae-by-diffusers",)
    tile_rows = TILE_ROWS if isinstance(vae, Autoencoder) else None
    return LatentCodec(filled(vae, folder.path / "vae", place, convert=modernise_keys, variant=folder.variant, whole=True), tile_rows), ()


def load_experts(folder: ModelFolder, place: Place, keep: Keep | None = None) -> tuple[ExpertPool, tuple[str, ...]]:
    """The experts' pool, which loads each when its turn comes; and the name of the fallback where the library computes them.

    Args:
        folder: the model.
        place: where they go.
        keep: see `ExpertPool`; None keeps all that are small.
    """
    if keep is None:
        keep = "all" if place.offload or expert_bytes(folder) <= KEEP_BYTES else "active"
    prediction, timestep_at, dtype, device = folder.noise.prediction_type, folder.noise.timestep_at, place.dtype, place.device
    try:
        for entry in folder.experts:
            UNetConfig.from_dict(folder.configs[entry.subfolder])
    except ModelError as refusal:
        if place.offload:
            raise UsageError(f"--offload is for U-Nets of ours, and diffusers computes the one of {folder.name!r}; leave it out.") from None
        from .library import library_expert

        loaders = {entry.name: partial(library_expert, folder, entry, dtype, device, refusal, place.quantize) for entry in folder.experts}
        known = identities(folder.path, folder.experts)
        return ExpertPool(folder.experts, loaders, keep, known), ("unet-by-diffusers",)  # pyright: ignore[reportArgumentType]
    finish: Finish | None = None if place.quantize == "none" else lambda unet, stored: quantized(unet, place.quantize, stored)
    where = (prediction, timestep_at, dtype, device, place.attention, folder.variant)
    return expert_pool(folder.path, folder.experts, *where, keep=keep, finish=finish, offload=place.offload), ()

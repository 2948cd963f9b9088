"""Encoded samples: what the frozen VAE and text encoders say, stored once; and training from it with neither of them in memory."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from ..attention import AttentionBackend
from ..errors import DataError, UsageError
from ..model_files import files_sha256, weight_files
from ..pipeline.model.folder import T5_ADDED, TEXT_PARTS, ModelFolder
from ..pipeline.model.loading import load_codec
from ..pipeline.model.place import DTYPES, Place
from ..pipeline.model.readers import load_conditioner, load_t5_residual, load_text
from ..shards.encoded_members import METADATA, Encoding, StoredEncoding, content_sha256, differences, read_header
from ..shards.index import ShardIndex, encoding_of
from ..shards.specs import read_range
from ..unet.experts import ExpertText
from ..vae.codec import sample_posterior
from .batches import Fitted
from .sources import Batch, Features, Join, Source, make_join, picture_source

_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "spiece.model", "tokenizer_config.json", "special_tokens_map.json")
_LEAST_STD = 1e-6  # below it a posterior is its mean: deep-compression autoencoders have 3e-7
_OF_PICTURE = ("mean", "std", "sizes")


def encoding_for(folder: ModelFolder, resolution: int, buckets: bool, dtype: str) -> Encoding:
    """How a model encodes samples; hashes the files of its frozen parts.

    Raises:
        UsageError: a dtype that is not known.
        ModelError: weights are missing.
    """
    if dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype!r} is not known; use one of {', '.join(DTYPES)}.")
    names = ["vae", *(part for part in TEXT_PARTS[folder.family] if part != "conditioner")]
    return Encoding(folder.family, {name: _part_sha256(folder, name) for name in names}, resolution, buckets, dtype)


def _part_sha256(folder: ModelFolder, name: str) -> str:
    path = folder.path / name
    if name.startswith("tokenizer"):
        return files_sha256(path / file for file in _TOKENIZER_FILES if (path / file).is_file())
    stem = "diffusion_pytorch_model" if name == "vae" else "model"
    return files_sha256([path / "config.json", *weight_files(path, stem)])


def stored_encoding(folder: ModelFolder, index: ShardIndex, resolution: int, buckets: bool) -> StoredEncoding | None:
    """How the samples of an index were encoded, which must be as this model would encode them at this resolution; None for pictures.

    Raises:
        UsageError: with all that differs, or as `encoding_of`.
        DataError: as `encoding_of`.
    """
    stored = encoding_of(index)
    if stored is not None:
        apart = differences(encoding_for(folder, resolution, buckets, stored.encoding.dtype), stored.encoding)
        if apart:
            raise UsageError(
                f"the shards were not encoded for {folder.name!r} and these options: they have {apart}; "
                "change --model, --resolution or --buckets, or encode them again."
            )
    return stored


def encoded_bucket(index: ShardIndex, number: int, sizes: Sequence[tuple[int, int]], factor: int) -> int:
    """The bucket that a sample was encoded for.

    Raises:
        UsageError: the model has no such bucket.
    """
    sample = index.samples[number]
    height, width = (factor * side for side in sample.latent)
    if (width, height) not in sizes:
        raise UsageError(f"sample {sample.key} is encoded at {width}×{height} pixels, which is no bucket of this model; encode the shards for it.")
    return list(sizes).index((width, height))


def pack_sample(encoding: Encoding, mean: Tensor, std: Tensor, fitted: Fitted, features: Features) -> bytes:
    """One sample as a safetensors file, floating-point tensors in the encoding's dtype.

    Args:
        encoding: how it was made.
        mean: (c, h, w) of its posterior, in the denoiser's scale.
        std: the same of its standard deviation; left out when it is zero for all purposes.
        fitted: its picture.
        features: as `text_features` returns them, one row; tokens that are pads by their mask are left out.

    Raises:
        DataError: a value is beyond the dtype's range.
    """
    tensors = {"mean": mean, "sizes": torch.tensor([*fitted.original, *fitted.corner], dtype=torch.int32)}
    if std.max() > _LEAST_STD:
        tensors["std"] = std
    return _pack({**tensors, **_without_pads(features)}, encoding.key, DTYPES[encoding.dtype])


def pack_encoding(encoding: Encoding, empty: Features) -> bytes:
    """The `encoding.safetensors` of a shard: how it was made, and the text features of an empty caption, one row."""
    return _pack(_without_pads(empty), encoding.to_dict(), DTYPES[encoding.dtype])


def _without_pads(features: Features) -> dict[str, Tensor]:
    counts = {name.replace("_mask", "_tokens"): int(mask.sum()) for name, mask in features.items() if name.endswith("_mask")}
    return {name: tensor[: counts.get(name)] if name in counts else tensor for name, tensor in features.items()}


def _pack(tensors: Mapping[str, Tensor], encoding: object, dtype: torch.dtype) -> bytes:
    stored = {name: (tensor.to(dtype) if tensor.is_floating_point() else tensor).cpu().contiguous() for name, tensor in tensors.items()}
    for name, tensor in stored.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise DataError(f"{name} holds values that {str(dtype).removeprefix('torch.')} cannot; use --dtype bfloat16 or float32.")
    without_hash = save(stored, {METADATA: json.dumps({"encoding": encoding})})
    digest = content_sha256(read_header(without_hash, len(without_hash)), without_hash)
    return save(stored, {METADATA: json.dumps({"encoding": encoding, "sha256": digest})})


def unpack(content: bytes) -> dict[str, Tensor]:
    """The tensors of what `pack_sample` or `pack_encoding` made: floating-point ones as float32, tokens padded with zeros as the mask says."""
    tensors = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in load(content).items()}
    for name, mask in [(name, mask) for name, mask in tensors.items() if name.endswith("_mask")]:
        tokens = tensors[name.replace("_mask", "_tokens")]
        padded = tokens.new_zeros(len(mask), *tokens.shape[1:])
        padded[: len(tokens)] = tokens
        tensors[name.replace("_mask", "_tokens")] = padded
    return tensors


@dataclass(frozen=True, eq=False)
class EncodedSource:
    """Samples of encoded shards: nothing of the model is in memory for them but the join of CLIP and T5."""

    index: ShardIndex
    join: Join
    device: torch.device

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        """See `Source`."""
        return {} if self.join.conditioner is None else {"conditioner": self.join.conditioner}

    def read(self, number: int, size: tuple[int, int], cut: torch.Generator | None) -> dict[str, Tensor]:
        """See `Source`; size and cut were decided when the sample was encoded."""
        del size, cut
        return unpack(self.index.features(number))

    def batch(self, rows: Sequence[Mapping[str, Tensor]], posteriors: Sequence[torch.Generator] | None) -> Batch:
        """See `Source`."""
        latents = torch.stack([row["mean"] for row in rows])
        if posteriors is not None and any("std" in row for row in rows):
            latents = sample_posterior(latents, torch.stack([row.get("std", torch.zeros_like(row["mean"])) for row in rows]), posteriors)
        latents = latents.to(self.device)
        features = {name: torch.stack([row[name] for row in rows]).to(self.device) for name in rows[0] if name not in _OF_PICTURE}
        sizes = torch.stack([row["sizes"] for row in rows])
        return Batch(latents, lambda drawn: self.join(features, sizes, latents, drawn))


def open_source(
    folder: ModelFolder, index: ShardIndex, stored: StoredEncoding | None, device: torch.device, text: ExpertText | None = None
) -> Source:
    """Where samples come from, with the frozen parts of the model that it needs in memory.

    Args:
        folder: the model.
        index: of shards.
        stored: how they were encoded (`stored_encoding`), None for pictures.
        device: where the parts go.
        text: of an expert that reads prompts in its own way, from pictures' captions only; None for the model's.

    Raises:
        UsageError: encoded shards for an expert that reads prompts in its own way.
        ModelError: weights that are missing or damaged.
        DataError: the shard with `stored` cannot be read any more.
    """
    place = Place(device, torch.float32, AttentionBackend.AUTO)
    if stored is not None and text is not None:
        raise UsageError(f"the shards are encoded as {folder.name!r} reads prompts, and this expert reads in its own way; give pictures.")
    if stored is None:
        return picture_source(folder, index, load_codec(folder, place)[0], load_text(folder, place, text), device)
    if folder.family == "clip-t5":
        return EncodedSource(index, make_join(folder, load_conditioner(folder, place), {}), device)
    empty = unpack(read_range(index.shards[stored.shard], stored.offset, stored.size))
    residual = load_t5_residual(folder, place) if folder.family in T5_ADDED.values() else None
    return EncodedSource(index, make_join(folder, residual, {name: tensor[None].to(device) for name, tensor in empty.items()}), device)

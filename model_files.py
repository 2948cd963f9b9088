"""Files of models, checked before they are used: JSON objects, and safetensors whose tensors are memory-mapped.

A path may lead into a single-file checkpoint as into a folder: `model.safetensors/epsilon/unet` is the U-Net in `model.safetensors`, which predicts
noise. `read_weights`, `read_headers` and `read_json` answer for such paths as for those of the model folder that the file would be.
"""

import hashlib
import math
import re
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple, NoReturn

from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import ModelError, UnsafeError, out_of_memory
from .single_file import PICKLE_SUFFIXES, SUFFIX
from .single_file.documents import documents
from .single_file.layout import Layout, Piece, layout_of
from .strict_json import parse_json

MAX_HEADER_BYTES = 16 * 2**20
MAX_JSON_BYTES = 4 * 2**20
MAX_TENSORS = 20_000
_PICKLE_STARTS = (b"PK", *(bytes((0x80, protocol)) for protocol in range(2, 6)), b"\x93NUMPY")
_SIZES = {1: "BOOL U8 I8 F8_E4M3 F8_E5M2", 2: "U16 I16 F16 BF16", 4: "U32 I32 F32", 8: "U64 I64 F64"}
_BYTES = {dtype: size for size, dtypes in _SIZES.items() for dtype in dtypes.split()}


def read_weights(folder: Path, stem: str = "diffusion_pytorch_model", variant: str | None = None) -> dict[str, Tensor]:
    """Memory-map every tensor of a folder's weight files.

    Raises:
        UnsafeError: the folder holds pickle files only.
        ModelError: missing or damaged files, or two that hold a tensor of the same name.
    """
    inner = within_single_file(folder)
    if inner is not None:
        return _read_component(inner)
    state: dict[str, Tensor] = {}
    for path in weight_files(folder, stem, variant):
        tensors = read_safetensors(path)
        twice = sorted(tensors.keys() & state.keys())
        if twice:
            raise ModelError(f"Two files in {folder} hold a tensor named {twice[0]!r}; save the model again.")
        state |= tensors
    return state


class Inner(NamedTuple):
    """A place in a single-file checkpoint.

    Attributes:
        file: the checkpoint.
        prediction: "epsilon" or "v_prediction".
        name: component, or path of a JSON file, as a model folder has them; "" for the whole.
    """

    file: Path
    prediction: str
    name: str


def within_single_file(path: Path) -> Inner | None:
    """Where a path leads that goes through a single-file checkpoint; None for any other."""
    file = next((above for above in path.parents if above.suffix == SUFFIX and above.is_file()), None)
    if file is None:
        return None
    prediction, *rest = path.relative_to(file).parts
    return Inner(file, prediction, "/".join(rest))


def single_file_layout(file: Path) -> Layout:
    """What a single-file checkpoint holds.

    Raises:
        ModelError: a damaged file, or one of no family that is known.
    """
    return layout_of(file.name, *_header(file))


def file_metadata(file: Path) -> Mapping[str, str]:
    """The metadata in a safetensors file's header.

    Raises:
        ModelError: a damaged file.
    """
    return _header(file)[1]


def _read_component(inner: Inner) -> dict[str, Tensor]:
    pieces = _pieces(inner)
    read_header(inner.file)
    try:
        with safe_open(inner.file, framework="pt", device="cpu") as file:
            return {name: _cut(file.get_tensor(piece.name), piece) for name, piece in pieces.items()}
    except (SafetensorError, OSError, RuntimeError, ValueError, TypeError, KeyError) as error:
        if out_of_memory(error):
            raise
        raise ModelError(f"{inner.file} is not a whole safetensors file ({error}); fetch or save it again.") from error


def _pieces(inner: Inner) -> Mapping[str, Piece]:
    components = single_file_layout(inner.file).components
    if inner.name not in components:
        raise ModelError(f"{inner.file} has no component {inner.name!r}; it has {', '.join(components)}.")
    return components[inner.name]


def _cut(tensor: Tensor, piece: Piece) -> Tensor:
    part = tensor if piece.rows is None else tensor[piece.rows[0] : piece.rows[1]]
    return (part.T.contiguous() if piece.transposed else part).reshape(piece.shape)


def weight_files(folder: Path, stem: str = "diffusion_pytorch_model", variant: str | None = None) -> list[Path]:
    """Find the safetensors files that hold a folder's weights: one, or the shards that its index names.

    Args:
        folder: a component folder of a model, such as `unet/`.
        stem: file name without its ending.
        variant: the part between stem and ending, such as "fp16", taken where it is there; else, and when None, the plain file or the only variant.

    Raises:
        UnsafeError: only pickle files are there.
        ModelError: nothing is there, several variants are and none of them was asked for, a shard is missing, or the index points outside the folder.
    """
    inner = within_single_file(folder)
    if inner is not None:
        return [inner.file]
    found = _names(folder, stem, chosen_variant(folder, stem, variant))
    if found is None:
        pickles = sorted(p.name for p in folder.glob("*") if is_pickle_name(p.name))
        if pickles and not list(folder.glob("*.safetensors")):
            raise UnsafeError(f"{folder / pickles[0]} is a pickle file, which can run code when loaded; convert the model to safetensors first.")
        raise ModelError(f"No {stem}.safetensors (or its .index.json) in {folder}; check the path.")
    return _shards(found) if found.suffix == ".json" else [found]


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Memory-map every tensor of one safetensors file, on the CPU.

    Raises:
        ModelError: the file is damaged, its header is larger than 16 MiB, or it holds more than 20,000 tensors.
    """
    read_header(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, RuntimeError, ValueError, TypeError, KeyError) as error:
        if out_of_memory(error):
            raise
        raise ModelError(f"{path} is not a whole safetensors file ({error}); fetch or save it again.") from error


def read_header(path: Path) -> dict[str, Any]:
    """Read what a safetensors file says of its tensors, without the tensors: name -> {dtype, shape, data_offsets}.

    Everything that is returned was checked: the tensors are of known dtypes, fit their shapes, and fill the rest of the file without gap or overlap.

    Raises:
        UnsafeError: it is a pickle under another name.
        ModelError: as `read_safetensors`.
    """
    return _header(path)[0]


def read_headers(folder: Path, stem: str = "diffusion_pytorch_model", variant: str | None = None) -> dict[str, Any]:
    """`read_header` over all files of a component; arguments and errors as for `read_weights`. Of `data_offsets` only the difference, the tensor's
    bytes, means something."""
    inner = within_single_file(folder)
    if inner is None:
        return {name: entry for path in weight_files(folder, stem, variant) for name, entry in read_header(path).items()}
    header = read_header(inner.file)
    found: dict[str, Any] = {}
    for name, piece in _pieces(inner).items():
        entry = header[piece.name]
        start, end = entry["data_offsets"]
        size = (end - start) * math.prod(piece.shape) // max(1, math.prod(entry["shape"]))
        found[name] = {"dtype": entry["dtype"], "shape": list(piece.shape), "data_offsets": [start, start + size]}
    return found


def chosen_variant(folder: Path, stem: str, variant: str | None) -> str | None:
    """The variant of a component's weights that `weight_files` takes; None for the plain ones."""
    if any(_names(folder, stem, one) is not None for one in (variant, None)):
        return variant if _names(folder, stem, variant) is not None else None
    return _only_variant(folder, stem)


def has_variant(folder: Path, variant: str) -> bool:
    """Whether a component of a model has weights of a variant."""
    stems = ("diffusion_pytorch_model", "model")
    return re.fullmatch(r"\w+", variant) is not None and any(_names(folder, stem, variant) is not None for stem in stems)


def weight_bytes(folder: Path, stem: str = "diffusion_pytorch_model", variant: str | None = None) -> int:
    """What a component's weight files take, or its share of a single file."""
    if within_single_file(folder) is not None:
        return sum(map(tensor_bytes, read_headers(folder).values()))
    return sum(path.stat().st_size for path in weight_files(folder, stem, variant))


def tensor_bytes(entry: Mapping[str, Any]) -> int:
    """What a tensor takes in its file, from its entry in the header."""
    start, end = entry["data_offsets"]
    return end - start


def _header(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a safetensors file says of its tensors, and its metadata."""
    if not path.is_file():
        raise ModelError(f"{path} is not a file; a safetensors file was wanted.")
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
                _not_safetensors(path, prefix, f"its header claims {length} bytes, more than {MAX_HEADER_BYTES} or the file's own length")
            header = parse_json(file.read(length))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} has no readable safetensors header ({error}); fetch or save it again.") from error
    if not isinstance(header, dict):
        raise ModelError(f"{path} has no readable safetensors header (not a JSON object); fetch or save it again.")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ModelError(f"{path} has no readable safetensors header (its __metadata__ is no table of texts); fetch or save it again.")
    if len(header) > MAX_TENSORS:
        raise ModelError(f"{path} claims {len(header)} tensors, more than the {MAX_TENSORS} that are allowed.")
    spans = sorted(_span(path, name, tensor) for name, tensor in header.items())
    if [0, *(end for _, end in spans)] != [*(begin for begin, _ in spans), size - 8 - length]:
        raise ModelError(f"{path} is not a whole safetensors file: its tensors do not fill it without gap or overlap; fetch or save it again.")
    return header, metadata


def _not_safetensors(path: Path, prefix: bytes, why: str) -> NoReturn:
    if prefix.startswith(_PICKLE_STARTS):
        raise UnsafeError(f"{path} looks like a pickle, which can run code when loaded; convert it to safetensors first.")
    raise ModelError(f"{path} is not a safetensors file: {why}.")


def _span(path: Path, name: str, tensor: object) -> tuple[int, int]:
    """Where a tensor lies among the file's tensors: (begin, end)."""
    match tensor:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(begin), int(end)]} if (
            dtype in _BYTES and len(shape) <= 16 and len(name) <= 1000
        ):
            if all(type(side) is int and side >= 0 for side in shape) and begin >= 0 and end - begin == math.prod(shape) * _BYTES[dtype]:
                return begin, end
        case _:
            pass
    raise ModelError(f"{path} describes its tensor {name!r:.100} as {tensor!r:.200}, which cannot be; fetch or save it again.")


def weights_sha256(folder: Path, stem: str = "diffusion_pytorch_model", variant: str | None = None) -> str:
    """SHA-256 over a folder's weight files, shards one after the other in the order of their names; 64 hex digits.

    Raises:
        ModelError, UnsafeError: as `weight_files`.
    """
    return files_sha256(weight_files(folder, stem, variant))


def files_sha256(paths: Iterable[Path]) -> str:
    """SHA-256 over files, one after the other as given; 64 hex digits."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    return digest.hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file of at most 4 MiB; see `parse_json`.

    Raises:
        ModelError: there is no such file, or it holds something else.
    """
    inner = within_single_file(path)
    if inner is not None:
        files = documents(single_file_layout(inner.file), inner.prediction)
        if inner.name not in files:
            raise ModelError(f"{inner.file} has no {inner.name!r} as a model folder; it has {', '.join(files)}.")
        return files[inner.name]
    if not path.is_file():
        raise ModelError(f"{path} is not there, or no file; fetch the model again.")
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise ModelError(f"{path} is {size} bytes long, more than the {MAX_JSON_BYTES} that a JSON file of a model may have.")
        value = parse_json(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} could not be read as JSON ({error}); check the model folder.") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds a {type(value).__name__}, a JSON object was wanted; check the model folder.")
    return value


def is_pickle_name(name: str) -> bool:
    """Whether a file's name says that it is a pickle."""
    return name.lower().endswith(PICKLE_SUFFIXES)


def inside(folder: Path, name: object) -> Path:
    """Join a relative name that came with a model to its folder.

    Raises:
        ModelError: the name is no text, empty, absolute, or climbs out of the folder.
    """
    if isinstance(name, str) and name and "\0" not in name:
        parts = PurePosixPath(name).parts
        windows = PureWindowsPath(name)
        if "\\" not in name and not windows.drive and not PurePosixPath(name).is_absolute() and ".." not in parts and parts:
            return folder / name
    raise ModelError(f"{folder} names a file {name!r:.100}, which may not leave the model folder; write a plain relative name.")


def _names(folder: Path, stem: str, variant: str | None) -> Path | None:
    dotted = "" if variant is None else f".{variant}"
    candidates = (f"{stem}{dotted}.safetensors", f"{stem}.safetensors.index{dotted}.json", f"{stem}{dotted}.safetensors.index.json")
    return next((folder / name for name in candidates if (folder / name).is_file()), None)


def _only_variant(folder: Path, stem: str) -> str | None:
    patterns = (rf"{re.escape(stem)}\.(\w+)\.safetensors", rf"{re.escape(stem)}\.safetensors\.index\.(\w+)\.json")
    matches = [match for p in folder.glob(f"{stem}.*") for pattern in patterns if (match := re.fullmatch(pattern, p.name))]
    variants = sorted({match.group(1) for match in matches})
    if len(variants) > 1:
        raise ModelError(f"{folder} holds only variants of its weights ({', '.join(variants)}); choose with --variant, or keep one of them.")
    return variants[0] if variants else None


def _shards(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or len(weight_map) > MAX_TENSORS:
        raise ModelError(f"{index} has no usable weight_map (tensor name -> file name, at most {MAX_TENSORS}); save the model again.")
    placed_there: dict[str, set[str]] = {}
    for tensor, file in weight_map.items():
        inside(index.parent, file)
        placed_there.setdefault(file, set()).add(tensor)
    for name, tensors in sorted(placed_there.items()):
        path = index.parent / name
        if is_pickle_name(name):
            raise UnsafeError(f"{index} names the pickle file {name!r:.100}, which can run code when loaded; convert the model to safetensors first.")
        if not path.is_file():
            raise ModelError(f"{index} names {name!r:.100}, which is not there; fetch the model again.")
        absent = tensors - set(read_header(path))
        if absent:
            raise ModelError(f"{path} lacks {listed(sorted(absent))}, which {index.name} places there; fetch the model again.")
    return [index.parent / name for name in sorted(placed_there)]


def listed(names: Iterable[str]) -> str:
    """The first five of some names, each cut to 100 characters, as a message shows them."""
    shown = [f"{name:.100}" for name in names]
    return ", ".join(shown[:5]) + (", …" if len(shown) > 5 else "")

"""Mutations of the files of a model: what a damaged download, a careless editor or an attacker makes of them. Random by its seed."""

import copy
import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from safety_scenes import put

ODD: list[Any] = [None, True, False, 0, 1, -1, 2, 3, 7, 2**31, 2**63, 2**64, 10**9, 10**18, -(2**63), 10**30, 0.5, -0.0, 1e-300, 1e308]
ODD += [
    math.nan,
    math.inf,
    -math.inf,
    "",
    "x",
    "silu",
    "../x",
    "/etc/passwd",
    "\0",
    "é" * 100,
    "[" * 50,
    "7",
    [],
    [0],
    [1] * 9,
    [10**9],
    [[]],
    [None],
]
ODD += [["a"] * 5, [1.5, -1], {}, {"a": 1}, {"content": 5}, {"type": "Sequence"}, [-1], [2**63, 1], list(range(300))]

DTYPES = ("F64", "F16", "BF16", "I64", "BOOL", "F8_E5M2", "F4", "C64", "F32 ", "float32", "", None, 32, ["F32"], "X" * 1000)
SHAPES = ([], [0], [-1], [2**32, 2**32], [2**63], [1] * 70, [1.5], ["1"], None, 5)


def _places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value in a JSON document."""
    found: list[tuple[Any, Any]] = []
    keys = list(value) if isinstance(value, dict) else range(min(len(value), 8)) if isinstance(value, list) else ()
    for key in keys:
        found += [(value, key), *_places(value[key])]
    return found


def json_mutation(data: bytes, random: Random) -> bytes:
    """One to three values of a document become odd, are removed, renamed or doubled; or its text is damaged."""
    try:
        document = json.loads(data)
    except ValueError:  # mutated before
        return damaged(data, random)
    if random.random() < 0.15:
        return damaged(data, random)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        places = _places(document)
        if not places:
            break
        top = [place for place in places if place[0] is document]
        container, key = random.choice(top if random.random() < 0.5 else places)
        match random.randrange(8):
            case 0:
                del container[key]
            case 1 if isinstance(container, dict):
                container[str(key) + random.choice(("_", "2", "\0"))] = container.pop(key)
            case 2 if isinstance(container, list):
                container.extend([container[key]] * random.choice((1, 3, 300)))
            case 3 if isinstance(container[key], int | float) and not isinstance(container[key], bool):
                container[key] = container[key] * random.choice((-1, 0, 2, 3, 1000, 10**6, 10**12))
            case 4:
                deep: Any = []
                for _ in range(random.choice((5, 40, 300))):
                    deep = [deep]
                container[key] = deep
            case _:
                container[key] = copy.deepcopy(random.choice(ODD))
    return json.dumps(document).encode()


def damaged(data: bytes, random: Random) -> bytes:
    """Bytes flipped, cut, doubled, or replaced."""
    if not data:
        return b"\xff"
    match random.randrange(8):
        case 0:
            return data[: random.randrange(len(data))]
        case 1:
            return b""
        case 2:
            return b"[" * random.choice((10, 1000, 100_000, 2_000_000))
        case 3:
            return b'{"a":' * 50_000 + b"1" + b"}" * 50_000
        case 4:
            return data.replace(b'"', b"'", 1) + b"\xff"
        case 5:
            return b"{" + b'"a": [[]], ' * 100_000 + b'"b": 1}'
        case 6:
            return data.replace(b": ", b": 9" + b"9" * 5000, 1)
        case _:
            changed = bytearray(data)
            for _ in range(random.choice((1, 4, 32))):
                changed[random.randrange(len(changed))] ^= 1 << random.randrange(8)
            return bytes(changed)


def safetensors_mutation(data: bytes, random: Random) -> bytes:
    """The header's length, or one of its entries, or its bytes, or those of the tensors, become something else."""
    length = struct.unpack("<Q", data[:8])[0] if len(data) > 8 else 0
    if not 2 <= length < len(data):  # mutated before
        return damaged(data, random)
    header, tensors = data[8 : 8 + length], data[8 + length :]
    kind = random.randrange(10)
    if kind == 0:
        claimed = random.choice((0, 1, 2, length - 1, length + 1, len(data), 100_000_000, 2**31, 2**32, 2**62, 2**63, 2**64 - 1))
        return struct.pack("<Q", claimed) + header + tensors
    if kind == 1:
        return damaged(data, random)
    if kind == 2:
        return data[: random.randrange(len(data))]
    if kind == 3:
        return data + bytes(random.choice((1, 8, 4096)))
    if kind == 4:
        spot = random.randrange(max(1, len(tensors) - 4))
        tensors = tensors[:spot] + random.choice((b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\xff" * 4)) + tensors[spot + 4 :]  # NaN, infinity
        return data[: 8 + length] + tensors[: len(data) - 8 - length]
    try:
        content: dict[str, Any] = json.loads(header)
        names = [name for name in content if name != "__metadata__" and len(content[name]["data_offsets"]) == 2]
    except (ValueError, TypeError, KeyError, AttributeError):  # mutated before
        return damaged(data, random)
    entry = content[random.choice(names)]
    begin, end = entry["data_offsets"]
    size = len(tensors)
    odd = random.choice((0, begin, end, end - 1, end + 1, size, size + 1, 2 * size, -1, 2**63, 2**64, 1.0, "0", None))
    match kind:
        case 5:
            entry["data_offsets"] = random.choice(([begin, odd], [odd, end], [end, begin], [], [0], [0, end, 1], "x", None))
        case 6:
            entry["shape"] = random.choice((*SHAPES, [end - begin], entry["shape"][::-1]))
        case 7:
            entry["dtype"] = random.choice(DTYPES)
        case 8:
            name = random.choice(names)
            content[random.choice(("x", "", "../x", "a" * 100_000, "__metadata__", name + ".weight", "\0", "é"))] = content.pop(name)
        case _:
            first = json.dumps(random.choice(names))
            text = json.dumps(content)[:-1] + f", {first}: " + json.dumps(random.choice((entry, {}, None, []))) + "}"  # the same name twice
            return struct.pack("<Q", len(text.encode())) + text.encode() + tensors
    text = json.dumps(content).encode()
    return struct.pack("<Q", len(text)) + text + tensors


def mutated(folder: Path, random: Random) -> str:
    """Mutate one file of a model folder; its name."""
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".json", ".txt", ".model", ".safetensors") and path.is_file())
    weights = [path for path in files if path.suffix == ".safetensors"]
    others = [path for path in files if path.suffix != ".safetensors"]
    path = random.choice(weights if random.random() < 0.3 else others)
    change: Callable[[bytes, Random], bytes] = {".safetensors": safetensors_mutation, ".json": json_mutation}.get(path.suffix, damaged)
    put(path, change(path.read_bytes(), random))
    return path.relative_to(folder).as_posix()

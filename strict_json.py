"""JSON that came from somewhere else (model folders, headers of weight files, pictures), parsed in bounded memory. Imports no torch."""

import json
from collections import Counter
from typing import Any

MAX_CONTAINERS = 200_000
MAX_DEPTH = 32
MAX_DIGITS = 40  # transformers writes 10^30 for "no limit"


def parse_json(data: bytes) -> Any:
    """Parse JSON in UTF-8 that came from somewhere else, in memory of a few times its length.

    Raises:
        ValueError, RecursionError: not JSON, a name twice in one object, a number of more than 40 digits, more than 200,000 lists and objects, or
            more than 32 of them in each other.
    """
    if data.count(b"[") + data.count(b"{") > MAX_CONTAINERS:
        raise ValueError(f"more than {MAX_CONTAINERS} lists and objects")
    value = json.loads(data.decode("utf-8"), object_pairs_hook=_object, parse_int=_whole)
    level = [value]
    for _ in range(MAX_DEPTH):
        inner = (child for one in level for child in (one.values() if isinstance(one, dict) else one if isinstance(one, list) else ()))
        level = [child for child in inner if isinstance(child, dict | list)]
        if not level:
            return value
    raise ValueError(f"lists and objects more than {MAX_DEPTH} deep in each other")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError(f"{Counter(name for name, _ in pairs).most_common(1)[0][0]!r:.100} twice in one object")
    return value


def _whole(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)

"""Every kind of hostile fixture with its count, as the table of docs/safety.md. Run as a script, it prints the table."""

import tempfile
from collections import Counter
from pathlib import Path

import hostile_controls as controls
import live_pickles
from hostile_files import CONFIGS, CONTENTS, HEADERS
from hostile_folders import CODE, NAMED
from hostile_pictures import FILES
from pickle_places import PLACES
from safety_scenes import EVERY


def table() -> str:
    """The table, in Markdown."""
    with tempfile.TemporaryDirectory() as folder:
        pickles = list(live_pickles.fixtures(Path(folder)))
    steering = (controls.PICKLES, controls.CODE, controls.NAMED, controls.HEAD, controls.CLAIMS, controls.CONTENTS)
    rows = [
        ("live pickles: what they call (os.system, exec, subprocess, functools.partial, ctypes, numpy, torch, …)", _count(pickles, "gadget ")),
        ("live pickles: opcodes (GLOBAL, INST, OBJ, STACK_GLOBAL, BUILD with `__setstate__`, protocols 0 to 5, …)", _count(pickles, "opcodes: ")),
        ("live pickles: containers (torch zip, legacy and tar; .npy, .npz; gzip, bz2, lzma, zlib)", _count(pickles, "container: ")),
        ("places for a pickle", len(PLACES)),
        ("pairs of a place and a command that reads it", sum(len(place.commands) for place in PLACES.values())),
        ("commands", len(EVERY)),
        ("code in a model folder, links out of it, classes that are not on the list: " + _named(CODE), len(CODE)),
        ("names that lead out of the folder: " + _named(NAMED), len(NAMED)),
        ("headers of safetensors files", len(HEADERS)),
        ("values in configs: " + _named(CONFIGS), len(CONFIGS)),
        ("weights that do not fit, NaN, infinity: " + _named(CONTENTS), len(CONTENTS)),
        (
            "ControlNets and depth models: places for a pickle {}, code and classes that are not on the list {}, names {}, headers {}, values in "
            "configs {}, weights that do not fit {}".format(*map(len, steering)),
            sum(map(len, steering)),
        ),
        ("picture files: bombs, damage, other formats, settings that are no settings", len(FILES)),
    ]
    return "\n".join(["| fixtures | count |", "|---|---|", *(f"| {what} | {count} |" for what, count in rows)])


def _count(names: list[str], prefix: str) -> int:
    return sum(name.startswith(prefix) for name in names)


def _named(fixtures: dict[str, object]) -> str:
    """The kinds of fixtures, by what stands before the first colon of their names, with counts."""
    kinds = Counter("file" if name.startswith("file ") else name.partition(":")[0] for name in fixtures)
    return ", ".join(f"{kind} {count}" for kind, count in kinds.items())


if __name__ == "__main__":
    print(table())

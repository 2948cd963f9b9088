"""Draw every picture that the tests made again from what its file carries: `tu-diffuse info` must read it, `tu-diffuse replay` must find it equal.

    pytest --basetemp DIR                                        # DIR keeps what the tests leave; the long proofs are not needed
    python scripts/prove_tests_replay.py DIR [--out FILE]

Takes all PNG, JPEG and WebP files below DIR that carry settings of this program, one of those that are equal byte for byte; finds model, LoRAs,
embeddings, ControlNet and input pictures among DIR's files by their hashes, and names them as a person would. Prints what became of them, with the
test that left each picture which is not equal: some tests change pictures or models on purpose. `--out` keeps the list.
"""

import argparse
import contextlib
import hashlib
import io
import itertools
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tu_diffuse.cli.main import run
from tu_diffuse.errors import TuDiffuseError
from tu_diffuse.pipeline.adapters.lora_files import find_lora, lora_sha256
from tu_diffuse.pipeline.editing.control import checked_network
from tu_diffuse.pipeline.editing.depth import checked_estimator
from tu_diffuse.pipeline.metadata import read_metadata
from tu_diffuse.pipeline.model.folder import ModelFolder, open_folder

PICTURES = {".png", ".jpg", ".jpeg", ".webp"}


@dataclass
class Found:
    """What lies below the folder, by hash."""

    pictures: list[tuple[Path, dict[str, Any]]] = field(default_factory=list)
    models: dict[str, list[Path]] = field(default_factory=dict)
    adapters: dict[str, Path] = field(default_factory=dict)
    inputs: dict[str, Path] = field(default_factory=dict)
    networks: list[Path] = field(default_factory=list)  # folders of ControlNets and depth models


def look_through(root: Path) -> Found:
    """Index a folder."""
    found, seen = Found(), set[str]()
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        if path.suffix.lower() in PICTURES:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            found.inputs.setdefault(digest, path)
            if digest not in seen:
                seen.add(digest)
                with contextlib.suppress(TuDiffuseError, OSError):
                    settings = read_metadata(path)
                    if "software" in settings:
                        found.pictures.append((path, settings))
        elif path.name in ("model_index.json", "experts.json") or (path.suffix == ".safetensors" and path.parent.name not in ("unet", "vae")):
            model = path if path.suffix == ".safetensors" else path.parent
            variants = (
                {None}
                if model.is_file()
                else {None, *(parts[1] for file in model.glob("*/*.safetensors") if len(parts := file.name.split(".")) == 3)}
            )
            predictions = (None, "v_prediction", "epsilon") if model.is_file() else (None,)
            for prediction, variant in itertools.product(predictions, variants):
                with contextlib.suppress(TuDiffuseError, OSError, ValueError):
                    listed = found.models.setdefault(open_folder(model, prediction, variant).fingerprint, [])
                    listed.extend([] if model in listed else [model])
            if path.suffix == ".safetensors":
                with contextlib.suppress(TuDiffuseError, OSError, ValueError):
                    found.adapters.setdefault(lora_sha256(find_lora(path)), path)
        elif path.name == "config.json" and re.search("ControlNet|DepthEstimation", path.read_text(errors="replace")[:4000]):
            found.networks.append(path.parent)
    return found


def told(*arguments: str) -> tuple[int, dict[str, Any], str]:
    """Run a command with --json: exit code, its last line, its sentence of an error."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run([*arguments, "--json"])
    lines = out.getvalue().splitlines()
    return code, json.loads(lines[-1]) if lines else {}, err.getvalue().strip()


def needed(found: Found, settings: dict[str, Any]) -> Iterator[str]:
    """Options of `replay` for what the picture was made from."""
    for one in settings.get("loras", []):
        if (path := found.adapters.get(one["hash"])) is not None:
            yield f"--lora={path}"
    for one in settings.get("embeddings", []):
        if (path := found.adapters.get(one["hash"])) is not None:
            yield f"--embedding={path}"
    text = json.dumps([settings.get("edit"), settings.get("control")])
    yield from (f"--input={found.inputs[digest]}" for digest in set(re.findall(r"[0-9a-f]{64}", text)) & found.inputs.keys())


def steering(found: Found, folder: ModelFolder, settings: dict[str, Any]) -> Iterator[str]:
    """Options of `replay` for the ControlNet and the depth model."""
    control = settings.get("control", {})
    wanted = {control.get("sha256"), control.get("model", {}).get("sha256") if isinstance(control.get("model"), dict) else None}
    estimator = (control.get("estimator") or {}).get("sha256")
    for network in found.networks if control else []:
        with contextlib.suppress(TuDiffuseError, OSError, ValueError):
            if estimator is not None and checked_estimator(network).sha256 == estimator:
                yield f"--control-depth-model={network}"
                estimator = None
                continue
        with contextlib.suppress(TuDiffuseError, OSError, ValueError):
            if wanted and checked_network(folder, network).sha256 in wanted:
                yield f"--control-model={network}"
                wanted = set()


def again(found: Found, path: Path, settings: dict[str, Any]) -> str:
    """What became of a picture: "equal", "within rounding, drawn without its company", or the reason."""
    code, line, said = told("info", str(path))
    if code != 0:
        return f"info: {said}"
    recorded = settings.get("model", {})
    models = found.models.get(str(recorded.get("hash")), []) if isinstance(recorded, dict) else []
    embedded = open_folder(None)
    tries = [[]] if recorded.get("hash") == embedded.fingerprint else [[f"--model={model}"] for model in models]
    if not tries:
        return "the model is gone, or was changed after it"
    reason = ""
    for model in tries:
        try:
            folder = open_folder(Path(model[0].removeprefix("--model=")), variant=recorded.get("variant")) if model else embedded
        except TuDiffuseError as error:  # such as a folder with the same weights, but as a variant
            reason = str(error)
            continue
        code, line, said = told("replay", str(path), *model, *steering(found, folder, settings), *needed(found, settings))
        if code == 0:
            return "equal" if line["equal"] else "within rounding, drawn without its company"
        reason = said.removeprefix("tu-diffuse: ") or f"different by {line.get('largest_difference')} of 255"
    return reason


def main() -> None:
    """Look through, replay, tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--after", type=int, default=0, help="leave out so many pictures, of an interrupted run")
    parser.add_argument("--out", type=Path, help="file for a line for each picture")
    options = parser.parse_args()
    found = look_through(options.folder)
    print(f"{len(found.pictures)} different pictures, {sum(map(len, found.models.values()))} models", flush=True)
    became, lines = Counter[str](), list[str]()
    for number, (path, settings) in list(enumerate(found.pictures))[options.after :]:
        what = again(found, path, settings)
        became[what] += 1
        lines.append(f"{path.relative_to(options.folder)}\t{what}")
        if not what.startswith(("equal", "within")):
            print(lines[-1], flush=True)
        if number % 100 == 99:
            print(f"{number + 1} of {len(found.pictures)}", file=sys.stderr, flush=True)
    if options.out is not None:
        options.out.write_text("\n".join(lines) + "\n")
    for what, times in became.most_common():
        print(f"{times:6} {what}")


if __name__ == "__main__":
    main()

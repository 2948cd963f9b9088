"""Draw pictures with the embedded model over all samplers, then replay each from its file: every one has to be equal.

    python scripts/prove_replay.py --count 50

Also draws one prompt at --count 1, 2 and 4 and compares the picture of the same seed.
"""

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from tu_diffuse.schedulers.registry import SAMPLERS

PROMPTS = ("a red circle", "a small blue star on the left", "a green heart above an orange square", "a yellow ring on a dark blue background")
FORMATS = ("png", "jpeg", "webp")


def run(*arguments: str) -> list[dict[str, object]]:
    """Run tu-diffuse with --json; its lines."""
    done = subprocess.run(["tu-diffuse", *arguments, "--json"], capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1):
        raise SystemExit(done.stderr)
    return [json.loads(line) for line in done.stdout.splitlines()]


def main() -> None:
    """Draw, replay, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=50)
    options = parser.parse_args()
    samplers = tuple(SAMPLERS)
    equal = 0
    with tempfile.TemporaryDirectory() as folder:
        for i in range(options.count):
            sampler = samplers[i % len(samplers)]
            [drawn] = run("generate", PROMPTS[i % len(PROMPTS)], "--sampler", sampler, "--seed", str(i), "--steps", "12", "--out", folder)
            [replayed] = run("replay", str(drawn["path"]))
            equal += replayed["equal"] is True
        print(f"replay: {equal} of {options.count} equal, over {len(samplers)} samplers")
        pictures: dict[int, np.ndarray] = {}
        for count in (1, 2, 4):
            drawn = run("generate", PROMPTS[2], "--seed", "5", "--count", str(count), "--out", str(Path(folder) / str(count)))
            with Image.open(str(drawn[0]["path"])) as picture:
                pictures[count] = np.asarray(picture.convert("RGB")).astype(int)
        for count in (2, 4):
            print(f"--count {count} against 1: largest difference {np.abs(pictures[count] - pictures[1]).max()} of 255")
    if equal < options.count:
        raise SystemExit(1)


if __name__ == "__main__":
    main()

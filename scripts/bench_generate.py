"""Time a picture from shell to file: `tu-diffuse generate` with the embedded model, as whole processes.

    python scripts/bench_generate.py --runs 5

Prints the minimum, median and maximum of the wall time and of the processor time in seconds, after one warm-up run.
"""

import argparse
import resource
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

PROMPT = "a red apple to the left of a blue star"


def one_run(folder: Path, number: int) -> tuple[float, float]:
    """Draw one picture; wall and processor seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    out = folder / f"{number}.png"
    subprocess.run(["tu-diffuse", "generate", PROMPT, "--seed", "1", "--out", str(out)], check=True, capture_output=True)
    wall = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert out.stat().st_size > 0
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        one_run(Path(folder), 0)
        times = [one_run(Path(folder), number) for number in range(1, options.runs + 1)]
    for name, values in zip(("wall", "processor"), zip(*times, strict=True), strict=True):
        print(f"{name}: {min(values):.2f} / {statistics.median(values):.2f} / {max(values):.2f} s (minimum / median / maximum of {options.runs})")


if __name__ == "__main__":
    main()

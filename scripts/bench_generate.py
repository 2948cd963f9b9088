"""Time whole processes with the embedded model: a picture from shell to file (`tu-diffuse generate`), and `tu-diffuse generate --help`.

    python scripts/bench_generate.py --runs 5

Prints the minimum, median and maximum of the wall time and of the processor time in seconds, each after one warm-up run.
"""

import argparse
import resource
import statistics
import subprocess
import tempfile
import time

PROMPT = "a red apple to the left of a blue star"


def one_run(*arguments: str) -> tuple[float, float]:
    """Run `tu-diffuse generate` once; wall and processor seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    subprocess.run(["tu-diffuse", "generate", *arguments], check=True, capture_output=True)
    wall = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for what, arguments in (("picture", [PROMPT, "--seed", "1", "--out", f"{folder}/"]), ("--help", ["--help"])):
            one_run(*arguments)
            times = [one_run(*arguments) for _ in range(options.runs)]
            for name, values in zip(("wall", "processor"), zip(*times, strict=True), strict=True):
                print(f"{what}, {name}: {min(values):.2f} / {statistics.median(values):.2f} / {max(values):.2f} s (minimum / median / maximum)")


if __name__ == "__main__":
    main()

"""How the benchmarks tell of contenders that ran in turn."""

import statistics
from collections.abc import Mapping, Sequence


def spread(ratios: Sequence[float]) -> str:
    """Median (lowest to highest)."""
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def report(seconds: Mapping[str, Sequence[float]], memory: Mapping[str, float], own: str = "ours") -> None:
    """Print each contender's seconds, the ratio to `own` in the same round with its range, and its highest memory in MB."""
    for name, values in seconds.items():
        ratios = [value / mine for value, mine in zip(values, seconds[own], strict=True)]
        times = f"{min(values):.1f} / {statistics.median(values):.1f} / {max(values):.1f} s"
        print(f"{name}: {times} (minimum / median / maximum), {spread(ratios)} times {own}, {memory[name]:.0f} MB")

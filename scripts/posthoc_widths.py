"""Which widths of average a number of evenly spaced snapshots reproduces: the table in docs/fine-tuning.md.

python scripts/posthoc_widths.py
"""

from tu_diffuse.training.posthoc import WIDTHS, Profile, shares_of

STEPS = 6400


def widths_within(snapshots: int, distance: float) -> tuple[float, float]:
    """The least and the greatest multiple of 0.005 whose profile is reproduced within a relative distance."""
    stored = [Profile(STEPS * number // snapshots, width) for number in range(1, snapshots + 1) for width in WIDTHS]
    fits = [width for width in (number / 200 for number in range(1, 58)) if shares_of(stored, Profile(STEPS, width))[1] <= distance]
    return min(fits), max(fits)


if __name__ == "__main__":
    print("| snapshots, evenly spaced | within 1% | within 10% |\n|---|---|---|")
    for snapshots in (4, 8, 16, 32):
        cells = ("{:g} to {:g}".format(*widths_within(snapshots, distance)) for distance in (0.01, 0.1))
        print("|", snapshots, *(f"| {cell}" for cell in cells), "|")

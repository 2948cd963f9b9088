"""How often the embedded CLIP pair prefers the caption of a true render to one with colours exchanged, or relation or place mirrored.

    python scripts/embedded/judge_clip.py --count 600

Held-out scenes only; a guess has 50%. Under a minute on one core.
"""

import argparse
import random

import torch
from tu_diffuse.batch.scores import load_scorer, open_score_model
from world import STAGES, captions, render, sample_scene, swap


def main() -> None:
    """Judge and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=600, help="scenes of each stage")
    options = parser.parse_args()
    score, rng = load_scorer(open_score_model(None), torch.device("cpu")).score, random.Random(0)
    for stage in ("shapes", "stickers"):
        right = 0
        for _ in range(options.count):
            scene = sample_scene(rng, STAGES[stage], held_out=True)
            picture = torch.from_numpy(render(scene).copy())
            said, exchanged = (score([picture], captions(one, rng, loose=0))[0] for one in (scene, swap(scene, rng)))
            right += said > exchanged
        print(f"{stage}: {right} of {options.count}, {right / options.count:.0%}")


if __name__ == "__main__":
    main()

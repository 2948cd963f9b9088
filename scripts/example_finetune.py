"""The README's fine-tune example, and what it does to the model: teach the embedded model a flag, which it has never seen, and draw before and after.

    python scripts/example_finetune.py --out build/flag

runs the commands of the README (shards of a world with flags, `tu-diffuse shards encode`, `tu-diffuse finetune`), draws the same prompts and seeds
with both models into sheet.jpg, and prints how often both draw what prompts say: flags, by the oracle of `scripts/embedded`, and the held-out
prompts of old. About 0.7 s a picture on one core, four times --count pictures.
"""

import argparse
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).parent / "embedded"))

from evaluate import draw
from oracle import CATEGORIES, Prompt, evaluation_prompts, judge, score
from tu_diffuse.pipeline.model.folder import open_folder
from tu_diffuse.pipeline.model.loading import load_model
from world import FLAG, SIDE, STAGES, Picture, all_captions, sample_scene

TRAINING = "--steps 460 --batch-size 16 --lora 32 --lr 2.5e-3 --warmup 40 --cooldown 230 --precision bfloat16"
SHOWN = (
    "a flag on the right on a beach",
    "a big flag on a gray background",
    "a flag in the bottom left corner on a meadow",
    "a flag to the left of a purple square on a white background",
    "a red star on a light blue background",
    "a blue circle to the left of a green heart on a beige background",
)
CAPTION = 30  # px over each picture of the sheet


def flag_prompts(count: int) -> list[Prompt]:
    """Prompts with a flag, alone or beside a shape, of scenes drawn anew."""
    rng = random.Random("flags to be drawn")
    prompts: list[Prompt] = []
    while len(prompts) < count:
        scene = sample_scene(rng, STAGES["flag"])
        if any(thing.kind == FLAG for thing in scene.objects):
            prompts.append(Prompt("flag", rng.choice(all_captions(scene)), scene, background_said=True))
    return prompts


def adherence(pictures: list[Picture], prompts: list[Prompt]) -> float:
    """Share of the pictures, in [0, 1], that have the objects, colours, places and relations that their prompts name."""
    judged = [judge(picture, prompt.scene, stickers=(FLAG,)) for picture, prompt in zip(pictures, prompts, strict=True)]
    return sum(one.binding_ok and one.position_ok and one.relation_ok for one in judged) / len(judged)


def sheet(rows: dict[str, list[Picture]]) -> Image.Image:
    """The pictures of SHOWN, one row for each model."""
    page = Image.new("RGB", (len(SHOWN) * (SIDE + 4), len(rows) * (SIDE + 4) + CAPTION), "white")
    pen = ImageDraw.Draw(page)
    for column, text in enumerate(SHOWN):
        pen.multiline_text((column * (SIDE + 4), 1), "\n".join(text[k : k + 25] for k in range(0, 75, 25)), fill="black", font_size=9, spacing=0)
    for row, pictures in enumerate(rows.values()):
        for column, picture in enumerate(pictures):
            page.paste(Image.fromarray(picture), (column * (SIDE + 4), CAPTION + row * (SIDE + 4)))
    return page


def main() -> None:
    """Make shards, train, draw, score."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the shards, the run and the results")
    parser.add_argument("--count", type=int, default=200, help="prompts of each kind that are scored")
    parser.add_argument("--samples", type=int, default=1000, help="pictures in the shards")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--training", default=TRAINING, help="options of `tu-diffuse finetune`")
    options = parser.parse_args()
    shards, encoded, run = (options.out / name for name in ("shards", "encoded", "run"))
    program = [sys.executable, str(Path(__file__).parent / "embedded" / "write_shards.py")]
    subprocess.run(
        [*program, *["--stage", "flag", "--count", str(options.samples), "--seed", "5", "--encode-format", "png", "--out"], str(shards)], check=True
    )
    started = time.monotonic()
    command = [sys.executable, "-m", "tu_diffuse"]
    subprocess.run([*command, "shards", "encode", f"{shards}/*.tar", "--out", str(encoded)], check=True)
    between = time.monotonic()
    training = [*options.training.split(), "--threads", str(options.threads)]
    subprocess.run([*command, "finetune", "--shards", f"{encoded}/*.tar", "--out", str(run), *training], check=True)
    print(f"encoding took {between - started:.0f} s, training {time.monotonic() - between:.0f} s", flush=True)

    torch.set_num_threads(options.threads)
    old, new = evaluation_prompts(options.count, stage="shapes"), flag_prompts(options.count)
    rows: dict[str, list[Picture]] = {}
    table: dict[str, dict[str, float]] = {}
    for name, folder in (("before", None), ("after", run / "model")):
        model = load_model(open_folder(folder))
        rows[name] = [draw(model, text, [1], None, None)[0] for text in SHOWN]
        flags = [draw(model, prompt.text, [seed], None, None)[0] for seed, prompt in enumerate(new)]
        rates = score([draw(model, prompt.text, [seed], None, None)[0] for seed, prompt in enumerate(old)], old)
        by_category = {category: rates[category] for category in CATEGORIES}
        table[name] = {"flag": adherence(flags, new), **by_category, "old prompts": float(np.mean(list(by_category.values())))}
        print(name, " ".join(f"{key} {rate:.1%}" for key, rate in table[name].items()))
    sheet(rows).save(options.out / "sheet.jpg", quality=88)
    (options.out / "adherence.json").write_text(json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""Score a model folder on held-out prompts with the pixel oracle, beside true renders, renders sent through its codec, and shuffled captions.

    python scripts/embedded/evaluate.py --stage shapes --out build/evaluation

Draws one picture for each of `--count` prompts (seed = the prompt's number), writes the contact sheet sheet.png and scores.json, and prints the
rates. With `--best-of`, candidates have the seeds n, n + 1,000,000, ... About 0.7 s a picture on one core.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from oracle import Picture, Prompt, evaluation_prompts, judge, score
from PIL import Image, ImageDraw
from tu_diffuse.batch.scores import Scorer, load_scorer, open_score_model
from tu_diffuse.pipeline.model.folder import open_folder
from tu_diffuse.pipeline.model.loading import Model, load_model
from tu_diffuse.pipeline.resolve import resolve
from tu_diffuse.pipeline.text_to_image import Picture as Drawn
from tu_diffuse.pipeline.text_to_image import text_to_image
from tu_diffuse.vae.codec import to_uint8
from world import SIDE, STAGES, render

CAPTION = 40  # px under each picture of the sheet


def draw(model: Model, text: str, seeds: Sequence[int], guidance: float | None, steps: int | None) -> list[Picture]:
    """Pictures, (128, 128, 3) uint8, of these seeds."""
    request = resolve(model.folder, text, seeds, guidance=guidance, steps=steps)
    return [event.pixels.numpy() for event in text_to_image(model, request) if isinstance(event, Drawn)]


def best(pictures: Sequence[Picture], text: str, scorer: Scorer) -> Picture:
    """The one with the highest CLIP score."""
    scores = scorer.score([torch.from_numpy(picture) for picture in pictures], text)
    return pictures[scores.index(max(scores))]


def through_codec(model: Model, picture: Picture) -> Picture:
    """Encode and decode a render: what the model's codec leaves of a perfect picture."""
    pixels = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    return to_uint8(model.codec.decode(model.codec.encode(pixels).latents).pixels)[0].numpy()


def psnr(pictures: list[Picture], truth: list[Picture]) -> float:
    """Peak signal-to-noise ratio of all pictures together, dB."""
    squared = np.mean([np.mean((a.astype(float) - b) ** 2) for a, b in zip(pictures, truth, strict=True)])
    return float(10 * np.log10(255**2 / squared))


def contact_sheet(pictures: list[Picture], prompts: list[Prompt], stickers: tuple[str, ...], columns: int = 10) -> Image.Image:
    """The pictures with their prompts; a failed one is marked x."""
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (SIDE + 4), rows * (SIDE + CAPTION)), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (picture, prompt) in enumerate(zip(pictures, prompts, strict=True)):
        x, y = i % columns * (SIDE + 4), i // columns * (SIDE + CAPTION)
        sheet.paste(Image.fromarray(picture), (x, y))
        right = judge(picture, prompt.scene, background=prompt.background_said, stickers=stickers).all_ok
        words = f"{'ok' if right else 'x'} {prompt.text}"
        pen.multiline_text((x, y + SIDE + 1), "\n".join(words[k : k + 24] for k in range(0, 72, 24)), fill="black", font_size=10, spacing=1)
    return sheet


def main() -> None:
    """Draw, score, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="model folder; the embedded one by default")
    parser.add_argument("--stage", choices=tuple(STAGES), default="shapes")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the prompts; the pictures have the seeds 0, 1, ...")
    parser.add_argument("--best-of", type=int, default=1, help="candidates of each prompt; the embedded CLIP chooses")
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    stickers = STAGES[options.stage].stickers
    prompts = evaluation_prompts(options.count, seed=options.seed, stage=options.stage)
    model = load_model(open_folder(options.model))
    scorer = load_scorer(open_score_model(None), torch.device("cpu"))
    candidates = range(0, options.best_of * 1_000_000, 1_000_000)
    pictures: list[Picture] = []
    for seed, prompt in enumerate(prompts):
        drawn = draw(model, prompt.text, [seed + more for more in candidates], options.guidance, options.steps)
        pictures.append(best(drawn, prompt.text, scorer))
    truth = [render(prompt.scene) for prompt in prompts]
    order = np.random.default_rng(0).permutation(len(prompts))
    decoded = [through_codec(model, picture) for picture in truth]
    scores = {
        "model": score(pictures, prompts, stickers),
        "true renders": score(truth, prompts, stickers),
        f"true renders through the codec ({psnr(decoded, truth):.1f} dB)": score(decoded, prompts, stickers),
        "shuffled captions": score([pictures[i] for i in order], prompts, stickers),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    contact_sheet(pictures[:60], prompts[:60], stickers).save(options.out / "sheet.png")
    (options.out / "scores.json").write_text(json.dumps(scores, indent=2) + "\n")
    for name, rates in scores.items():
        print(name, " ".join(f"{key} {rate:.0%}" for key, rate in rates.items()))


if __name__ == "__main__":
    main()

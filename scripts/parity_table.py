"""Our latents and pictures against those of diffusers' own pipelines, as a table: `python scripts/parity_table.py` writes docs/parity.md.

For each family of models, sampler and prediction type, on a checkpoint of random weights with the family's real layout (tests/real_layouts.py),
written by diffusers itself: the same folder, prompt, seed and steps, float32 on the CPU. The script fails when latents differ by more than 1e-4 or
pictures by more than 1 of 255. `--family sd1` makes one family's rows only, and prints them.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

LATENTS, PIXELS = 1e-4, 1
STEPS, SEED, GUIDANCE, PROMPT, NEGATIVE = 8, 11, 4.0, "a red apple to the left of a blue star", "grey"
SAMPLERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "euler": ("EulerDiscreteScheduler", "leading", {"timestep_spacing": "leading"}),
    "euler_a": ("EulerAncestralDiscreteScheduler", "trailing", {"timestep_spacing": "trailing"}),
    "heun": ("HeunDiscreteScheduler", "linspace", {}),
    "ddim": ("DDIMScheduler", "leading", {"clip_sample": False}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", "linspace", {}),
    "unipc": ("UniPCMultistepScheduler", "linspace", {}),
    "lcm": ("LCMScheduler", "lcm", {"clip_sample": False}),
}
"""Sampler -> diffusers' scheduler, our schedule, the scheduler's settings."""
BORDERS = tuple(sampler for sampler in SAMPLERS if sampler != "heun")
"""Samplers of the two-pipeline recipe, which hands Heun's latents over between the two halves of a step."""
SHARE, BORDER = 0.8, 200  # denoising_end of the base, and the timestep that it stands for


@dataclass(frozen=True)
class Row:
    """One comparison: the largest differences of latents and of pixels (of 255), and the largest latent."""

    model: str
    prediction: str
    sampler: str
    latents: float
    pixels: int
    size: float


def main() -> None:
    """Compare, print, and write the table unless one family was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", help="sd1, sd2, sdxl, t5, sdxl-refiner or sdxl+refiner")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "parity.md")
    options = parser.parse_args()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as work:
        for row in compare(Path(work), options.family):
            print(f"{row.model} {row.prediction} {row.sampler}: {row.latents:.1e} of {row.size:.1f}, {row.pixels}/255", flush=True)
            rows.append(row)
    bad = [row for row in rows if row.latents > LATENTS or row.pixels > PIXELS or row.size < 0.05]
    if options.family is None:
        options.out.write_text(page(rows), encoding="utf-8")
    sys.exit(f"{len(bad)} of {len(rows)} are apart: {bad}" if bad or not rows else 0)


def compare(work: Path, only: str | None) -> Iterator[Row]:
    """All rows, or those of one family."""
    import real_layouts

    for family, make in (("sd1", real_layouts.sd1), ("sd2", real_layouts.sd2), ("sdxl", real_layouts.sdxl), ("t5", real_layouts.t5)):
        for prediction in ("epsilon", "v_prediction"):
            if only in (None, family):
                yield from _one_model(family, make(work / f"{family}-{prediction}", prediction), prediction)
    if only in (None, "sdxl-refiner"):
        for prediction in ("epsilon", "v_prediction"):
            yield from _refiner(real_layouts.refiner(work / f"alone-{prediction}", prediction), prediction)
    if only in (None, "sdxl+refiner"):
        for prediction in ("epsilon", "v_prediction"):
            folders = real_layouts.sdxl(work / f"base-{prediction}", prediction), real_layouts.refiner(work / f"refiner-{prediction}", prediction)
            yield from _base_and_refiner(*folders, prediction)


def _one_model(family: str, folder: Path, prediction: str) -> Iterator[Row]:
    from tu_diffuse.pipeline.model.folder import open_folder
    from tu_diffuse.pipeline.model.loading import load_model

    pipeline, model = _pipeline(folder), load_model(open_folder(folder), dtype="float32", device="cpu")
    for sampler in SAMPLERS:
        _use(pipeline, sampler, model)
        wanted = pipeline(PROMPT, negative_prompt=NEGATIVE, generator=torch.Generator().manual_seed(SEED), **_asked()).images
        yield _row(family, prediction, sampler, model, pipeline, wanted)


def _base_and_refiner(base: Path, refiner: Path, prediction: str) -> Iterator[Row]:
    """The two-pipeline recipe of diffusers' documentation against one ensemble of two experts."""
    from tu_diffuse.pipeline.model.folder import open_folder
    from tu_diffuse.pipeline.model.loading import load_model
    from tu_diffuse.training.composing import compose
    from tu_diffuse.training.intervals import sigma_of

    models = [open_folder(base), open_folder(refiner)]
    compose(models, [sigma_of(models[0].noise, BORDER)], base.with_name(f"both-{prediction}"))
    model = load_model(open_folder(base.with_name(f"both-{prediction}")), dtype="float32", device="cpu")
    first, second = _pipeline(base), _pipeline(refiner)
    for sampler in BORDERS:
        for pipeline in (first, second):
            _use(pipeline, sampler, model)
        drawn = torch.Generator().manual_seed(SEED)
        common = {"negative_prompt": NEGATIVE, "generator": drawn, **_asked()}
        latents = first(PROMPT, denoising_end=SHARE, **common).images
        wanted = second(PROMPT, image=latents, denoising_start=SHARE, **_without_size(common)).images
        yield _row("sdxl+refiner", prediction, sampler, model, first, wanted)


def _refiner(folder: Path, prediction: str) -> Iterator[Row]:
    """The refiner alone, from noise: diffusers has only its image-to-image pipeline, which takes the noise for latents to go on from."""
    from real_layouts import SIDE
    from tu_diffuse.pipeline.model.folder import open_folder
    from tu_diffuse.pipeline.model.loading import load_model

    pipeline, model = _pipeline(folder), load_model(open_folder(folder), dtype="float32", device="cpu")
    side = SIDE // model.folder.factor
    for sampler in SAMPLERS:
        _use(pipeline, sampler, model)
        drawn = torch.Generator().manual_seed(SEED)
        noise = torch.randn((1, 4, side, side), generator=drawn)
        pipeline.scheduler.set_timesteps(STEPS)
        started = {"image": noise * pipeline.scheduler.init_noise_sigma, "denoising_start": 0.0, "strength": 1.0, "generator": drawn}
        wanted = pipeline(PROMPT, negative_prompt=NEGATIVE, **started, **_without_size(_asked())).images
        yield _row("sdxl-refiner", prediction, sampler, model, pipeline, wanted)


def _without_size(options: dict[str, Any]) -> dict[str, Any]:
    """Options for a pipeline that takes its size from a picture."""
    return {name: value for name, value in options.items() if name not in ("width", "height")}


def _pipeline(folder: Path) -> Any:
    import diffusers

    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _use(pipeline: Any, sampler: str, model: Any) -> None:
    """Give a pipeline the scheduler of a sampler, for the model's noise schedule."""
    import diffusers
    from real_layouts import NOISE

    scheduler, _, settings = SAMPLERS[sampler]
    noise = model.folder.noise
    if sampler == "ddim":  # where a run ends is the folder's to say
        settings = settings | {"set_alpha_to_one": "alpha" not in noise.ends_at_sigma_min}
    pipeline.scheduler = getattr(diffusers, scheduler)(**NOISE, **settings, prediction_type=noise.prediction_type)


def _asked() -> dict[str, Any]:
    from real_layouts import SIDE

    return {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "output_type": "latent", "width": SIDE, "height": SIDE}


@torch.no_grad()
def _row(name: str, prediction: str, sampler: str, model: Any, pipeline: Any, wanted: Tensor) -> Row:
    from parity import Listening
    from real_layouts import SIDE
    from tu_diffuse.pipeline.resolve import resolve
    from tu_diffuse.pipeline.text_to_image import Picture, text_to_image

    settings: dict[str, Any] = {"sampler": sampler, "schedule": SAMPLERS[sampler][1], "steps": STEPS, "guidance": GUIDANCE}
    request = resolve(model.folder, PROMPT, [SEED], negative=NEGATIVE, width=SIDE, height=SIDE, **settings)
    heard: list[Tensor] = []
    [ours] = [event.pixels for event in text_to_image(replace(model, codec=Listening(model.codec, heard)), request) if isinstance(event, Picture)]
    decoded = pipeline.image_processor.postprocess(pipeline.vae.decode(wanted / pipeline.vae.config.scaling_factor).sample, output_type="pt")[0]
    theirs = (decoded.permute(1, 2, 0) * 255).round()
    difference = float((torch.cat(heard) - wanted).abs().max())
    return Row(name, prediction, sampler, difference, int((ours.float() - theirs).abs().max()), float(wanted.abs().max()))


def page(rows: list[Row]) -> str:
    """docs/parity.md."""
    import diffusers
    import transformers

    lines = [
        "# The same picture as diffusers",
        "",
        f"Made by `python scripts/parity_table.py` with torch {torch.__version__}, diffusers {diffusers.__version__} and transformers "
        f"{transformers.__version__}, float32 on a CPU:",
        f"{STEPS} steps, guidance {GUIDANCE:g}, a negative prompt, {len(rows)} comparisons. Each cell is the largest difference of latents, and of "
        "pixels in 255ths.",
        "",
        "The checkpoints have random weights, the layouts, key names and configs of the published ones, and smaller widths; diffusers and",
        "transformers wrote them (`tests/real_layouts.py`). More than 1e-4 in latents or 1/255 in pixels makes the script fail.",
        "",
        f"| model | predicts | {' | '.join(SAMPLERS)} |",
        f"| --- | --- | {' | '.join('---' for _ in SAMPLERS)} |",
    ]
    for model, prediction in dict.fromkeys((row.model, row.prediction) for row in rows):
        cells = {row.sampler: f"{row.latents:.0e}, {row.pixels}" for row in rows if (row.model, row.prediction) == (model, prediction)}
        lines.append(f"| {model} | {prediction} | {' | '.join(cells.get(sampler, '–') for sampler in SAMPLERS)} |")
    lines += [
        "",
        f"`sdxl+refiner` is one ensemble of two experts (`tu-diffuse experts compose`, border at timestep {BORDER}) against diffusers' two pipelines",
        f"(`denoising_end={SHARE}`, `denoising_start={SHARE}`). `t5` is a U-Net that reads T5 alone, as DeepFloyd's does; diffusers' network",
        "computes it on both sides. `sdxl-refiner` starts from noise, which diffusers' image-to-image pipeline takes for latents. Heun has no cell",
        "in the last rows: that recipe hands its latents over between the two halves of a step.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

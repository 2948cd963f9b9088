"""`tu-diffuse average`: a model of any averaging length from a fine-tuning run."""

import json
from pathlib import Path
from typing import Annotated

import typer

from .opening import open_unpacked
from .options import Debug, Json, Model, PredictionType


def average(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run: the --out of tu-diffuse finetune with --ema-posthoc.")],
    sigma_rel: Annotated[float, typer.Option(help="Width of the average as a share of the run, usually 0.03 to 0.2.")],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="The new model folder; must not exist.")],
    model: Model = None,
    prediction_type: PredictionType = None,
    step: Annotated[int | None, typer.Option(help="Which the average ends at, one with a snapshot. [default: the last]")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Make a model with another averaging length out of a fine-tuning run, after it was trained (post-hoc EMA).

    --model is the model that the run began from. The result is an ordinary model folder. Adapters are averaged, added to the model's weights, and
    written beside the folder as a LoRA file too (FOLDER-pytorch_lora_weights.safetensors).
    A width that the run's snapshots do not reproduce within 10% is refused: with 32 of them, evenly spaced, 0.015 to 0.27 are possible, with 4 of
    them 0.04 to 0.145.

    Examples:

      tu-diffuse finetune --model my-sd15 --shards 'cats/*.tar' --out tuned --steps 3200 --ema-posthoc 100

      tu-diffuse average tuned --model my-sd15 --sigma-rel 0.07 --out cats-0.07

    With --json one line: path, step, sigma_rel, snapshots (how many files it was made of), distance (of the profile made from the exact one, as a
    share), lora (the LoRA files).
    """
    del debug  # read in main.py
    from ..training.averaging import average_run

    made = average_run(run, open_unpacked(model, prediction_type), sigma_rel, out, step)
    if as_json:
        facts = {
            "step": made.profile.step,
            "sigma_rel": made.profile.width,
            "snapshots": made.snapshots,
            "distance": made.distance,
            "lora": [str(path) for path in made.lora],
        }
        print(json.dumps({"path": str(out), **facts}))
    else:
        typer.echo(f"step {made.profile.step}, from {made.snapshots} snapshots, profile exact to {made.distance:.2g}", err=True)
        print(out)

"""`tu-diffuse experts`: the experts of a model folder, and new folders with other experts."""

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UsageError
from .info import lines_of
from .opening import open_unpacked
from .options import EXIT_CODES, Debug, Device, Json, PredictionType

if TYPE_CHECKING:
    from ..training.boundary import Suggestion

app = typer.Typer(
    help="Show the experts of a model, fork, compose, merge and drop them, and find where to fork. Models are never changed; new ones are written.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Folder = Annotated[Path | None, typer.Argument(metavar="[MODEL]", help="A model's folder or single file. [default: the embedded model]")]
Out = Annotated[Path, typer.Option("--out", metavar="FOLDER", help="The new model folder; must not exist.")]
Link = Annotated[bool, typer.Option("--link", help="Hard links instead of copies of files that stay the same; then never edit them in place.")]


@app.command(epilog=EXIT_CODES)
def show(folder: Folder = None, as_json: Json = False, debug: Debug = False) -> None:
    """Show which expert owns which noise levels, where each comes from, and what it takes on disk. No weights are loaded.

    Examples:

      tu-diffuse experts show

      tu-diffuse experts show models/my-ensemble --json

    With --json one line: name, bytes, and experts from high to low noise, each with its interval in sigma, timesteps and log-SNR (null: no
    end), parent, guidance, how it is stored (whole, delta, lora), base, bytes of its own and shared ones.
    """
    del debug  # read in main.py
    from ..pipeline.model.describe import describe_experts
    from ..pipeline.model.folder import open_folder

    _print(describe_experts(open_folder(folder)), as_json)


@app.command(epilog=EXIT_CODES)
def fork(
    out: Out,
    folder: Folder = None,
    prediction_type: PredictionType = None,
    at_timestep: Annotated[list[float] | None, typer.Option(help="A border, as a training timestep; give it again for more children.")] = None,
    at_sigma: Annotated[list[float] | None, typer.Option(help="A border, as a noise level.")] = None,
    expert: Annotated[str | None, typer.Option(metavar="NAME", help="Which expert. [default: the only one]")] = None,
    whole: Annotated[bool, typer.Option("--whole", help="Give each child all weights, loadable by diffusers, instead of a delta.")] = False,
    link: Link = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Split an expert at noise levels into children that begin as it: the new model draws the same pictures, until a child is trained.

    Children are named by the timesteps they own, and take almost no disk: what they share with their parent is stored once.

    Examples:

      tu-diffuse experts fork my-sd15 --at-timestep 500 --out forked

      tu-diffuse experts fork forked --expert t0500-1000 --at-timestep 900 --at-timestep 750 --out more

    With --json one line: path, and what `experts show` prints of the new folder.
    """
    del debug  # read in main.py
    from ..training.forking import fork as fork_expert
    from ..training.intervals import sigma_of

    model = open_unpacked(folder, prediction_type)
    borders = [*(sigma_of(model.noise, step) for step in at_timestep or ()), *(at_sigma or ())]
    fork_expert(model, borders, out, expert=expert, whole=whole, link=link)
    _print_new(out, as_json)


@app.command(epilog=EXIT_CODES)
def compose(
    folders: Annotated[list[Path], typer.Argument(metavar="MODEL...", help="Models, from high noise to low: the base before its refiner.")],
    out: Out,
    prediction_type: PredictionType = None,
    border_timestep: Annotated[list[float] | None, typer.Option(help="A border between two models, as a training timestep.")] = None,
    border_sigma: Annotated[list[float] | None, typer.Option(help="A border between two models, as a noise level.")] = None,
    link: Link = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Make one ensemble of several models, each for the noise levels between two borders.

    They have to be of one latent space and one noise schedule; their U-Nets and text encoders may differ. VAE and defaults are those of the first.

    Examples:

      tu-diffuse experts compose sdxl-base sdxl-refiner --border-timestep 200 --out sdxl

      tu-diffuse experts compose sd_xl_base_1.0.safetensors sd_xl_refiner_1.0.safetensors --border-timestep 200 --out sdxl

      tu-diffuse experts compose layout general detail --border-timestep 800 --border-timestep 200 --out three

    With --json one line: path, notes, and what `experts show` prints of the new folder.
    """
    del debug  # read in main.py
    from ..training.composing import compose as compose_models
    from ..training.intervals import sigma_of

    models = [open_unpacked(folder, prediction_type) for folder in folders]
    borders = [*(sigma_of(models[0].noise, step) for step in border_timestep or ()), *(border_sigma or ())]
    composed = compose_models(models, borders, out, link)
    _print_new(out, as_json, notes=list(composed.notes))


@app.command(epilog=EXIT_CODES)
def merge(
    out: Out,
    folder: Folder = None,
    expert: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Merge these neighbours only. [default: all experts]")] = None,
    weight: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=NUMBER", help="Weight of its difference from the parent. [default: its share of timesteps]"),
    ] = None,
    parent: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="The model that the experts were trained from. [default: the base they are stored against]")
    ] = None,
    link: Link = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Make one expert of several: parent + sum of weight * (child - parent).

    The parent is the base that the children are stored against, or the model that you name. Where there is none, they are averaged, and it is said.

    Examples:

      tu-diffuse experts merge forked --out merged

      tu-diffuse experts merge more --expert t0500-0750 --expert t0750-1000 --weight t0500-0750=1 --weight t0750-1000=0.5 --out fewer

      tu-diffuse experts merge two-whole-experts --parent my-sd15 --out merged

    With --json one line: path, weights, parent (null: averaged), and what `experts show` prints of the new folder.
    """
    del debug  # read in main.py
    from ..pipeline.model.folder import open_folder
    from ..training.merging import merge as merge_experts

    shares = None if not weight else dict(_share(text) for text in weight)
    origin = None if parent is None else open_folder(parent)
    merged = merge_experts(open_folder(folder), out, experts=expert or (), shares=shares, parent=origin, link=link)
    _print_new(out, as_json, weights=dict(merged.shares), parent=merged.parent)
    if merged.parent is None:
        typer.echo("no parent of the merged experts is in the folder: they were averaged", err=True)


@app.command(epilog=EXIT_CODES)
def drop(
    out: Out,
    expert: Annotated[str, typer.Option(metavar="NAME", help="Which expert goes.")],
    to: Annotated[str, typer.Option(metavar="lower|higher", help="Which neighbour takes over its noise levels.")],
    folder: Folder = None,
    link: Link = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Remove an expert; its neighbour takes over its noise levels and is named by all that it owns then.

    Examples:

      tu-diffuse experts drop forked --expert t0000-0500 --to higher --out without

    With --json one line: path, and what `experts show` prints of the new folder.
    """
    del debug  # read in main.py
    if to not in ("lower", "higher"):
        raise UsageError(f"--to {to!r} is not known; use lower or higher.")
    from ..pipeline.model.folder import open_folder
    from ..training.forking import drop as drop_expert

    drop_expert(open_folder(folder), expert, out, heir=to, link=link)
    _print_new(out, as_json)


@app.command(epilog=EXIT_CODES)
def suggest_boundary(
    shards: Annotated[list[str], typer.Option(metavar="SPEC", help="Shards to measure on, as for `tu-diffuse finetune`; may be repeated.")],
    folder: Folder = None,
    prediction_type: PredictionType = None,
    expert: Annotated[str | None, typer.Option(metavar="NAME", help="Which expert. [default: the only one]")] = None,
    bins: Annotated[int, typer.Option(min=2, help="Bins of equally many timesteps; borders lie between them.")] = 16,
    samples: Annotated[int, typer.Option(min=8, help="Pictures drawn from the shards, seen in every bin.")] = 64,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures a backward pass; for memory, no effect on the result.")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Of pictures and noise.")] = 0,
    device: Device = "auto",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Propose where to fork an expert, from its loss and gradient in bins of noise on your pictures. Nothing is written.

    Where bins pull the weights in different directions, one network loses part of each pull, and two specialists lose less. The border at which they
    would lose least is proposed; `gain` says how much of all that could be won by a network for every bin. It is measured at the weights of this
    moment, so measure a trained model. Exit code 1 when no border stands out.

    Examples:

      tu-diffuse experts suggest-boundary my-sd15 --shards 'laion/{00000..00009}.tar'

      tu-diffuse experts suggest-boundary --expert high --shards 'laion/*.tar' --samples 256 --json

    With --json one line: expert, samples, bins (timestep_min, timestep_max, loss, gain of the border at its end), error (standard error of the
    largest gain), timestep and sigma (the border; null: none), lowest and highest (borders found with an eighth of the pictures left out), command.
    """
    del debug  # read in main.py
    from ..pipeline.model.place import choose_device
    from ..shards.index import index_shards
    from ..shards.specs import expand
    from ..training.boundary import suggest_boundary as suggest

    model, place = open_unpacked(folder, prediction_type), choose_device(device)
    index = index_shards(expand(shards))
    asked = {"expert": expert, "bins": bins, "samples": samples, "batch_size": batch_size, "seed": seed}
    found = suggest(model, index, **asked, device=place, report=lambda text: typer.echo(text, err=True))  # pyright: ignore[reportArgumentType]
    facts = _suggested(found, folder)
    facts["sigma"] = None if found.timestep is None else float(model.noise.sigmas[found.timestep])
    if as_json:
        print(json.dumps(facts))
    else:
        for line in _suggestion_lines(facts):
            print(line)
    if found.timestep is None:
        typer.echo("no border stands out from sampling error; give more --samples, or train the model further", err=True)
        raise typer.Exit(1)


def _suggested(found: "Suggestion", folder: Path | None) -> dict[str, Any]:
    ends = zip(found.edges[:-1], found.edges[1:], found.losses, [*found.gains, None], strict=True)
    fork = ["tu-diffuse", "experts", "fork", *([] if folder is None else [str(folder)]), "--expert", found.expert]
    return {
        "expert": found.expert,
        "samples": found.samples,
        "bins": [{"timestep_min": low, "timestep_max": high, "loss": loss, "gain": gain} for low, high, loss, gain in ends],
        "error": found.error,
        "timestep": found.timestep,
        "lowest": found.lowest,
        "highest": found.highest,
        "command": None if found.timestep is None else shlex.join([*fork, "--at-timestep", str(found.timestep), "--out", "forked"]),
    }


def _suggestion_lines(facts: dict[str, Any]) -> list[str]:
    """Bins as a table with a bar for the gain of each border."""
    bins: list[dict[str, Any]] = facts["bins"]
    most = max(entry["gain"] or 0.0 for entry in bins)
    lines = [f"{'timesteps':>9}  {'loss':>8}  gain of a border after it"]
    for entry in bins:
        gain = entry["gain"]
        bar = "" if gain is None or most <= 0 else "█" * round(40 * max(gain, 0.0) / most)
        span = f"{entry['timestep_min']:04d}-{entry['timestep_max']:04d}"
        lines.append(f"{span}  {entry['loss']:8.5f}" + ("" if gain is None else f"  {gain:6.3f} {bar}"))
    if facts["timestep"] is not None:
        lines += [
            f"border: timestep {facts['timestep']} (sigma {facts['sigma']:.4g}); {facts['lowest']} to {facts['highest']} "
            f"when an eighth of the pictures is left out; standard error of the gain {facts['error']:.3f}",
            f"next: {facts['command']}",
        ]
    return lines


def _share(text: str) -> tuple[str, float]:
    name, _, number = text.partition("=")
    try:
        return name, float(number)
    except ValueError:
        raise UsageError(f"--weight {text!r} is not a name and a number; write for example t0500-1000=0.5.") from None


def _print_new(out: Path, as_json: bool, **more: object) -> None:
    from ..pipeline.model.describe import describe_experts
    from ..pipeline.model.folder import open_folder

    _print({"path": str(out), **more, **describe_experts(open_folder(out))}, as_json)


def _print(facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(facts))
    else:
        for line in lines_of(facts):
            print(line)

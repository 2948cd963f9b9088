"""`tu-diffuse batch`: a prompt file to a folder of pictures."""

import json
import sys
import time
from collections import Counter
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import DataError, UsageError
from .batch_progress import Reporter
from .options import Attention, Debug, Device, DType, Embeddings, Json, Loras, Model, Offload, PredictionType, Quantize, Variant, grouped
from .picture_options import ControlOptions, EditOptions

if TYPE_CHECKING:
    from ..batch.items import Item
    from ..batch.prompt_file import Kind, PromptFile
    from ..pipeline.adapters.embeddings import EmbeddingUse

LAYOUTS = ("flat", "geneval")
MOST_CANDIDATES = 64


@grouped
def batch(
    context: typer.Context,
    *,
    prompts: Annotated[Path | None, typer.Argument(metavar="FILE", help="Prompts: .txt, .jsonl, .csv or .tsv; - reads standard input.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the pictures; the same command again goes on where it stopped.")] = None,
    model: Model = None,
    prediction_type: PredictionType = None,
    variant: Variant = None,
    kind: Annotated[str | None, typer.Option(help="txt, jsonl, csv or tsv. [default: from the file's name or its first line]")] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of a .jsonl line, and stop.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Stop before loading when a line is bad; refuse words beyond the text encoders.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be drawn, and stop.")] = False,
    sweep: Annotated[
        list[str] | None, typer.Option(metavar="OPTION=V1,V2", help="Draw every line with each of these values; may be repeated.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Most pictures computed together. [default: 16, fewer of large ones]")] = None,
    memory: Annotated[float | None, typer.Option(metavar="GIB", help="Memory to stay within. [default: most of the machine's]")] = None,
    part: Annotated[str, typer.Option(metavar="K/N", help="Draw the K-th of N parts, for several processes on one folder.")] = "1/1",
    best_of: Annotated[
        int | None, typer.Option(metavar="N", help="Draw N candidates of each picture, keep the one with the highest CLIP score.")
    ] = None,
    score_model: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="CLIP pair in open_clip's layout: open_clip_config.json, open_clip_model.safetensors. [default: the embedded model has its own]",
        ),
    ] = None,
    layout: Annotated[str, typer.Option(help="flat; geneval: the folders that GenEval judges, from its evaluation_metadata.jsonl.")] = "flat",
    negative: Annotated[str | None, typer.Option(help="Of lines that name none; so are all options below.")] = None,
    seed: Annotated[int | None, typer.Option(help="0..4294967295. [default: from each line's text]")] = None,
    count: Annotated[int | None, typer.Option(help="Pictures of each line, with the seeds SEED, SEED+1, ... [default: 1]")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps. [default: the model's]")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; 1 is none. [default: the model's]")] = None,
    sampler: Annotated[str | None, typer.Option(help="As in generate. [default: the model's]")] = None,
    schedule: Annotated[str | None, typer.Option(help="As in generate. [default: the model's]")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels. [default: the model's]")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels. [default: the model's]")] = None,
    guidance_rescale: Annotated[float | None, typer.Option(help="0..1, as in generate.")] = None,
    guidance_interval: Annotated[str | None, typer.Option(metavar="LOW,HIGH", help="As in generate.")] = None,
    sigmas: Annotated[str | None, typer.Option(metavar="S1,S2,...", help="As in generate.")] = None,
    apg: Annotated[bool | None, typer.Option("--apg", help="Adaptive projected guidance.")] = None,
    dynamic_threshold: Annotated[float | None, typer.Option(help="0..1, as in generate.")] = None,
    eta: Annotated[float | None, typer.Option(help="0..1, as in generate.")] = None,
    edit: EditOptions,
    syntax: Annotated[str | None, typer.Option(help="plain or weighted, as in generate. [default: plain]")] = None,
    long_prompts: Annotated[str | None, typer.Option(help="chunk or truncate, as in generate. [default: chunk]")] = None,
    no_t5: Annotated[bool | None, typer.Option("--no-t5", help="Leave T5 out, as in generate.")] = None,
    clip_weight: Annotated[float | None, typer.Option(help="As in generate. [default: 1]")] = None,
    t5_weight: Annotated[float | None, typer.Option(help="As in generate. [default: 1]")] = None,
    steered: ControlOptions,
    format: Annotated[str | None, typer.Option(help="png, jpeg or webp. [default: png]")] = None,
    name: Annotated[str | None, typer.Option(metavar="TEMPLATE", help="File names. [default: {number}-{prompt}-{seed}]")] = None,
    lora: Loras = None,
    embedding: Embeddings = None,
    dtype: DType = "auto",
    device: Device = "auto",
    devices: Annotated[str | None, typer.Option(metavar="D1,D2,...", help="Draw on several devices at once, as in cuda:0,cuda:1.")] = None,
    ray: Annotated[
        str | None, typer.Option(metavar="ADDRESS|local", help="Draw on a Ray cluster: HOST:PORT, auto, or local to start one on this machine.")
    ] = None,
    attention: Attention = "auto",
    quantize: Quantize = "none",
    offload: Offload = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Draw a file of prompts into a folder.

    Run the same command again to go on: what is there is kept, what is missing is drawn, with the pixels of a run that went through. Good lines are
    drawn even when others are bad; the bad ones are listed with line and column, and the exit code is 1. To look at the pictures, open gallery.html
    in the folder, or its contact sheets.

    Examples:

      tu-diffuse batch prompts.txt --out pictures

      tu-diffuse batch prompts.jsonl --out pictures --sweep guidance=1,3,5 --count 4

      tu-diffuse batch prompts.csv --out pictures --dry-run

      tu-diffuse batch prompts.txt --out pictures --model my-sd15 --lora style.safetensors:0.8

      tu-diffuse batch prompts.txt --out pictures --devices cuda:0,cuda:1

      tu-diffuse batch prompts.txt --out pictures --ray 10.0.0.1:6379

      tu-diffuse batch prompts.txt --out pictures --best-of 4 --score-model ViT-B-32

      tu-diffuse batch evaluation_metadata.jsonl --out pictures --layout geneval --count 4

    With --json each line has an event: problem (line, column, message), plan (pictures, batches, there), picture (path, line, key, truncated,
    fallbacks, score, scores), failed (line, key, error), died (reason), summary (asked, done, failed, blocked, skipped, drawn, seconds, loads,
    died).
    """
    del debug  # read in main.py
    given = locals() | vars(edit) | vars(steered)
    from ..batch.options import BY_NAME
    from ..batch.options import schema as json_schema

    if schema:
        print(json.dumps(json_schema(), indent=2))
        return
    given = {option: value for option, value in given.items() if option in BY_NAME and value not in (None, []) and value is not False}
    if prompts is None:
        raise UsageError("the prompt file is missing; name one that ends in .txt, .jsonl, .csv or .tsv, or - for standard input.")
    if out is None:
        raise UsageError("--out is missing; name the folder of the pictures.")
    which = _part(part)
    _check_together(
        batch_size=batch_size,
        layout=layout,
        named=bool(sweep) or name is not None or format is not None,
        best_of=best_of,
        score_model=score_model,
        device=device,
        devices=devices,
        ray=ray,
        dry_run=dry_run,
    )

    from ..batch import cluster, geneval
    from ..batch.estimate import expect
    from ..batch.gallery import write_gallery
    from ..batch.items import make_items
    from ..batch.journal import only_run
    from ..batch.outcomes import shared_arguments
    from ..batch.plan import extend, load_plan, save_plan
    from ..batch.run import draw_missing, forget_finished, settle, summarise
    from ..batch.scores import load_scorer, open_score_model
    from ..batch.sheet import write_sheet
    from ..batch.studio import WINDOW_SHARE, Studio, memory_budget, model_bytes
    from ..batch.workers import Job, draw_in_workers, shares
    from ..pipeline.adapters.adapters import Shelf
    from ..pipeline.model.folder import open_folder
    from ..pipeline.model.place import choose_place
    from ..pipeline.output import try_folder

    file = _read(prompts, kind) if layout == "flat" else geneval.judged(_read(prompts, kind, geneval.KEYS))
    folder = open_folder(model, prediction_type, variant)
    if best_of is not None and score_model is None and folder.fingerprint != open_folder(None).fingerprint:
        raise UsageError(
            f"--best-of {best_of} needs a CLIP pair, and the embedded model's knows no other model's pictures; name one with --score-model."
        )
    reporter = Reporter(as_json, out)
    placed = (device if devices is None else devices).split(",")
    rays = None if ray is None else context.with_resource(cluster.connected(ray, device))
    where_to = choose_place if rays is None else partial(cluster.place_on, rays)
    places = [where_to(dtype, name, attention, quantize, offload) for name in placed]
    where = [{"dtype": str(place.dtype), "device": place.device.type, "attention": str(place.attention)} for place in places]
    circumstances: dict[str, Any] = {name: "+".join(sorted({one[name] for one in where})) for name in where[0]}
    circumstances |= {} if quantize == "none" else {"quantize": quantize}
    clip = None if best_of is None else open_score_model(score_model)
    if clip is not None:
        circumstances |= {"best_of": best_of, "score_model": clip.hash}
    shelf = Shelf(folder)
    items, refused = make_items(
        folder,
        file.lines,
        defaults=_checked(given),
        sweep=_sweep(sweep or []),
        circumstances=circumstances,
        shelf=shelf,
        best_of=1 if best_of is None else best_of,
        name_of=geneval.name_of if layout == "geneval" else None,
        beside=Path() if str(prompts) == "-" else prompts.parent,
    )
    _refuse_unused([shelf.embedding(text) for text in given.get("embedding", ())], items)
    for said in shelf.partial:
        reporter.note(said)
    problems = sorted((*file.problems, *refused))
    for problem in problems:
        reporter.problem(problem)
    blocked = len({problem.line for problem in problems})
    if strict and problems:
        raise DataError(f"{blocked} lines of {prompts.name!r} are bad, as listed; correct them, or leave out --strict to draw the others.")
    budgets = [memory_budget(memory, place) // places.count(place) for place in places] if rays is None else []
    sizes = [model_bytes(folder, place, [item.request for item in items]) for place in places]
    roomy = [size < budget for size, budget in zip(sizes, budgets, strict=True)] if rays is None else []
    windows = [budget // WINDOW_SHARE for budget in budgets]
    if dry_run:
        plan = extend(load_plan(out, folder.fingerprint), items, batch_size)
        slowest = next((i for i, place in enumerate(places) if place.device.type == "cpu"), 0)
        reporter.expected(
            expect(Studio(folder, places[slowest], roomy=roomy[slowest], files=shelf.files), plan, out, which, windows[slowest], places)
        )
        return
    try_folder(out)
    shared = shared_arguments(folder, dtype=dtype, device=placed[0], attention=attention, quantize=quantize)
    started, loads = time.monotonic(), Counter[str]()
    with only_run(out, which):
        plan = extend(load_plan(out, folder.fingerprint), items, batch_size)
        done = settle(plan, out)
        if layout == "geneval":
            geneval.prepare(file.lines, plan, done, out)
        save_plan(plan, out)
        forget_finished(plan, done, out)
        reporter.plan(plan, len(done))
        studio: Studio | None = None
        try:
            if rays is not None:
                task = cluster.make_task(folder, places[0], memory, rays, clip, shelf.files, sizes[0])
                told = (loads, reporter.step, reporter.entry, reporter.died)
                cluster.draw_on_cluster(rays, task, plan, done, out, which, *told)
            elif len(places) > 1:
                dealt = zip(places, roomy, windows, shares(plan, which, len(places)), strict=True)
                jobs = [Job(folder.path, *one, out, clip, shelf.files, folder.variant) for one in dealt]
                for entry in draw_in_workers(jobs, loads, reporter.step, reporter.died):
                    reporter.entry(entry)
            else:
                studio = Studio(folder, places[0], roomy=roomy[0], files=shelf.files)
                scorer = None if clip is None else load_scorer(clip, places[0].device)
                draw_missing(studio, plan, done, out, part=which, window_bytes=windows[0], tell=reporter.step, kept=reporter.entry, scorer=scorer)
        finally:
            if studio is not None:
                loads.update(studio.loads)
            summary = summarise(plan, out, blocked, done, part=which, started=started, loads=loads, died=reporter.deaths)
            reporter.summary(summary)
            write_gallery(folder, plan, out, problems=problems, shared=shared)
        write_sheet(folder, plan, out)  # not after an interruption: it reads every picture
    if summary.failed or summary.blocked:
        raise typer.Exit(1)


def _check_together(
    *,
    batch_size: int | None,
    layout: str,
    named: bool,
    best_of: int | None,
    score_model: Path | None,
    device: str,
    devices: str | None,
    ray: str | None,
    dry_run: bool,
) -> None:
    """Refuse options out of range, and those that contradict each other or do nothing alone."""
    if batch_size is not None and batch_size < 1:
        raise UsageError(f"--batch-size {batch_size} is out of range; give 1 or more.")
    if layout not in LAYOUTS:
        raise UsageError(f"--layout {layout!r} is not known; use one of {', '.join(LAYOUTS)}.")
    if layout == "geneval" and named:
        raise UsageError("--layout geneval fixes names and format and holds pictures of one setting; leave out --sweep, --name and --format.")
    if best_of is not None and not 2 <= best_of <= MOST_CANDIDATES:
        raise UsageError(f"--best-of {best_of} is out of range; give 2 to {MOST_CANDIDATES}.")
    if devices is not None and device != "auto":
        raise UsageError("--device and --devices contradict each other; leave one of them out.")
    if ray is not None and (devices is not None or dry_run):
        other = "--devices" if devices is not None else "--dry-run"
        raise UsageError(f"--ray and {other} contradict each other, since {other} looks at this machine; leave one of them out.")
    if best_of is None and score_model is not None:
        raise UsageError("--score-model scores candidates, and there are none; give --best-of N too.")


def _refuse_unused(embeddings: "list[EmbeddingUse]", items: "list[Item]") -> None:
    """Refuse an embedding of the command line whose word stands in no line."""
    for unused in (one for one in embeddings if items and not any(one in item.request.embeddings for item in items)):
        raise UsageError(f"the word {unused.token!r} of --embedding {unused.name} stands in no line; write it where it belongs, or leave it out.")


def _read(path: Path, kind: str | None, carry: Collection[str] = ()) -> "PromptFile":
    from ..batch.prompt_file import KINDS, kind_of, read_prompts, sniff

    kinds: dict[str, Kind] = {name: name for name in KINDS}
    if kind is not None and kind not in kinds:
        raise UsageError(f"--kind {kind!r} is not known; use one of {', '.join(KINDS)}.")
    try:
        data = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
    except OSError as error:
        raise UsageError(f"prompt file {path.name!r} cannot be read ({error.strerror}); name one that exists.") from None
    found = kinds[kind] if kind is not None else sniff(data) if str(path) == "-" else kind_of(path.name)
    if carry and found != "jsonl":
        raise UsageError(f"--layout geneval reads JSON Lines, and this is {found}; give GenEval's evaluation_metadata.jsonl.")
    return read_prompts(data, found, carry)


def _part(text: str) -> tuple[int, int]:
    number, _, parts = text.partition("/")
    if not (number.isdecimal() and parts.isdecimal() and 1 <= int(number) <= int(parts) <= 100_000):
        raise UsageError(f"--part {text!r} is no part; write 3/8 for the third of eight.")
    return int(number), int(parts)


def _checked(given: dict[str, Any]) -> dict[str, Any]:
    """Options of the command line, checked as those of a line are."""
    from ..batch.options import BY_NAME, from_json, from_text

    texts = {name: str(value) if isinstance(value, Path) else value for name, value in given.items()}
    return {name: (from_text if isinstance(value, str) else from_json)(BY_NAME[name], value) for name, value in texts.items()}


def _sweep(texts: list[str]) -> dict[str, list[Any]]:
    from ..batch.options import BY_NAME, from_text

    sweeps: dict[str, list[Any]] = {}
    sweepable = [
        one.name
        for one in BY_NAME.values()
        if (one.items is None or one.name in ("lora", "embedding")) and one.name not in ("prompt", "seed", "count")
    ]
    for text in texts:
        option, _, values = text.partition("=")
        name = option.replace("-", "_")
        if name not in sweepable or not values:
            raise UsageError(f"--sweep {text!r} cannot be used; write OPTION=V1,V2 with one of {', '.join(sweepable)}.")
        if name in sweeps:
            raise UsageError(f"--sweep names {name} twice; put all its values into one.")
        sweeps[name] = [from_text(BY_NAME[name], value) for value in values.split(",")]
    return sweeps

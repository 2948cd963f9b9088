"""`tu-diffuse shards`: check, count, filter and encode LAION-style tar shards."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import DataError, OutputError, UsageError
from .info import lines_of
from .opening import open_unpacked
from .options import EXIT_CODES, Debug, Device, Json, Model, PredictionType, grouped
from .shard_options import FilterOptions, MaxLost, Shards, SkipDamaged, VerifyHashes, VerifyPictures
from .shard_progress import printable, progress

if TYPE_CHECKING:
    from ..shards.filters import Filters
    from ..shards.index import ShardIndex

app = typer.Typer(
    help="Check, count, filter and encode LAION-style tar shards, as img2dataset writes them.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command(epilog=EXIT_CODES)
def check(
    specs: Shards,
    quick: Annotated[bool, typer.Option("--quick", help="Do not decode the pictures, only look at their first bytes.")] = False,
    verify_hashes: VerifyHashes = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Read every shard from end to end and name every damaged place: shard, byte, sample and why.

    Headers that are flipped or zeroed, shards that are cut, pictures that do not decode, captions that are missing or empty, keys that come twice or
    in pieces. Exits with 4 when anything is damaged.

    Examples:

      tu-diffuse shards check laion/00000.tar

      tu-diffuse shards check 'laion/{00000..00099}.tar' --quick

      tu-diffuse shards check 'https://example.com/laion/{00000..00009}.tar' --json

    With --json one line a damaged place (kind "damage": shard, key, offset, reason, detail), then one (kind "summary": shards, samples, runs,
    skipped, members, vanished, damaged_places, notes). A run is all adjacent members of one key; samples + the sum of skipped = runs, and the sum
    of members (used, skipped, ignored) = members with a whole header.
    """
    del debug  # read in main.py
    from ..shards.check import ShardReport, check_shard
    from ..shards.index import describe, join_reports
    from ..shards.specs import expand, shard_name

    locations = expand(specs)
    reports: list[ShardReport] = []
    with progress("shard", len(locations)) as say:
        for number, location in enumerate(locations):
            report = check_shard(location, number, verify_pictures=not quick, verify_hashes=verify_hashes)
            reports.append(report)
            for damage in report.damages:
                line = asdict(damage) | {"kind": "damage", "shard": shard_name(damage.shard)}
                print(json.dumps(line) if as_json else printable(describe(damage)), flush=True)
            say(f"{shard_name(location)}: {len(report.samples)} samples, {len(report.damages)} damaged places")
    index = join_reports(reports)
    summary = _account(index)
    _print_summary(summary, as_json)
    if index.damages:
        damaged = len({damage.shard for damage in index.damages})
        places = f"{len(index.damages)} damaged place{'s' * (len(index.damages) > 1)} in {damaged} of {len(locations)} shards"
        raise DataError(f"Found {places}, as listed; download these shards again, or leave them out.")


@app.command(epilog=EXIT_CODES)
@grouped
def stats(
    specs: Shards,
    *,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Also draw the histograms of the columns.")] = None,
    wanted: FilterOptions,
    skip_damaged: SkipDamaged = False,
    max_lost: MaxLost = 0.01,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Count samples, missing values and the distribution of LAION's columns, and what each filter would drop, alone and together.

    Examples:

      tu-diffuse shards stats 'laion/*.tar' --plot columns.png

      tu-diffuse shards stats 'laion/*.tar' --filter laion-aesthetic --max-watermark 0.5 --missing keep

    With --json one line a numeric column (kind "column": name, present, missing, lowest, median, highest, edges, counts, kept), a column of words
    (kind "words": name, missing, counts, kept), a filter (kind "filter": name, dropped, missing, only), then one (kind "summary": the fields of
    check's, dropped, kept, plot).
    """
    del debug  # read in main.py
    from ..shards.stats import distributions, effects, words

    filters = _filters(wanted)
    if plot is not None and plot.suffix.lower() != ".png":
        raise UsageError(f"--plot {str(plot)!r} is no PNG file; end its name in .png.")
    if plot is not None and plot.exists():
        raise OutputError(f"{str(plot)!r} exists and is never overwritten; give another --plot.")
    index = _index(specs, skip_damaged, max_lost, verify_pictures=False, verify_hashes=False)
    numbers, texts = distributions(index.samples, filters), words(index.samples, filters)
    found, dropped = effects(filters, [sample.columns for sample in index.samples])
    if plot is not None:
        from ..shards.plot import draw_plot
        from ..shards.writer import publish

        title = f"{len(index.samples)} samples in {len(index.shards)} shard{'s' * (len(index.shards) > 1)}"
        picture = draw_plot(numbers, texts, title + (f", {dropped} dropped by the filters" if found else ""))
        publish(lambda file: picture.save(file, "PNG"), plot)
    summary = _account(index) | {"dropped": dropped, "kept": len(index.samples) - dropped, "plot": None if plot is None else str(plot)}
    if as_json:
        for kind, entries in (("column", numbers), ("words", texts), ("filter", found)):
            for entry in entries:
                print(json.dumps({"kind": kind} | asdict(entry)))
        print(json.dumps({"kind": "summary"} | summary))
        return
    columns = {
        each.name: f"{each.present} samples, {each.missing} missing"
        + (f", {each.lowest:.4g} .. median {each.median:.4g} .. {each.highest:.4g}" if each.present else "")
        for each in numbers
    }
    columns |= {
        each.name: ", ".join(f"{word} {count}" for word, count in [*each.counts.items(), ("missing", each.missing)] if count) for each in texts
    }
    drops = {each.name: f"alone drops {each.dropped}, {each.only} that no other does; {each.missing} samples have no value" for each in found}
    _print_text(_account(index) | {"columns": columns} | ({"filters": drops, "dropped": dropped, "kept": summary["kept"]} if found else {}))


@app.command("filter", epilog=EXIT_CODES)
@grouped
def filter_shards(
    specs: Shards,
    *,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the filtered shards go, under their own names; nothing is overwritten.")],
    wanted: FilterOptions,
    skip_damaged: SkipDamaged = False,
    max_lost: MaxLost = 0.01,
    verify_pictures: VerifyPictures = False,
    verify_hashes: VerifyHashes = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write shards with only the samples that pass all filters, their members byte for byte, and a _stats.json beside each.

    Every shard is read and judged before the first is written; a shard appears under its name when it is complete. With --skip-damaged and no filter
    the result is the undamaged part.

    Examples:

      tu-diffuse shards filter 'laion/*.tar' --out clean/ --filter laion-aesthetic

      tu-diffuse shards filter 'laion/{00000..00099}.tar' --out large/ --min-size 512 --aspect 0.5,2 --missing keep

      tu-diffuse shards filter 'laion/*.tar' --out whole/ --skip-damaged --verify-pictures

    With --json one line a shard (kind "shard": path, source, kept, dropped by reason), then one (kind "summary": the fields of check's, dropped,
    kept).
    """
    del debug  # read in main.py
    from ..shards.filters import active
    from ..shards.specs import shard_name
    from ..shards.writer import write_filtered

    filters = _filters(wanted)
    if not active(filters) and not skip_damaged:
        raise UsageError(
            "No filter is given; give --filter laion-aesthetic or single ones such as --min-size 512, or --skip-damaged to drop damage only."
        )
    index = _index(specs, skip_damaged, max_lost, verify_pictures=verify_pictures, verify_hashes=verify_hashes)
    reasons = _judged(index, filters)
    kept = reasons.count(None)
    with progress("writing", len(index.shards)) as say:
        for written in write_filtered(index, reasons, out):
            line = {
                "kind": "shard",
                "path": str(written.path),
                "source": shard_name(written.source),
                "kept": written.kept,
                "dropped": written.dropped,
            }
            print(json.dumps(line) if as_json else printable(str(written.path)), flush=True)
            say(f"{written.path}: {written.kept} samples")
    summary = _account(index) | {"dropped": len(reasons) - kept, "kept": kept}
    _print_summary(summary, as_json)


@app.command(epilog=EXIT_CODES)
@grouped
def encode(
    specs: Shards,
    *,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the encoded shards go, under the names of their sources.")],
    model: Model = None,
    prediction_type: PredictionType = None,
    resolution: Annotated[int | None, typer.Option(help="Side in pixels. [default: the model's]")] = None,
    buckets: Annotated[bool, typer.Option("--buckets", help="Keep aspect ratios, for finetune --buckets, instead of square cuts.")] = False,
    dtype: Annotated[str, typer.Option(help="Of what is stored: float32, float16 or bfloat16.")] = "float16",
    batch_size: Annotated[int, typer.Option(min=1, help="Samples that the networks see at once.")] = 8,
    workers: Annotated[int, typer.Option(min=0, help="Threads that read and decode; no effect on the result.")] = 2,
    wanted: FilterOptions,
    skip_damaged: SkipDamaged = False,
    max_lost: MaxLost = 0.01,
    verify_pictures: VerifyPictures = False,
    verify_hashes: VerifyHashes = False,
    device: Device = "auto",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Run a model's VAE and text encoders over shards once, and write shards of what they say, which finetune takes in place of the pictures.

    Training then needs neither of them in memory and loses no time to them; text dropout, posterior samples and everything that finetune trains stay
    as they are. Pictures are cut in the middle. Run the same command again to go on after an interruption: shards that are done are kept. Encoded
    shards belong to the model's VAE, text encoders and tokenizers, and to the resolution; another --out takes another encoding.

    Examples:

      tu-diffuse shards encode 'laion/*.tar' --out encoded/

      tu-diffuse shards encode 'laion/{00000..00099}.tar' --model my-sdxl --resolution 512 --buckets --out encoded/ --filter laion-aesthetic

      tu-diffuse finetune --shards 'encoded/*.tar' --out tuned --steps 2000 --lora 16

    With --json one line a shard (kind "shard": path, source, kept, dropped by reason, was_there), then one (kind "summary": the fields of check's,
    dropped, kept, encoding, seconds).
    """
    del debug  # read in main.py
    import time

    from ..pipeline.model.place import choose_device
    from ..shards.index import encoding_of
    from ..shards.specs import shard_name
    from ..training.encode_shards import encode_shards, load_encoder

    filters = _filters(wanted)
    encoder = load_encoder(open_unpacked(model, prediction_type), resolution, buckets, dtype, choose_device(device))
    index = _index(specs, skip_damaged, max_lost, verify_pictures=verify_pictures, verify_hashes=verify_hashes)
    if encoding_of(index) is not None:
        raise UsageError("The shards are encoded already; give the shards of pictures that they were made from.")
    reasons = _judged(index, filters)
    kept = reasons.count(None)
    started = time.monotonic()
    with progress("encoding sample", kept) as say:
        for done in encode_shards(index, reasons, encoder, out, batch_size=batch_size, threads=workers, progress=lambda count: say("", count)):
            line = asdict(done) | {"kind": "shard", "path": str(done.path), "source": shard_name(done.source)}
            print(json.dumps(line) if as_json else printable(str(done.path)), flush=True)
            say(f"{done.path}: {done.kept} samples{', was there' if done.was_there else ''}", done.kept if done.was_there else 0)
    seconds = round(time.monotonic() - started, 1)
    account = _account(index) | {"dropped": len(reasons) - kept, "kept": kept, "encoding": encoder.encoding.key, "seconds": seconds}
    _print_summary(account, as_json)


def _index(specs: Sequence[str], skip_damaged: bool, max_lost: float, *, verify_pictures: bool, verify_hashes: bool) -> "ShardIndex":
    from ..shards.index import index_shards
    from ..shards.specs import expand, shard_name

    if not 0 <= max_lost <= 1:
        raise UsageError(f"--max-lost {max_lost} is out of range; give a share from 0 to 1.")
    locations = expand(specs)
    with progress("shard", len(locations)) as say:
        index = index_shards(
            locations,
            verify_pictures=verify_pictures,
            verify_hashes=verify_hashes,
            skip_damaged=skip_damaged,
            max_lost=max_lost,
            progress=lambda report: say(f"{shard_name(report.location)}: {len(report.samples)} samples"),
        )
    for note in index.notes:
        print(f"note: {note}", file=sys.stderr)
    return index


def _filters(wanted: FilterOptions) -> "Filters":
    from ..shards.filters import aspect_range, make_filters

    limits: dict[str, Any] = {**vars(wanted), "aspect": aspect_range(wanted.aspect)}
    return make_filters(**limits)


def _judged(index: "ShardIndex", filters: "Filters") -> list[str | None]:
    """Why each sample is dropped, None where it is kept; some must be."""
    from ..shards.filters import check_filters, drop_reason

    check_filters(filters, [sample.columns for sample in index.samples])
    reasons = [drop_reason(filters, sample.columns) for sample in index.samples]
    if None not in reasons:
        raise DataError(f"None of the {len(reasons)} samples passes the filters; see what each drops with tu-diffuse shards stats.")
    return reasons


def _account(index: "ShardIndex") -> dict[str, object]:
    return {
        "shards": len(index.shards),
        "samples": len(index.samples),
        "runs": len(index.samples) + sum(index.skipped.values()),
        "skipped": dict(index.skipped),
        "members": dict(index.members),
        "vanished": index.vanished,
        "damaged_places": len(index.damages),
        "notes": list(index.notes),
    }


def _print_summary(summary: dict[str, object], as_json: bool) -> None:
    if as_json:
        print(json.dumps({"kind": "summary"} | summary))
    else:
        _print_text(summary)


def _print_text(facts: dict[str, object]) -> None:
    for line in lines_of({name: None if value in ({}, []) else value for name, value in facts.items()}):
        print(line)

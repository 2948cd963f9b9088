"""`tu-diffuse models`: models of the hub and on this machine."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UsageError
from .info import facts_of, lines_of
from .opening import open_unpacked
from .options import EXIT_CODES, Debug, Json, Loras, PredictionType, Variant

if TYPE_CHECKING:
    from ..pipeline.hub.models import HubName
    from ..pipeline.hub.pull import HubFile, Pull

app = typer.Typer(
    help="Models of the Hugging Face hub and on this machine: fetch, list, describe, verify and remove them; new ones with other text encoders.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Name = Annotated[str, typer.Argument(metavar="OWNER/NAME", help="A model of the hub; OWNER/NAME@REVISION is a branch, tag or commit of it.")]
AnyModel = Annotated[
    Path | None, typer.Argument(metavar="[MODEL]", help="A folder, a single file, or OWNER/NAME in the hub's cache. [default: the embedded model]")
]


@app.command(epilog=EXIT_CODES)
def pull(
    name: Name,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit. [default: main]")] = None,
    variant: Annotated[str | None, typer.Option(help="Take these weights where a part has them, as in fp16. [default: the plain ones]")] = None,
    file: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Fetch this file alone; may be repeated.")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Ask no network: only say where the model is in the cache.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Fetch a model from the Hugging Face hub into its cache, which other programs share, and print where it is.

    The revision is resolved once to a commit, and every file is of that commit. Fetched are safetensors and the texts beside them, never pickles or
    code; of each part's weights one variant. A pull that breaks off goes on with the same command: files that were finished are kept. Each file is
    compared with the hash that the hub records. For private and gated models set HF_TOKEN.

    Examples:

      tu-diffuse models pull stabilityai/stable-diffusion-xl-base-1.0 --variant fp16

      tu-diffuse models pull owner/name --revision 5d0c0f1c1a0b9a8e7d6c5b4a39281706f5e4d3c2

      tu-diffuse models pull owner/loras --file cats.safetensors

    With --json each line has an event: plan (name, commit, files, missing, megabytes to fetch), file (path, megabytes) before each is fetched, done
    (path, commit).
    """
    del debug  # read in main.py
    from ..pipeline.hub.models import cached, is_offline, origin_of

    asked = _hub_name(name, revision)
    if offline or is_offline():
        path = cached(asked)
        if path is None:
            raise UsageError(f"{asked} is not in the hub's cache; fetch it without --offline and HF_HUB_OFFLINE.")
        origin = origin_of(path if path.is_dir() else path.parent)
        _event(as_json, "done", {"path": str(path), "commit": None if origin is None else origin.revision}, str(path))
        return
    from ..pipeline.hub.pull import announce, fetch, megabytes, plan_pull

    def tell(work: "Pull", file: "HubFile | None") -> None:
        if not as_json:
            announce(work, file)
        elif file is not None:
            _event(as_json, "file", {"path": file.path, "megabytes": megabytes([file])})

    work = plan_pull(asked, variant, file or ())
    sizes = {"files": len(work.files), "missing": len(work.missing), "megabytes": megabytes(work.missing)}
    if as_json:
        _event(as_json, "plan", {"name": work.name.repo, "commit": work.commit, **sizes})
    path = fetch(work, tell)
    _event(as_json, "done", {"path": str(path), "commit": work.commit}, str(path))


@app.command(name="list", epilog=EXIT_CODES)
def list_models(
    folders: Annotated[list[Path] | None, typer.Argument(metavar="[FOLDER]...", help="Folders that hold models, besides the hub's cache.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List the models in the hub's cache, and in folders.

    Examples:

      tu-diffuse models list

      tu-diffuse models list ~/models --json

    With --json each model is one line: name, commit, refs (branches and tags that mean it), family (null: no model folder that can be used here),
    megabytes on disk, path.
    """
    del debug  # read in main.py
    from ..pipeline.hub.cache import cached_models, folder_models

    models = [*cached_models(), *(model for folder in folders or () for model in folder_models(folder))]
    for model in models:
        commit = "" if model["commit"] is None else f"@{model['commit'][:12]} {','.join(model['refs'])}".rstrip()
        line = f"{model['name']}{commit}  {model['family'] or '-'}  {model['megabytes']} MB"
        print(json.dumps(model) if as_json else line if model["commit"] else f"{line}  {model['path']}")
    if not models:
        print("no models: the embedded one is always there; see tu-diffuse models pull --help", file=sys.stderr)


@app.command(epilog=EXIT_CODES)
def info(
    model: AnyModel = None, prediction_type: PredictionType = None, variant: Variant = None, as_json: Json = False, debug: Debug = False
) -> None:
    """Show what a model is: family, licence, parts, parameters, experts with their noise levels, size, hash. No weights are loaded.

    A LoRA file, or a folder of one network such as a T5 encoder, is described too.

    Examples:

      tu-diffuse models info

      tu-diffuse models info models/my-sdxl --json

    With --json one line: kind, name, commit, hash, licence, family, prediction, size_multiple, parameters, megabytes, defaults, experts and parts;
    of a LoRA or network kind, name, commit, licence, architecture, tensors, parameters, dtype and megabytes.
    """
    del debug  # read in main.py
    from ..pipeline.hub.found import found

    facts = facts_of(None if model is None else found(model, fetch=False), prediction_type, variant)
    if as_json:
        print(json.dumps(facts))
    else:
        for line in lines_of(facts):
            print(line)


@app.command(epilog=EXIT_CODES)
def verify(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A model folder, a file, or OWNER/NAME in the hub's cache.")],
    against: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="Ask the hub for the hashes of this model. [default: those that are recorded here]")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Read a model whole and compare it with the hashes that are recorded for it. Exits with 4 when something differs, 1 when nothing is recorded.

    Models in the hub's cache have the hash of every file; folders those of experts in experts.json and of the bases of deltas.

    Examples:

      tu-diffuse models verify stabilityai/stable-diffusion-xl-base-1.0

      tu-diffuse models verify my-copy/ --against owner/name@v1.0

    With --json one line: checked, bad and unrecorded (names of files, or folders of experts), bytes that were read.
    """
    del debug  # read in main.py
    from ..pipeline.hub.cache import verify as verify_model
    from ..pipeline.hub.found import found

    path = found(model, fetch=False)
    if not path.exists():
        raise UsageError(f"{str(model)!r} is not there; name a model folder, a file, or OWNER/NAME in the hub's cache.")
    recorded = None
    if against is not None:
        from ..pipeline.hub.pull import listing

        recorded = listing(_hub_name(against, None))
    result = verify_model(path, recorded)
    if as_json:
        print(json.dumps(asdict(result)))
    else:
        for name in result.bad:
            print(f"differs: {name}")
        read = f"{len(result.checked)} checked ({result.bytes / 1e6:.1f} MB)"
        print(f"{read}, {len(result.bad)} differ, {len(result.unrecorded)} have no recorded hash")
    if result.bad:
        raise typer.Exit(4)
    if not result.checked:
        raise typer.Exit(1)


@app.command(epilog=EXIT_CODES)
def remove(
    name: Name,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit. [default: all that the cache holds]")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Remove a model from the hub's cache, after asking. Folders are never removed.

    Examples:

      tu-diffuse models remove owner/name

      tu-diffuse models remove owner/name --revision 5d0c0f1c1a0b9a8e7d6c5b4a39281706f5e4d3c2 --yes

    With --json one line: name, commits that were removed, megabytes that this set free.
    """
    del debug  # read in main.py
    from ..pipeline.hub.cache import removable
    from ..pipeline.hub.cache import remove as remove_commits

    asked = _hub_name(name, revision)
    commits, size = removable(asked)
    if not yes:
        if not sys.stdin.isatty():
            raise UsageError(f"{asked} would be removed ({len(commits)} commits, {size} MB) but nobody can be asked here; give --yes.")
        typer.confirm(f"Remove {asked} ({len(commits)} commits, {size} MB)?", abort=True, err=True)
    remove_commits(commits)
    facts = {"name": asked.repo, "commits": commits, "megabytes": size}
    print(json.dumps(facts) if as_json else f"removed {asked.repo}: {', '.join(commit[:12] for commit in commits)}, {size} MB")


@app.command(epilog=EXIT_CODES)
def convert(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A folder in diffusers' layout, or a single .safetensors file.")],
    out: Annotated[Path, typer.Option("--out", metavar="MODEL", help="What is written: a file where it ends in .safetensors, else a folder.")],
    dtype: Annotated[str | None, typer.Option("--dtype", help="float32, float16 or bfloat16. [default: as stored]")] = None,
    ema: Annotated[bool, typer.Option("--ema", help="Take a single file's averaged U-Net (model_ema.) instead of the other.")] = False,
    lora: Loras = None,
    prediction_type: PredictionType = None,
    variant: Variant = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a model as a single file or as a folder, as it is or in another number format.

    The folder is what diffusers and transformers load, the file is what other programs load. A file cannot say everything (heads, noise schedule,
    tokenizer); a model that would be read as another one is refused.

    Examples:

      tu-diffuse models convert sd15.safetensors --out sd15

      tu-diffuse models convert tuned --out tuned.safetensors --dtype float16

      tu-diffuse models convert sd21-768.safetensors --prediction-type v --out sd21

      tu-diffuse models convert sd15 --lora style.safetensors:0.8 --out styled

    With --json one line: path, and what `models info` prints of the new model.
    """
    del debug  # read in main.py
    from ..pipeline.adapters.adapters import Shelf
    from ..pipeline.model.convert import convert as convert_model
    from ..pipeline.model.describe import describe
    from ..pipeline.model.folder import open_folder

    folder = open_folder(model, prediction_type, variant)
    shelf = Shelf(folder)
    adapters = shelf.adapters(tuple(shelf.lora(text) for text in lora or []))
    for said in shelf.partial:
        print(said, file=sys.stderr)
    convert_model(folder, out, dtype, ema, adapters)
    print(json.dumps({"path": str(out), **describe(open_folder(out))}) if as_json else out)


def _hub_name(text: str, revision: str | None) -> "HubName":
    from ..pipeline.hub.models import HubName, hub_name

    name = hub_name(text)
    if name is None:
        raise UsageError(f"{text!r} is no name of a model on the hub; write owner/name, or owner/name@revision.")
    if revision is not None and name.revision is not None:
        raise UsageError(f"{text!r} and --revision {revision!r} both name a revision; leave one out.")
    if revision is None:
        return name
    pinned = hub_name(f"{name.repo}@{revision}")
    if pinned is None:
        raise UsageError(f"--revision {revision!r} cannot be one; name a branch, a tag or a whole commit id.")
    return HubName(name.repo, pinned.revision)


def _event(as_json: bool, event: str, facts: dict[str, object], text: str = "") -> None:
    print(json.dumps({"event": event, **facts}) if as_json else text, flush=True)


@app.command("add-t5", epilog=EXIT_CODES)
def add_t5(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A model folder of Stable Diffusion 1 or 2, SDXL or its refiner.")],
    t5: Annotated[
        Path, typer.Option("--t5", metavar="FOLDER", help="A T5 encoder and its tokenizer, as transformers saves them; or OWNER/NAME of the hub.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="The new model folder; must not exist.")],
    link: Annotated[bool, typer.Option("--link", help="Hard links instead of copies; then never edit files in place.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Give a model that reads prompts with CLIP alone a T5 encoder, whose part is trained afterwards.

    The new model draws what the old one draws, bit by bit, until `finetune --train conditioner` has taught it what to make of T5; --no-t5 gives the
    old pictures at any time.

    Examples:

      tu-diffuse models add-t5 models/sd15 --t5 models/t5-v1_1-large --out models/sd15-t5

      tu-diffuse finetune --model models/sd15-t5 --shards 'laion/*.tar' --train conditioner --out tuned

    With --json one line: kind, name, hash, family, parameters and the rest of what `models info` prints.
    """
    del debug  # read in main.py
    from ..pipeline.model.describe import describe
    from ..training.text_parts import add_t5 as write

    made = write(open_unpacked(model), t5, out, link)
    print(json.dumps(describe(made)) if as_json else str(out))


@app.command("use-clip", epilog=EXIT_CODES)
def use_clip(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A model folder.")],
    clip: Annotated[str, typer.Option("--clip", metavar="NAME", help="In open_clip's layout: local-dir:FOLDER, or hf-hub:OWNER/NAME.")],
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="The new model folder; must not exist.")],
    part: Annotated[str, typer.Option("--part", help="The tower that it replaces: text_encoder, or text_encoder_2.")] = "text_encoder",
    link: Annotated[bool, typer.Option("--link", help="Hard links instead of copies; then never edit files in place.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Let a model read prompts with a CLIP text tower from open_clip, of the same shape as its own.

    The tower is written under transformers' names, so that everything else here and elsewhere takes it. The tokenizer stays the model's.

    Examples:

      tu-diffuse models use-clip models/sd2 --clip local-dir:CLIP-ViT-H-14 --out models/sd2-other

      tu-diffuse models use-clip models/sd2 --clip hf-hub:laion/CLIP-ViT-H-14-laion2B-s32B-b79K --out models/sd2-other

    With --json one line: kind, name, hash, family, parameters and the rest of what `models info` prints.
    """
    del debug  # read in main.py
    from ..pipeline.model.describe import describe
    from ..training.text_parts import tower_folder
    from ..training.text_parts import use_clip as write

    made = write(open_unpacked(model), tower_folder(clip), out, part, link)
    print(json.dumps(describe(made)) if as_json else str(out))

"""Check a device with one model: which attention kernels compute, how far its pictures are from the CPU's, and how long and how much memory it takes.

    python scripts/gpu_check.py --out build/gpu
    python scripts/gpu_check.py --out build/gpu --model sd15/ --dtypes float16 bfloat16 --only kernels pictures

- kernels: the attention operators and, with CUDA, the kernels that PyTorch's profiler saw in one picture, each with how often.
- pictures: one picture and a batch, in each number format: the distance from the CPU's picture in float32, seconds, and the highest memory.
- decoding: a batch of the embedded model with and without decoding beside drawing; the pictures must be equal.
- training: the embedded model's losses on the device and on the CPU, the same steps.

Prints lines of Markdown and writes them, with the machine's name, to check.md in --out. Ends with exit code 1 where a picture or loss is too far off,
or no fused kernel computed attention.
`--device cpu` tries the script itself.
"""

import argparse
import json
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from bench_finetune import indices, plans
from torch.profiler import ProfilerActivity, profile
from tu_diffuse.batch.drafts import Stepped
from tu_diffuse.batch.items import make_items
from tu_diffuse.batch.journal import Entry
from tu_diffuse.batch.lines import Line
from tu_diffuse.batch.plan import Plan, extend
from tu_diffuse.batch.run import draw_missing
from tu_diffuse.batch.studio import Studio
from tu_diffuse.pictures import decode_picture
from tu_diffuse.pipeline.model.folder import open_folder
from tu_diffuse.pipeline.model.loading import load_model
from tu_diffuse.pipeline.model.place import choose_place
from tu_diffuse.pipeline.request import Request
from tu_diffuse.pipeline.resolve import resolve
from tu_diffuse.pipeline.text_to_image import Model, Picture, text_to_image
from tu_diffuse.training.finetune import Plan as FinetunePlan
from tu_diffuse.training.finetune import finetune
from tu_diffuse.training.loop import Logged

PROMPT = "a red apple to the left of a blue star"
_ATTENTION = re.compile(r"scaled_dot_product|flash|fmha|attention", re.IGNORECASE)
_FUSED = re.compile(r"attention.*(flash|efficient|cudnn)|(flash|efficient|cudnn).*attention")
_FAR = {"float32": 4, "float16": 40, "bfloat16": 96}  # of 255, that a picture's 99th percentile may differ from the CPU's
_LOSS = 1e-3


def pictures(model: Model, request: Request) -> list[torch.Tensor]:
    """(height, width, 3) uint8 of each seed."""
    return [event.pixels for event in text_to_image(model, request) if isinstance(event, Picture)]


def kernels(model: Model, request: Request) -> Counter[str]:
    """Names of attention operators and kernels, and how often each ran while a picture was drawn."""
    device = model.place.device.type
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]) as seen:
        pictures(model, request)
    names = (str(event.name) for event in seen.events() or [])
    return Counter(name[:120] for name in names if _ATTENTION.search(name))


def apart(first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> tuple[int, float]:
    """The 99th percentile and the mean of the differences, of 255.

    Raises:
        SystemExit: the first is all of one colour, which would prove nothing.
    """
    if any(int(picture.max()) - int(picture.min()) < 16 for picture in first):
        raise SystemExit("a picture is all of one colour, which proves nothing")
    difference = torch.cat([(a.int() - b.int()).abs().flatten() for a, b in zip(first, second, strict=True)]).float()
    return int(difference.sort().values[int(0.99 * (len(difference) - 1))]), float(difference.mean())


def seconds_of(model: Model, request: Request, rounds: int) -> float:
    """Median seconds of drawing, with what computes it warm; pixels come back to the CPU, so it waits for the device."""
    taken: list[float] = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        pictures(model, request)
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[1:])


def highest_memory(device: str) -> str:
    """Of the device since the last reset, or of this process."""
    if device == "cuda":
        return f"{torch.cuda.max_memory_allocated() / 2**20:.0f} MiB of the device"
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return f"{int(line.split()[1]) / 1024:.0f} MiB of the process"


def check_kernels(options: argparse.Namespace) -> Iterator[str]:
    """See the module."""
    folder = open_folder(options.model)
    for dtype in options.dtypes:
        model = load_model(folder, dtype=dtype, device=options.device)
        seen = kernels(model, resolve(folder, PROMPT, [1], steps=options.steps))
        yield from (f"kernels, {dtype}: {count} × `{name}`" for name, count in seen.most_common())
        if not any(_FUSED.search(name) for name in seen):
            yield f"kernels, {dtype}: NOT FUSED"


def check_pictures(options: argparse.Namespace) -> Iterator[str]:
    """See the module."""
    folder = open_folder(options.model)
    single, several = (resolve(folder, PROMPT, range(1, 1 + count), steps=options.steps) for count in (1, options.count))
    wanted = pictures(load_model(folder, dtype="float32", device="cpu"), single)
    for dtype in options.dtypes:
        model = load_model(folder, dtype=dtype, device=options.device)
        if model.place.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        far, mean = apart(wanted, pictures(model, single))
        times = [seconds_of(model, request, options.rounds) for request in (single, several)]
        memory = highest_memory(model.place.device.type)
        took = f"{times[0]:.3f} s for one, {times[1]:.3f} s for {options.count}"
        yield f"pictures, {dtype}: 99% within {far} of 255 (mean {mean:.2f}){'' if far <= _FAR[dtype] else ' TOO FAR'}; {took}; {memory}"


def check_decoding(options: argparse.Namespace) -> Iterator[str]:
    """See the module."""
    folder, place = open_folder(None), choose_place(device=options.device)
    steps = {} if options.steps is None else {"steps": options.steps}
    lines = [Line(number + 1, {"prompt": PROMPT, "seed": number, **steps}, {}) for number in range(4 * options.count)]
    items, _ = make_items(folder, lines, defaults={}, sweep={}, circumstances={})
    plan = extend(Plan(folder.fingerprint), items, options.count)
    found: dict[bool, tuple[float, list[torch.Tensor]]] = {}
    for beside in (False, True, False, True):  # the first two are warm-ups
        setattr(Studio, "decodes_beside", beside)  # noqa: B010  # a property
        with tempfile.TemporaryDirectory() as out:
            started = time.perf_counter()
            draw_missing(Studio(folder, place, roomy=True), plan, {}, Path(out), part=(1, 1), window_bytes=0, tell=_step, kept=_entry)
            found[beside] = (
                time.perf_counter() - started,
                [torch.from_numpy(decode_picture(path.read_bytes()).copy()) for path in sorted(Path(out).glob("0*.png"))],
            )
    (between, first), (beside, second) = found[False], found[True]
    equal = len(first) == len(items) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    yield f"decoding: {len(items)} pictures beside drawing in {beside:.2f} s, between in {between:.2f} s, {'equal' if equal else 'NOT EQUAL'}"


def _step(event: Stepped) -> None:
    """Nobody is told."""


def _entry(entry: Entry) -> None:
    """Nobody is told."""


def trained(plan: FinetunePlan, out: Path, device: str) -> tuple[float, list[float]]:
    """Images a second, and the losses of the log."""
    seconds: list[float] = []
    tell = lambda event: seconds.append(event.seconds_a_step) if isinstance(event, Logged) else None  # noqa: E731
    finetune(plan, out, tell, device=choose_place(device=device).device)
    losses = [json.loads(line)["loss"] for line in (out / "checkpoints" / "losses.jsonl").read_text().splitlines()]
    return plan.config.batch_size / seconds[-1], losses


def check_training(options: argparse.Namespace) -> Iterator[str]:
    """See the module."""
    sizes = argparse.Namespace(samples=64, workers=2, steps=options.training_steps, batch_size=8)
    with tempfile.TemporaryDirectory() as work:
        folder = open_folder(None)
        _, plan = plans(folder, indices(folder, Path(work), sizes), sizes, None)
        here, wanted = trained(plan, Path(work) / "on-cpu", "cpu")
        there, losses = trained(plan, Path(work) / "on-device", options.device)
    far = max(abs(a - b) for a, b in zip(losses, wanted, strict=True))
    yield f"training, float32, batches of 8: {there:.1f} images/s on {options.device}, {here:.1f} on the CPU"
    yield f"training: losses {losses} differ by at most {far:.2g} from the CPU's{'' if far <= _LOSS else ' TOO FAR'}"


CHECKS = {"kernels": check_kernels, "pictures": check_pictures, "decoding": check_decoding, "training": check_training}


def main() -> None:
    """Check, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--model", type=Path, help="a folder or file; the embedded model by default")
    parser.add_argument("--dtypes", nargs="+", choices=tuple(_FAR), default=["float32", "float16", "bfloat16"])
    parser.add_argument("--only", nargs="+", choices=tuple(CHECKS), default=list(CHECKS))
    parser.add_argument("--steps", type=int, help="of a picture; the model's by default")
    parser.add_argument("--count", type=int, default=8, help="pictures in a batch")
    parser.add_argument("--rounds", type=int, default=5, help="timed")
    parser.add_argument("--training-steps", type=int, default=40, help="a multiple of 20")
    options = parser.parse_args()
    device = choose_place(device=options.device).device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    lines = [f"# {name}, torch {torch.__version__}", ""]
    print(lines[0], flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    for check in options.only:
        for line in CHECKS[check](options):
            lines.append(f"- {line}")
            print(lines[-1], flush=True)
            (options.out / "check.md").write_text("\n".join(lines) + "\n")
    if any(bad in line for line in lines for bad in ("TOO FAR", "NOT EQUAL", "NOT FUSED")):
        sys.exit(1)


if __name__ == "__main__":
    main()

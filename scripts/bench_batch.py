"""Time `tu-diffuse batch` against a loop over diffusers' and transformers' classes, with the same weights, prompts, seeds, sampler and steps.

    python scripts/bench_batch.py --prompts 200 --rounds 3

The embedded model is no pipeline of diffusers' own, so the loop is written out here as their pipelines write it: CLIPTextModelWithProjection and
T5EncoderModel, our conditioner (no library has it), UNet2DConditionModel for each expert with the unconditional rows in the same call,
DPMSolverMultistepScheduler, AutoencoderDC, PNG files. "plain" draws one prompt at a time, "batched" 16. Pictures differ a little, because our sampler
restarts its history where the expert changes. Each contender runs in a process of its own, in every round in another order; its time runs from
the loading of the model to the last file on the disk, imports left out. Prints seconds, the ratio to ours in the same round with its range, and the
highest memory of each process.

    python scripts/bench_batch.py --swapping --prompts 48 --rounds 3

draws with one part of the model in memory at a time: expert by expert through all prompts, as `batch --memory` does, against prompt by prompt, which
loads every part for every prompt.

    python scripts/bench_batch.py --decoding --rounds 5

compares `tu-diffuse batch` with itself: each batch decoded when it is drawn ("between"), and in a thread of its own while the next one is drawn
("beside"). The command takes the second way with CUDA, and on a CPU with cores to spare.
"""

import argparse
import itertools
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ratios import report, spread

COLOURS = ("red", "green", "blue", "yellow", "orange", "purple", "pink", "black")
SHAPES = ("circle", "square", "triangle", "star", "heart", "ring", "crescent", "hexagon")
BATCH = 16


def prompts(count: int) -> list[str]:
    """Distinct prompts of the embedded model's world."""
    things = [f"{colour} {shape}" for colour, shape in itertools.product(COLOURS, SHAPES)]
    pairs = list(itertools.permutations(things, 2))  # 4032, which 37 does not divide
    return [f"a {a} to the left of a {b}" for a, b in (pairs[37 * number % len(pairs)] for number in range(count))]


def ours(texts: list[str], out: Path) -> float:
    """Seconds that `tu-diffuse batch` takes."""
    from tu_diffuse.allocator import keep_freed_memory
    from tu_diffuse.cli.main import run

    keep_freed_memory()  # as the command does
    (out / "prompts.txt").write_text("".join(f"{text} --seed {seed}\n" for seed, text in enumerate(texts)))
    started = time.perf_counter()
    if run(["batch", str(out / "prompts.txt"), "--out", str(out / "pictures")]) != 0:
        raise SystemExit("the batch failed")
    return time.perf_counter() - started


def between(texts: list[str], out: Path, beside: bool = False) -> float:
    """Seconds that `tu-diffuse batch` takes when it decodes between the drawing of batches, or beside it."""
    from tu_diffuse.batch.studio import Studio

    setattr(Studio, "decodes_beside", beside)  # noqa: B010  # a property
    return ours(texts, out)


def beside(texts: list[str], out: Path) -> float:
    """As `between`, decoding beside."""
    return between(texts, out, True)


def theirs(texts: list[str], out: Path, size: int = 1) -> float:
    """Seconds that the loop takes, `size` prompts at a time."""
    import torch
    from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, UNet2DConditionModel
    from PIL import Image
    from transformers import CLIPTextModelWithProjection, T5EncoderModel
    from tu_diffuse.pipeline.model.folder import EMBEDDED, open_folder
    from tu_diffuse.text_encoders.conditioner import Conditioner, ConditionerConfig
    from tu_diffuse.text_encoders.tokenizer import load_tokenizer
    from tu_diffuse.weights import load_weights

    started = time.perf_counter()
    folder = open_folder(None)
    own = folder.defaults
    clip: Any = CLIPTextModelWithProjection.from_pretrained(EMBEDDED / "text_encoder", dtype=torch.float32)
    t5: Any = T5EncoderModel.from_pretrained(EMBEDDED / "text_encoder_2", dtype=torch.float32)
    conditioner = load_weights(
        Conditioner(ConditionerConfig.from_dict(folder.configs["conditioner"])), EMBEDDED / "conditioner", dtype=torch.float32, device="cpu"
    )
    unets: list[tuple[float, Any]] = [
        (e.sigma_min, UNet2DConditionModel.from_pretrained(EMBEDDED / e.subfolder, torch_dtype=torch.float32)) for e in folder.experts
    ]
    vae: Any = AutoencoderDC.from_pretrained(EMBEDDED / "vae", torch_dtype=torch.float32)
    mean, deviation = (torch.tensor(vae.config[name])[:, None, None] for name in ("latents_mean", "latents_std"))
    tokenizers = [load_tokenizer(EMBEDDED / name) for name in ("tokenizer", "tokenizer_2")]
    scheduler: Any = DPMSolverMultistepScheduler(
        trained_betas=_betas(EMBEDDED), prediction_type="v_prediction", timestep_spacing="trailing", algorithm_type="dpmsolver++"
    )
    for first in range(0, len(texts), size):
        with torch.no_grad():
            said = texts[first : first + size]
            tokens = [tokenizer.encode(["", *said]) for tokenizer in tokenizers]
            pooled = clip(input_ids=tokens[0].ids)
            features = t5(input_ids=tokens[1].ids, attention_mask=tokens[1].mask.long()).last_hidden_state
            keep = torch.tensor([False] + [True] * len(said))
            told = conditioner(pooled.last_hidden_state, tokens[0].mask, pooled.text_embeds, features, tokens[1].mask, keep, keep)
            rows = torch.tensor([0] * len(said) + list(range(1, len(said) + 1)))
            seeds = range(first, first + len(said))
            x = torch.cat([torch.randn((1, folder.channels, 8, 8), generator=torch.Generator().manual_seed(seed)) for seed in seeds])
            scheduler.set_timesteps(own.steps)
            x = x * scheduler.init_noise_sigma
            for t in scheduler.timesteps:
                level = float(folder.noise.sigma_at(t.double()))
                unet = next(unet for low, unet in reversed(unets) if level >= low)
                output = unet(
                    scheduler.scale_model_input(torch.cat([x, x]), t),
                    t,
                    told.tokens[rows],
                    class_labels=told.pooled[rows],
                    encoder_attention_mask=told.mask[rows],
                ).sample
                without, guided = output.chunk(2)
                x = scheduler.step(without + own.guidance * (guided - without), t, x).prev_sample
            pictures = vae.decode(x / vae.config["scaling_factor"] * deviation + mean).sample
            pixels = ((pictures / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        for seed, picture in zip(seeds, pixels, strict=True):
            Image.fromarray(picture).save(out / f"{seed}.png")
    return time.perf_counter() - started


def batched(texts: list[str], out: Path) -> float:
    """Seconds that the loop takes, 16 prompts at a time."""
    return theirs(texts, out, BATCH)


def _betas(folder: Path) -> list[float]:
    return json.loads((folder / "scheduler" / "scheduler_config.json").read_text())["trained_betas"]


def swapping(texts: list[str], window_bytes: int, size: int) -> tuple[float, int]:
    """Seconds and loads of model parts that drawing without room for two parts takes, `size` prompts a batch."""
    from tu_diffuse.batch.engine import render
    from tu_diffuse.batch.items import make_items
    from tu_diffuse.batch.lines import Line
    from tu_diffuse.batch.studio import Studio
    from tu_diffuse.pipeline.model.folder import open_folder
    from tu_diffuse.pipeline.model.place import choose_place

    folder = open_folder(None)
    lines = [Line(number + 1, {"prompt": text, "seed": number}, {}) for number, text in enumerate(texts)]
    items, _ = make_items(folder, lines, defaults={}, sweep={}, circumstances={})
    studio = Studio(folder, choose_place(), roomy=False)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as parked:
        batches = [items[i : i + size] for i in range(0, len(items), size)]
        drawn = list(render(studio, batches, window_bytes, Path(parked), lambda _: None))
    assert len(drawn) == len(texts)
    return time.perf_counter() - started, sum(studio.loads.values())


def compare_swapping(texts: list[str], rounds: int) -> None:
    """Run both orders in turn and print."""
    swapping(texts[:1], 1, 1)
    ways: dict[str, Callable[[], tuple[float, int]]] = {
        "expert by expert": lambda: swapping(texts, 1 << 40, BATCH),
        "expert by expert, batches of one": lambda: swapping(texts, 1 << 40, 1),
        "prompt by prompt": lambda: swapping(texts, 1, 1),
    }
    results: dict[str, list[tuple[float, int]]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            results[name].append(way())
    first = [seconds for seconds, _ in results["expert by expert"]]
    for name, values in results.items():
        seconds = [took for took, _ in values]
        ratios = [took / own for took, own in zip(seconds, first, strict=True)]
        print(f"{name}: {values[0][1]} loads, {statistics.median(seconds):.1f} s (median), {spread(ratios)} times the first")


CONTENDERS: dict[str, Callable[[list[str], Path], float]] = {"ours": ours, "plain": theirs, "batched": batched, "between": between, "beside": beside}


def measured(name: str, texts: list[str], results: "multiprocessing.Queue[tuple[float, float]]") -> None:
    """Run a contender; seconds, and the process's highest memory in MB."""
    with tempfile.TemporaryDirectory() as folder:
        CONTENDERS[name](texts[:1], _made(Path(folder) / "warm"))  # imports
        seconds = CONTENDERS[name](texts, _made(Path(folder) / "run"))
    results.put((seconds, highest_memory()))


def highest_memory() -> float:
    """The highest resident memory of this process in MB, from Linux's /proc; `getrusage` would count what the parent had when it started this one."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def agree(texts: list[str]) -> int:
    """The largest difference (of 255) between our pictures and the loop's."""
    import numpy as np
    from PIL import Image

    with tempfile.TemporaryDirectory() as folder:
        first, second = (_made(Path(folder) / name) for name in ("ours", "theirs"))
        ours(texts, first)
        theirs(texts, second)
        mine = sorted((first / "pictures").glob("0*.png"))
        pairs = [(mine[seed], second / f"{seed}.png") for seed in range(len(texts))]
        return max(int(np.abs(np.asarray(Image.open(a), np.int16) - np.asarray(Image.open(b), np.int16)).max()) for a, b in pairs)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--swapping", action="store_true", help="compare orders of work with one part of the model in memory")
    parser.add_argument("--decoding", action="store_true", help="compare decoding beside drawing with decoding between")
    options = parser.parse_args()
    texts = prompts(options.prompts)
    if options.swapping:
        compare_swapping(texts, options.rounds)
        return
    print(f"largest difference of the first 8 pictures: {agree(texts[:8])} of 255")
    context = multiprocessing.get_context("spawn")
    contenders = ("between", "beside") if options.decoding else ("ours", "plain", "batched")
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    memory = dict.fromkeys(contenders, 0.0)
    for number in range(options.rounds):
        turn = number % len(contenders)
        for name in contenders[turn:] + contenders[:turn]:
            results: multiprocessing.Queue[tuple[float, float]] = context.Queue()
            process = context.Process(target=measured, args=(name, texts, results))
            process.start()
            took, highest = results.get()
            process.join()
            seconds[name].append(took)
            memory[name] = max(memory[name], highest)
    report(seconds, memory, contenders[0])


if __name__ == "__main__":
    main()

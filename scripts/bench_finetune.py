"""Time fine-tuning, each pair interleaved in one run: loading, our trainer against a bare PyTorch loop, and encoded shards against pictures.

    python scripts/bench_finetune.py

The embedded model on shards of the synthetic world, at float32. Prints a Markdown table; every ratio is the median over rounds, with the lowest
and the highest in brackets. A round times both sides one after the other, so that what else the machine does meets both.

- Loader: samples read, decoded and cut, or read and unpacked, a second, with the threads of `--workers`.
- Overhead: `training.finetune.finetune` against the same U-Nets, batches, loss and optimizer in a loop of a dozen lines. Both read encoded shards,
  where a step is shortest and the trainer's own share of it largest; the checkpoint at the end of a run is not timed.
- Encoded against pictures: images a second of `finetune`, by what its log says, with all weights and with `--lora`.
"""

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tu_diffuse.allocator import keep_freed_memory
from tu_diffuse.pipeline.model.folder import ModelFolder, open_folder
from tu_diffuse.shards.index import ShardIndex, index_shards
from tu_diffuse.training.batches import ahead, batch_plan, crop_generator
from tu_diffuse.training.config import FinetuneConfig
from tu_diffuse.training.encode_shards import encode_shards, load_encoder
from tu_diffuse.training.encoded import open_source
from tu_diffuse.training.finetune import Plan, finetune, make_plan
from tu_diffuse.training.loop import Logged, generator_for
from tu_diffuse.training.objective import Objective, denoising_loss, draw
from tu_diffuse.training.subject import load_subject, predictor
from tu_diffuse.training.turns import expert_of_step

sys.path.insert(0, str(Path(__file__).parent / "embedded"))
from world import STAGES
from write_shards import write_shard

CPU = torch.device("cpu")


def loader_rate(plan: Plan, batches: int) -> float:
    """Samples a second that the reader gives when nothing else is done."""
    source = open_source(plan.folder, plan.index, plan.stored, CPU)

    def read(place: int) -> object:
        number = plan.trained[place]
        return source.read(number, plan.sizes[plan.bucket_of[number]], crop_generator(plan.config.seed, number))

    planned = batch_plan([plan.bucket_of[number] for number in plan.trained], plan.config.batch_size, plan.config.seed)
    made = ahead(read, itertools.islice(planned, batches), plan.config.workers)
    started = time.perf_counter()
    count = sum(len(rows) for rows in made)
    return count / (time.perf_counter() - started)


def our_rate(plan: Plan) -> float:
    """Images a second of `finetune`, by its log, without the start and the end of the run."""
    seconds: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        finetune(plan, Path(folder) / "run", lambda event: seconds.append(event.seconds_a_step) if isinstance(event, Logged) else None)
    return plan.config.batch_size / statistics.mean(seconds[1:])


def bare_rate(plan: Plan) -> float:
    """Images a second of the least that trains the same networks on the same batches; the first log interval of `our_rate` is left out here too."""
    config = plan.config
    subject, source = load_subject(plan.folder, None, CPU), open_source(plan.folder, plan.index, plan.stored, CPU)
    parameters = list(subject.unets.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay, fused=True)
    noise = plan.folder.noise
    planned = batch_plan([plan.bucket_of[number] for number in plan.trained], config.batch_size, config.seed)
    made = ahead(lambda place: source.read(plan.trained[place], plan.sizes[0], None), planned, config.workers)
    started = 0.0
    for step, rows in enumerate(itertools.islice(made, config.steps)):
        if step == LOG_EVERY:
            started = time.perf_counter()
        generator = generator_for(config.seed, step)
        batch = source.batch(rows, [generator] * len(rows))
        expert = expert_of_step(subject.owned, step)
        first, end = subject.owned[expert]
        objective = Objective(sigmas=noise.sigmas, t_min=first, t_max=end, prediction_type=noise.prediction_type)
        drawn = draw(objective, tuple(batch.latents.shape), generator)
        denoising_loss(predictor(subject, expert, batch.said), objective, batch.latents, drawn)["loss"].backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    made.close()
    return config.batch_size * (config.steps - LOG_EVERY) / (time.perf_counter() - started)


LOG_EVERY = 20  # steps between two lines of finetune's log


def compared(rounds: int, one: Callable[[], float], other: Callable[[], float]) -> tuple[float, float, str]:
    """Median rates of two sides, and the ratio of the first to the second as median, lowest and highest over the rounds."""
    pairs = [(one(), other()) if number % 2 == 0 else tuple(reversed((other(), one()))) for number in range(rounds)]
    ratios = [first / second for first, second in pairs]
    spread = f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
    return statistics.median(first for first, _ in pairs), statistics.median(second for _, second in pairs), spread


def indices(folder: ModelFolder, work: Path, options: argparse.Namespace) -> tuple[ShardIndex, ShardIndex]:
    """Shards of pictures, and of what they encode to."""
    raw = index_shards([str(write_shard(work, 0, options.samples, STAGES["shapes"], 0, "jpg"))])
    encoder = load_encoder(folder, None, False, "float16", CPU)
    done = list(encode_shards(raw, [None] * len(raw.samples), encoder, work / "encoded", threads=options.workers))
    return raw, index_shards([str(shard.path) for shard in done])


def plans(folder: ModelFolder, of: tuple[ShardIndex, ShardIndex], options: argparse.Namespace, lora: int | None) -> tuple[Plan, Plan]:
    """The runs on them."""
    config = FinetuneConfig(
        shards=("world",), steps=options.steps, batch_size=options.batch_size, workers=options.workers, save_every=10**9, lora=lora
    )
    raw, encoded = (make_plan(config, folder, index, range(len(index.samples))) for index in of)
    return raw, encoded


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=("loader", "bare", "encoded", "lora"), help="some of the comparisons")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60, help=f"a run, a multiple of {LOG_EVERY}; the first {LOG_EVERY} are not timed")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--lora", type=int, default=16, help="rank of the last comparison")
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of PyTorch")
    options = parser.parse_args()
    if options.steps < 2 * LOG_EVERY or options.steps % LOG_EVERY:
        parser.error(f"--steps {options.steps} is not a multiple of {LOG_EVERY} from {2 * LOG_EVERY} on")
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # as the command does, for both sides
    with tempfile.TemporaryDirectory() as work:
        folder = open_folder(None)
        both = indices(folder, Path(work), options)
        raw, encoded = plans(folder, both, options, None)
        raw_lora, encoded_lora = plans(folder, both, options, options.lora)
        batches = options.samples // options.batch_size
        rows: dict[str, tuple[str, Callable[[], float], Callable[[], float]]] = {
            "loader": ("loader, samples/s: encoded, pictures", lambda: loader_rate(encoded, batches), lambda: loader_rate(raw, batches)),
            "bare": ("training, images/s: finetune, bare PyTorch loop", lambda: our_rate(encoded), lambda: bare_rate(encoded)),
            "encoded": ("finetune, images/s: encoded, pictures", lambda: our_rate(encoded), lambda: our_rate(raw)),
            "lora": (f"finetune --lora {options.lora}, images/s: encoded, pictures", lambda: our_rate(encoded_lora), lambda: our_rate(raw_lora)),
        }
        print("| what | first | second | first / second, median (lowest to highest) |\n|---|---|---|---|")
        for what, one, other in (rows[name] for name in options.only or rows):
            first, second, spread = compared(options.rounds, one, other)
            print(f"| {what} | {first:.1f} | {second:.1f} | {spread} |", flush=True)
    described = f"{options.rounds} rounds, {options.steps} steps a run, batch size {options.batch_size}"
    print(f"\n{described}; {options.threads} PyTorch threads, {options.workers} reader threads, torch {torch.__version__}.")


if __name__ == "__main__":
    main()

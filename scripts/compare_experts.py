"""Two experts against one network: a base forked at a timestep and each child trained on its half, and the base trained on for as many steps in all.

    python scripts/compare_experts.py --work DIR [--model FOLDER] [--steps 2000] [--out docs/experts.md]

The base is a model folder of one expert. By default it is made here: the embedded model's expert of high noise, given all noise levels (`experts
drop`) and trained on all of them for `--base-steps`; then `--steps` more for the base, and half of that for each child. Every run has the same shards
of the synthetic world, encoded once, the same batch size and learning rate. The table has the mean squared error on the last shard, which no run
trains on, at five timesteps of each half with fixed noise; with several seeds of training the mean over them. A run that is there in DIR already is
not made again, so an interrupted comparison goes on where it stopped.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from statistics import mean

import torch
from tu_diffuse.pipeline.model.folder import EMBEDDED, ModelFolder, open_folder
from tu_diffuse.shards.index import ShardIndex, index_shards
from tu_diffuse.training.config import FinetuneConfig
from tu_diffuse.training.encode_shards import encode_shards, load_encoder
from tu_diffuse.training.encoded import open_source
from tu_diffuse.training.finetune import finetune, make_plan, validation_loss
from tu_diffuse.training.forking import drop, fork
from tu_diffuse.training.intervals import sigma_of
from tu_diffuse.training.loop import Logged
from tu_diffuse.training.objective import Objective
from tu_diffuse.training.subject import load_subject

sys.path.insert(0, str(Path(__file__).parent / "embedded"))
from world import STAGES
from write_shards import write_shard

CPU = torch.device("cpu")
SHARDS = 4


def encoded_world(folder: ModelFolder, work: Path, stage: str, samples: int) -> ShardIndex:
    """Shards of the world as a model encodes them; written unless they are there."""
    raw = work / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    paths = [raw / f"{number:05d}.tar" for number in range(SHARDS)]
    for number, path in enumerate(paths):
        if not path.exists():
            write_shard(raw, number, samples // SHARDS, STAGES[stage], 11, "jpg")
    index = index_shards([str(path) for path in paths])
    done = list(encode_shards(index, [None] * len(index.samples), load_encoder(folder, None, False, "float16", CPU), work / "encoded"))
    return index_shards([str(shard.path) for shard in done])


def trained(model: Path, index: ShardIndex, out: Path, config: FinetuneConfig) -> Path:
    """The model folder that a run leaves; made unless it is there."""
    if not (out / "model").exists():
        plan = make_plan(config, open_folder(model), index, [i for i, sample in enumerate(index.samples) if sample.shard < SHARDS - 1])
        finetune(plan, out, lambda event: print(f"{out.name}: {event}", file=sys.stderr, flush=True) if isinstance(event, Logged) else None)
    return out / "model"


def half_losses(model: Path, index: ShardIndex, config: FinetuneConfig, border: int) -> tuple[float, float]:
    """Mean loss below and above the border on the held-out samples, each noise level by the expert that owns it."""
    held_out = [i for i, sample in enumerate(index.samples) if sample.shard == SHARDS - 1]
    plan = replace(make_plan(config, open_folder(model), index, held_out), held_out=tuple(held_out))
    subject, source, noise = load_subject(plan.folder, None, CPU), open_source(plan.folder, index, plan.stored, CPU), plan.folder.noise
    subject.unets.eval()
    whole = Objective(sigmas=noise.sigmas, t_min=0, t_max=len(noise.sigmas), prediction_type=noise.prediction_type)
    halves = (replace(whole, t_max=border), replace(whole, t_min=border))
    below, above = (mean(validation_loss(plan, subject, source, half).values()) for half in halves)
    return below, above


def compare(options: argparse.Namespace, seed: int, base: Path, index: ShardIndex, config: FinetuneConfig) -> dict[str, tuple[float, float]]:
    """Name of a model -> its losses, for one seed."""
    border, work = options.at_timestep, options.work / f"seed{seed}"
    here = replace(config, seed=seed)
    longer = trained(base, index, work / "longer", replace(here, steps=options.steps))
    forked = work / "forked"
    if not forked.exists():
        work.mkdir(parents=True, exist_ok=True)
        parent = open_folder(base)
        fork(parent, [sigma_of(parent.noise, border)], forked)
    model = forked
    for child in (f"t0000-{border:04d}", f"t{border:04d}-1000"):
        model = trained(model, index, work / child, replace(here, steps=options.steps // 2, expert=child))
    names = {"the base, before": base, f"the base, {options.steps} steps more": longer, f"two experts, {options.steps // 2} steps each": model}
    return {name: half_losses(folder, index, config, border) for name, folder in names.items()}


def table(results: list[dict[str, tuple[float, float]]], border: int) -> str:
    """Markdown; with several seeds the mean, and the lowest and highest in brackets."""

    def cell(name: str, half: int) -> str:
        values = [result[name][half] for result in results]
        return f"{mean(values):.5f}" + (f" ({min(values):.5f} to {max(values):.5f})" if len(values) > 1 else "")

    rows = [f"| {name} | {cell(name, 0)} | {cell(name, 1)} |" for name in results[0]]
    return "\n".join([f"| held-out loss | t < {border} | t >= {border} |", "|---|---|---|", *rows])


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for shards, runs and models")
    parser.add_argument("--model", type=Path, help="the base, a model folder of one expert")
    parser.add_argument("--base-steps", type=int, default=1000, help="steps that make the default base")
    parser.add_argument("--steps", type=int, default=2000, help="steps in all after the fork")
    parser.add_argument("--at-timestep", type=int, default=500)
    parser.add_argument("--stage", choices=sorted(STAGES), default="shapes")
    parser.add_argument("--samples", type=int, default=4096)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--seeds", type=int, default=1, help="how many times it is done")
    parser.add_argument("--threads", type=int, help="of PyTorch")
    parser.add_argument("--out", type=Path, help="Markdown file for the table")
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    index = encoded_world(open_folder(options.model), options.work, options.stage, options.samples)
    config = FinetuneConfig(
        shards=(str(options.work / "encoded"),),
        steps=options.base_steps,
        batch_size=options.batch_size,
        lr=options.lr,
        warmup=min(50, options.steps // 4, options.base_steps // 2),
        ema=0.999,
    )
    base = options.model
    if base is None:
        single = options.work / "single"
        if not single.exists():
            drop(open_folder(EMBEDDED), "low", single, heir="higher")
        base = trained(single, index, options.work / "base", config)
    results = [compare(options, seed, base, index, config) for seed in range(options.seeds)]
    text = table(results, options.at_timestep)
    print(text)
    if options.out is not None:
        told = (
            f"{options.samples} samples of stage {options.stage}, a quarter of them held out; batches of {options.batch_size}, "
            f"AdamW at {options.lr:g}, weights averaged with decay 0.999, {options.seeds} seed{'s' if options.seeds > 1 else ''}"
        )
        arguments = " ".join(sys.argv[1:]).replace(str(options.work), "DIR")
        options.out.write_text(f"# Two experts against one network\n\n{text}\n\n{told}. Made by `python scripts/compare_experts.py {arguments}`.\n")


if __name__ == "__main__":
    main()

"""From the snapshots of a fine-tuning run to a model folder with any averaging length."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..attention import AttentionBackend
from ..errors import UsageError
from ..pipeline.model.folder import T5_ADDED, ModelFolder
from ..pipeline.model.place import Place
from ..pipeline.model.readers import load_conditioner, load_t5_residual, load_text
from ..pipeline.staging import absent, write_file
from ..unet.experts import ExpertText
from .config import FinetuneConfig, make_config
from .posthoc import Profile, exponent, find_snapshots, reconstruct, shares_of
from .result import lora_files, write_result
from .sources import text_networks
from .subject import load_subject, read_as, trained_networks
from .terminal_snr import with_zero_terminal_snr

MAX_DISTANCE = 0.1


@dataclass(frozen=True)
class Averaged:
    """What was made.

    Attributes:
        profile: the step it ends at and its relative width.
        snapshots: how many stored averages it was made of.
        distance: of its profile from the exact one, relative.
        lora: the LoRA files.
    """

    profile: Profile
    snapshots: int
    distance: float
    lora: tuple[Path, ...]


def average_run(run: Path, folder: ModelFolder, width: float, out: Path, step: int | None = None) -> Averaged:
    """Write the model that a run would have with its weights averaged over another length (see `posthoc`), and beside it a LoRA run's LoRA files.

    Args:
        run: folder of a run with --ema-posthoc; it need not have ended.
        folder: the model that it began from.
        width: σ_rel, about the share of the run over which is averaged.
        out: the new model folder; the names of LoRA files begin with its name.
        step: which the average ends at, one with a snapshot; None is the last.

    Raises:
        UsageError: no snapshots, not the run's model, a width that they do not reproduce within MAX_DISTANCE, or `out` exists.
        ModelError, DataError: the model or a snapshot is damaged.
        OutputError: `out` could not be written.
    """
    exponent(width)
    absent(out)
    found = find_snapshots(run / "checkpoints" / "averages")
    if not found:
        raise UsageError(f"{run.name!r} has no snapshots of averages; give the --out of a run of tu-diffuse finetune with --ema-posthoc.")
    steps = sorted({snapshot.profile.step for snapshot in found})
    wanted = Profile(steps[-1] if step is None else step, width)
    if wanted.step not in steps:
        raise UsageError(f"--step {wanted.step} has no snapshot; there are {', '.join(map(str, steps))}.")
    used = [snapshot for snapshot in found if snapshot.profile.step <= wanted.step]
    shares, distance = shares_of([snapshot.profile for snapshot in used], wanted)
    if distance > MAX_DISTANCE:
        raise UsageError(
            f"--sigma-rel {width:g} is reproduced only to {distance:.0%} by {len(used)} snapshots; give one nearer to 0.05 to 0.1, "
            "or a run with more snapshots."
        )
    identity = used[-1].run["identity"]
    if identity["model"] != folder.fingerprint:
        raise UsageError(f"{folder.name!r} is not the model that {run.name!r} began from; give that with --model.")
    config = make_config({**identity["options"], "shards": ["unused"], "steps": used[-1].run["steps"]})
    model = with_zero_terminal_snr(folder) if config.zero_terminal_snr else folder
    reading, text = read_as(model, config.expert)
    device = torch.device("cpu")
    networks = trained_networks(load_subject(model, config.expert, device), _readers(reading, text, config), config)
    start = {name: parameter for name, parameter in networks.named_parameters() if parameter.requires_grad}
    weights = {**networks.state_dict(), **reconstruct(used, shares, start)}
    files = {absent(out.with_name(f"{out.name}-{name}")): write for name, write in lora_files(config, model, weights).items()}
    write_result(config, model, weights, out)
    for path, write in files.items():
        write_file(path, write)
    return Averaged(wanted, len(used), distance, tuple(files))


def _readers(reading: ModelFolder, text: ExpertText | None, config: FinetuneConfig) -> Mapping[str, nn.Module]:
    """Those text encoders that are trained, by component."""
    place, parts = Place(torch.device("cpu"), torch.float32, AttentionBackend.AUTO), config.train.split(",")
    if "text-encoders" in parts:
        return text_networks(load_text(reading, place, text))
    load = load_t5_residual if reading.family in T5_ADDED.values() else load_conditioner
    return {"conditioner": load(reading, place)} if "conditioner" in parts else {}

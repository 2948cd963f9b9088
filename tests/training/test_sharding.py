"""Two processes (gloo) share one model: the losses of one process, half of its memory, exact resume, and what launchers ask for."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from process_groups import Job, fine_tune, together, train_with_bad_steps
from safetensors.torch import load_file
from torch import Tensor
from tu_diffuse.errors import UsageError
from tu_diffuse.training.checkpoints import load_newest
from tu_diffuse.training.config import make_config
from tu_diffuse.training.sharding import asked_by_launcher
from tu_diffuse.training.workers import ALONE
from world import STAGES
from write_shards import write_shard

COMMON: dict[str, Any] = {"steps": 4, "batch_size": 2, "lr": 1e-3, "resolution": 32, "workers": 0, "save_every": 2, "clip_dropout": 0.1}
FULL: dict[str, Any] = {"ema": 0.9, "ema_posthoc": 2, "accumulate": 2, "validation_share": 0.25, "validate_every": 2, "prompts": ["a star"]}
PARTS: dict[str, Any] = {"lora": 2, "train": "unet,text-encoders,conditioner", "t5_dropout": 0.1, "gradient_checkpointing": True, "steps": 3}
SHARED = {"sharded": True}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_shard(tmp_path_factory.mktemp("shards"), 0, 16, STAGES["shapes"], 5, "png"))


@pytest.fixture(scope="module")
def outs(sd1_folder: Path, ensemble_folder: Path, shards: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of runs: each of one process, of two that share the model, and of those that go on from one another."""
    base = tmp_path_factory.mktemp("outs")

    def job(name: str, options: dict[str, Any], **ends: int) -> Job:
        return Job(ensemble_folder if "lora" in options else sd1_folder, shards, base / name, COMMON | options, **ends)

    together(1, fine_tune, [job("full", FULL), job("parts", PARTS), job("grows", FULL, told_at=2)])
    together(2, fine_tune, [job("killed", FULL | SHARED, killed_at=3)], ended=-9)
    shutil.copytree(base / "killed", base / "shrinks")
    together(2, fine_tune, [job(name, options | SHARED) for name, options in (("full-shared", FULL), ("parts-shared", PARTS))])
    together(2, fine_tune, [job("killed", FULL | SHARED), job("grows", FULL | SHARED)])
    together(1, fine_tune, [job("shrinks", FULL)])
    return base


def tensors_of(out: Path) -> dict[str, Tensor]:
    """All tensors that a run has written, by file and name."""
    files = [path for path in sorted(out.rglob("*.safetensors")) if "draft" not in str(path)]
    return {f"{path.relative_to(out)}:{name}": tensor for path in files for name, tensor in load_file(path).items()}


def log_of(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "checkpoints" / "losses.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ["full", "parts"])
def test_the_same_losses_and_files_as_one_process_with_the_whole_batch(outs: Path, name: str) -> None:
    ours, theirs = log_of(outs / f"{name}-shared"), log_of(outs / name)
    assert [line.pop("grad_norm") for line in ours] == pytest.approx([line.pop("grad_norm") for line in theirs], rel=1e-3)
    for one, other in zip(ours, theirs, strict=True):
        assert one == pytest.approx(other, abs=1e-5)
        assert one["loss"] > 1e-3
    written, wanted = tensors_of(outs / f"{name}-shared"), tensors_of(outs / name)
    assert written.keys() == wanted.keys()
    assert {name: tensor.shape for name, tensor in written.items()} == {name: tensor.shape for name, tensor in wanted.items()}
    apart = {key: (tensor - wanted[key]).abs() for key, tensor in written.items() if key.startswith("model/")}
    assert max(float(tensor.mean()) for tensor in apart.values()) < 1e-5
    assert max(float(tensor.max()) for tensor in apart.values()) < 2e-3  # AdamW makes whole steps of gradients that are rounding errors alone


def test_validation_has_the_same_numbers_and_draws_with_whole_weights(outs: Path) -> None:
    ours, theirs = ([json.loads(line) for line in (outs / name / "validation" / "validation.jsonl").open()] for name in ("full-shared", "full"))
    for one, other in zip(ours, theirs, strict=True):
        assert one == pytest.approx(other, abs=1e-5)
    drafts = [load_file(outs / "full-shared" / f"draft-{step}" / "unet" / "diffusion_pytorch_model.safetensors") for step in (2, 4)]
    result = load_file(outs / "full-shared" / "model" / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(tensor, result[name]) for name, tensor in drafts[1].items())
    assert any(not torch.equal(tensor, result[name]) for name, tensor in drafts[0].items())


def test_each_process_holds_half_of_weights_optimizer_and_average(outs: Path) -> None:
    trained = load_file(outs / "full" / "checkpoints" / "checkpoint-00000004" / "model.safetensors")
    one = 4 * sum(tensor.numel() for tensor in trained.values())
    alone = json.loads((outs / "full" / "held-0.json").read_text())[0]
    shared = (
        7  # weights, gradients, AdamW's two moments, the average and the two of post-hoc EMA; where that began is whole, in the first process alone
    )
    for rank in (0, 1):
        for name in ("full-shared", "killed"):  # the second went on from a checkpoint
            held = json.loads((outs / name / f"held-{rank}.json").read_text())[0]
            assert (alone - held) / one == pytest.approx(shared / 2 + rank, abs=0.1)


def test_killed_and_started_again_equals_uninterrupted_bit_for_bit(outs: Path) -> None:
    killed, whole = tensors_of(outs / "killed"), tensors_of(outs / "full-shared")
    assert killed.keys() == whole.keys()
    assert [name for name, tensor in killed.items() if not torch.equal(tensor, whole[name])] == []
    assert log_of(outs / "killed") == log_of(outs / "full-shared")


@pytest.mark.parametrize("name", ["grows", "shrinks"])
def test_a_run_goes_on_with_another_number_of_processes(outs: Path, name: str) -> None:
    for one, other in zip(log_of(outs / name), log_of(outs / "full"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)
    assert tensors_of(outs / name).keys() == tensors_of(outs / "full").keys()


def test_a_step_that_is_not_finite_in_one_process_is_skipped_in_all(tmp_path: Path) -> None:
    together(1, train_with_bad_steps, tmp_path / "one")
    together(2, train_with_bad_steps, tmp_path / "two")
    notes = [json.loads((tmp_path / path).read_text()) for path in ("one/notes-0.json", "two/notes-0.json", "two/notes-1.json")]
    assert notes[1] == notes[2]
    assert [note.split(":")[0] for note in notes[0]] == [note.split(":")[0] for note in notes[1]] == ["step 2", "step 4"]
    one, two = (load_newest(tmp_path / name) for name in ("one", "two"))
    assert one is not None
    assert two is not None
    assert one.scaler == two.scaler
    assert one.scaler["scale"] == 16384  # halved twice
    apart = torch.cat([(two.model[name] - tensor).abs().flatten() for name, tensor in one.model.items()])
    assert apart.mean() < 1e-5
    assert apart.max() < 2e-3  # AdamW makes whole steps of gradients that are rounding errors alone


@pytest.mark.slow
@pytest.mark.parametrize("options", [PARTS | {"lora": None}, {"precision": "float16"}, {"precision": "bfloat16", "lora": 2}])
def test_whole_text_encoders_and_half_precision(ensemble_folder: Path, shards: str, tmp_path: Path, options: dict[str, Any]) -> None:
    """As two processes with a copy each: in float16 the gradient of a process's own rows may overflow where that of the whole batch does not."""
    job = Job(ensemble_folder, shards, tmp_path / "copies", COMMON | options)
    together(2, fine_tune, [job])
    together(2, fine_tune, [replace(job, out=tmp_path / "two", options=job.options | SHARED, told_at=2)])
    stopped = load_newest(tmp_path / "two" / "checkpoints")
    assert stopped is not None
    assert stopped.step == 2
    together(2, fine_tune, [replace(job, out=tmp_path / "two", options=job.options | SHARED)])
    [theirs], [ours] = log_of(tmp_path / "copies"), log_of(tmp_path / "two")
    assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5 if "precision" not in options else 1e-3)
    copies, two = (load_newest(tmp_path / name / "checkpoints") for name in ("copies", "two"))
    assert copies is not None
    assert two is not None
    assert copies.scaler == two.scaler


USED = {"ACCELERATE_USE_FSDP": "true", "FSDP_SHARDING_STRATEGY": "FULL_SHARD", "FSDP_RESHARD_AFTER_FORWARD": "true", "FSDP_OFFLOAD_PARAMS": "false"}


def test_accelerate_says_whether_to_share() -> None:
    assert asked_by_launcher("float32", USED | {"ACCELERATE_MIXED_PRECISION": "no"})
    assert asked_by_launcher("bfloat16", USED | {"ACCELERATE_MIXED_PRECISION": "bf16"})
    assert not asked_by_launcher("float32", {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_CPU": "true"})


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"FSDP_OFFLOAD_PARAMS": "true"}, "--fsdp_offload_params"),
        ({"FSDP_SHARDING_STRATEGY": "SHARD_GRAD_OP"}, "FULL_SHARD"),
        ({"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}, "checkpoints are whole"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "--gradient-checkpointing"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "--precision"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed"),
    ],
)
def test_what_accelerate_asks_for_and_is_not_done_is_refused(told: dict[str, str], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        asked_by_launcher("float32", USED | told)


def test_sharing_with_nobody_or_another_optimizer_is_refused(sd1_folder: Path, shards: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the only one"):
        fine_tune(ALONE, [Job(sd1_folder, shards, tmp_path, COMMON | SHARED)])
    with pytest.raises(UsageError, match="not with --optimizer lion"):
        make_config({"shards": ["a"], "steps": 1, "sharded": True, "optimizer": "lion"})

"""Training on encoded shards: the same losses as from pictures, nothing else in memory, and what is refused."""

import gc
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from encoded_sets import CPU, encode, places, read, write_set
from safetensors.torch import load_file, save_file
from shard_sets import flip
from tu_diffuse.errors import DataError, UsageError
from tu_diffuse.pipeline.model.folder import ModelFolder, open_folder
from tu_diffuse.pipeline.model.loading import load_model
from tu_diffuse.shards.index import ShardIndex, index_shards
from tu_diffuse.text_encoders.clip import CLIPText
from tu_diffuse.text_encoders.t5 import T5Encoder
from tu_diffuse.training.config import FinetuneConfig
from tu_diffuse.training.encoded import open_source
from tu_diffuse.training.finetune import Plan, finetune, make_plan
from tu_diffuse.training.loop import InterruptedRunError
from tu_diffuse.training.objective import Draw, denoising_loss
from tu_diffuse.training.sources import Source
from tu_diffuse.vae.autoencoder import Autoencoder
from tu_diffuse.vae.autoencoder_dc import AutoencoderDC

BASE = FinetuneConfig(shards=("unused",), steps=5, batch_size=4, lr=1e-3, resolution=32, workers=0, save_every=2)
FAMILIES = ["sd1_folder", "sd2_folder", "sdxl_folder", "refiner_folder", "ensemble_folder"]
FROZEN = (CLIPText, T5Encoder, Autoencoder, AutoencoderDC)


def plan_for(folder: ModelFolder, index: ShardIndex, **changes: Any) -> Plan:
    return make_plan(replace(BASE, **changes), folder, index, range(len(index.samples)))


def source_of(plan: Plan) -> Source:
    return open_source(plan.folder, plan.index, plan.stored, CPU)


def recorded(plan: Plan, out: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> list[float]:
    """Train; the loss of every step and of every level of the validation."""
    found: list[float] = []

    def listening(*arguments: Any) -> Mapping[str, torch.Tensor]:
        scalars = denoising_loss(*arguments)
        found.append(scalars["loss"].item())
        return scalars

    with monkeypatch.context() as patched:
        patched.setattr("tu_diffuse.training.finetune.denoising_loss", listening)
        finetune(plan, out, lambda event: None, **options)
    return found


@pytest.mark.parametrize("fixture", FAMILIES)
def test_losses_are_those_of_the_pictures(
    request: pytest.FixtureRequest, raw: ShardIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fixture: str
) -> None:
    folder = open_folder(request.getfixturevalue(fixture))
    t5 = {"t5_dropout": 0.3} if folder.family == "clip-t5" else {}
    # One sample at a time: convolutions over several round otherwise than over one.
    options = {"lr": 1e-5, "batch_size": 1, "caption_dropout": 0.3, "clip_dropout": 0.3, "validation_share": 0.2, **t5}
    encode(folder, raw, tmp_path / "encoded", batch_size=1)
    theirs = recorded(plan_for(folder, raw, **options), tmp_path / "raw", monkeypatch)
    ours = recorded(plan_for(folder, read(tmp_path / "encoded"), **options), tmp_path / "run", monkeypatch)
    assert len(ours) == len(theirs) == 5 + 4 * 5
    assert len({round(loss, 4) for loss in theirs}) > 15
    assert ours == pytest.approx(theirs, rel=1e-6)
    one, other = (load_file(tmp_path / name / "checkpoints" / "checkpoint-00000005" / "model.safetensors") for name in ("raw", "run"))
    assert all(torch.allclose(tensor, other[name], atol=1e-6) for name, tensor in one.items())


def test_the_conditioner_trains_as_from_pictures_and_text_encoders_do_not(
    ensemble: ModelFolder, raw: ShardIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode(ensemble, raw, tmp_path / "encoded", batch_size=1)
    encoded, options = read(tmp_path / "encoded"), {"lr": 1e-5, "steps": 3, "batch_size": 1, "train": "unet,conditioner"}
    theirs = recorded(plan_for(ensemble, raw, **options), tmp_path / "raw", monkeypatch)
    assert recorded(plan_for(ensemble, encoded, **options), tmp_path / "run", monkeypatch) == pytest.approx(theirs, rel=1e-6)
    name = "conditioner/diffusion_pytorch_model.safetensors"
    before, one, other = (load_file(folder / name) for folder in (ensemble.path, tmp_path / "raw" / "model", tmp_path / "run" / "model"))
    assert any(not torch.equal(tensor, before[key]) for key, tensor in one.items())
    assert all(torch.allclose(tensor, other[key], atol=1e-6) for key, tensor in one.items())
    with pytest.raises(UsageError, match="--train text-encoders needs captions"):
        finetune(plan_for(ensemble, encoded, train="text-encoders"), tmp_path / "refused", lambda event: None)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_costs_little(ensemble: ModelFolder, raw: ShardIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    encode(ensemble, raw, tmp_path / "encoded", dtype)
    theirs = recorded(plan_for(ensemble, raw, lr=1e-5), tmp_path / "raw", monkeypatch)
    ours = recorded(plan_for(ensemble, read(tmp_path / "encoded"), lr=1e-5), tmp_path / "run", monkeypatch)
    assert ours == pytest.approx(theirs, rel=1e-2)
    assert ours != theirs


def test_buckets_give_the_same_losses(sd1_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = open_folder(sd1_folder)
    index = write_set(tmp_path / "raw", [(32, 32), (24, 44), (44, 24)])  # buckets themselves: nothing is cut
    encode(folder, index, tmp_path / "encoded", buckets=True)
    options = {"lr": 1e-5, "buckets": True, "batch_size": 3, "validation_share": 0.3}
    plans = [plan_for(folder, each, **options) for each in (index, read(tmp_path / "encoded"))]
    assert len(set(plans[0].bucket_of.values())) == 3
    assert plans[0].bucket_of == plans[1].bucket_of
    theirs, ours = (recorded(plan, tmp_path / name, monkeypatch) for plan, name in zip(plans, "ab", strict=True))
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_pictures_are_cut_in_the_middle(sd1_folder: Path, tmp_path: Path) -> None:
    folder = open_folder(sd1_folder)
    index = write_set(tmp_path / "raw", [(64, 32)])
    encode(folder, index, tmp_path / "encoded")
    pictures, features = source_of(plan_for(folder, index)), source_of(plan_for(folder, read(tmp_path / "encoded")))
    middle = pictures.batch([pictures.read(i, (32, 32), None) for i in range(4)], None).latents
    stored = [features.read(i, (32, 32), torch.Generator()) for i in range(4)]
    torch.testing.assert_close(features.batch(stored, None).latents, middle, atol=1e-6, rtol=0)
    assert [row["sizes"].tolist() for row in stored] == [[32, 64, 0, 16]] * 4


def test_posteriors_are_sampled_where_there_is_one(sd1_folder: Path, ensemble: ModelFolder, raw: ShardIndex, tmp_path: Path) -> None:
    for folder, spread in ((open_folder(sd1_folder), True), (ensemble, False)):
        out = tmp_path / folder.name
        encode(folder, raw, out)
        source = source_of(plan_for(folder, read(out)))
        rows = [source.read(i, (32, 32), None) for i in range(2)]
        one, other = (source.batch(rows, [torch.Generator().manual_seed(seed + i) for i in range(2)]).latents for seed in (0, 5))
        assert torch.equal(one, other) != spread
        assert ("std" in rows[0]) == spread


def test_pads_that_no_row_needs_are_left_out_and_change_nothing(ensemble: ModelFolder, raw: ShardIndex, tmp_path: Path) -> None:
    encode(ensemble, raw, tmp_path / "encoded")
    source = source_of(plan_for(ensemble, read(tmp_path / "encoded")))
    conditioner = source.networks["conditioner"]
    rows = [source.read(number, (32, 32), None) for number in range(3)]
    features = {name: torch.stack([row[name] for row in rows]) for name in rows[0] if name not in ("mean", "std", "sizes")}
    kept = torch.tensor([True, False, True]), torch.tensor([True, True, False])
    drawn = Draw(torch.zeros(3, dtype=torch.int64), torch.zeros(3), *kept)
    with torch.no_grad():
        said, whole = source.batch(rows, None).said(drawn), conditioner(**features, keep_clip=kept[0], keep_t5=kept[1])
    assert said.tokens.shape[1] < whole.tokens.shape[1]
    torch.testing.assert_close(said.pooled, whole.pooled, atol=1e-6, rtol=0)
    torch.testing.assert_close(said.tokens[said.mask], whole.tokens[whole.mask], atol=1e-5, rtol=0)
    assert said.tokens[said.mask].std() > 0.1


@pytest.fixture
def frozen_parts(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How many VAEs and text encoders that were made from now on are in memory."""
    made: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
    for kind in FROZEN:

        def remembered(self: torch.nn.Module, *arguments: Any, make: Any = kind.__init__, **named: Any) -> None:
            make(self, *arguments, **named)
            made.add(self)

        monkeypatch.setattr(kind, "__init__", remembered)

    def count() -> int:
        if made:
            gc.collect()
        return len(made)

    return count


@pytest.mark.parametrize("fixture", ["sd1_folder", "sdxl_folder", "ensemble_folder"])
def test_nothing_else_is_in_memory(
    request: pytest.FixtureRequest,
    raw: ShardIndex,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    frozen_parts: Callable[[], int],
    fixture: str,
) -> None:
    folder = open_folder(request.getfixturevalue(fixture))
    encode(folder, raw, tmp_path / "encoded")
    assert frozen_parts() == 0
    seen: list[int] = []
    drawing: list[int] = []

    def counting(*arguments: Any) -> Mapping[str, torch.Tensor]:
        seen.append(frozen_parts())
        return denoising_loss(*arguments)

    def draw_prompts(draft: Path, step: int) -> None:
        model = load_model(open_folder(draft))
        drawing.append(frozen_parts())
        del model

    monkeypatch.setattr("tu_diffuse.training.finetune.denoising_loss", counting)
    drawn = {"prompts": ("a star",), "validate_every": 2, "validation_share": 0.2}
    finetune(plan_for(folder, read(tmp_path / "encoded"), **drawn), tmp_path / "run", lambda event: None, draw_prompts=draw_prompts)
    assert set(seen) == {0}
    assert len(drawing) == 3
    assert all(count >= 2 for count in drawing)
    seen.clear()
    finetune(plan_for(folder, raw), tmp_path / "control", lambda event: None)
    assert min(seen) >= 2


def test_stopped_and_resumed_equals_uninterrupted(sd2_folder: Path, raw: ShardIndex, tmp_path: Path) -> None:
    folder = open_folder(sd2_folder)
    encode(folder, raw, tmp_path / "encoded", "float16")
    plan = plan_for(folder, read(tmp_path / "encoded"), ema=0.9, workers=2)
    finetune(plan, tmp_path / "whole", lambda event: None)
    with pytest.raises(InterruptedRunError):
        finetune(plan, tmp_path / "cut", lambda event: None, should_stop=lambda: True)
    with pytest.raises(UsageError, match="of a run with"):
        finetune(plan_for(folder, raw, ema=0.9, workers=2), tmp_path / "cut", lambda event: None)
    finetune(plan, tmp_path / "cut", lambda event: None)
    one, other = (load_file(tmp_path / name / "model" / "unet" / "diffusion_pytorch_model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def changed(source: Path, target: Path, part: str, stem: str) -> ModelFolder:
    """A copy of a model folder in which one weight of one part is another."""
    import shutil

    shutil.copytree(source, target)
    path = target / part / f"{stem}.safetensors"
    weights = load_file(path)
    name = sorted(weights)[0]
    weights[name] = weights[name] + 1e-3
    save_file(weights, path)
    return open_folder(target)


def test_shards_of_another_model_are_refused(sd1_folder: Path, sd2_folder: Path, raw: ShardIndex, tmp_path: Path) -> None:
    encode(open_folder(sd1_folder), raw, tmp_path / "encoded")
    index = read(tmp_path / "encoded")
    for part, stem in (("vae", "diffusion_pytorch_model"), ("text_encoder", "model")):
        other = changed(sd1_folder, tmp_path / part, part, stem)
        with pytest.raises(UsageError, match=f"they have another {part};"):
            plan_for(other, index)
    plan_for(changed(sd1_folder, tmp_path / "tuned", "unet", "diffusion_pytorch_model"), index)  # what is trained may differ
    with pytest.raises(UsageError, match="they have resolution 32 instead of 16;"):
        plan_for(open_folder(sd1_folder), index, resolution=16)
    with pytest.raises(UsageError, match="they have buckets False instead of True;"):
        plan_for(open_folder(sd1_folder), index, buckets=True)
    vocabulary = tmp_path / "tuned" / "tokenizer" / "tokenizer_config.json"
    vocabulary.write_text(vocabulary.read_text().replace("{", '{"note": 1,', 1))
    with pytest.raises(UsageError, match="another tokenizer"):
        plan_for(open_folder(tmp_path / "tuned"), index)


def test_shards_of_two_kinds_are_refused(ensemble: ModelFolder, raw: ShardIndex, tmp_path: Path) -> None:
    for dtype in ("float32", "float16"):
        encode(ensemble, raw, tmp_path / dtype, dtype)
    mixed = index_shards([raw.shards[0], str(tmp_path / "float32" / "1.tar")])
    with pytest.raises(UsageError, match=r"1\.tar is encoded and .*0\.tar holds pictures; give shards of one kind"):
        plan_for(ensemble, mixed)
    two = index_shards([str(tmp_path / "float32" / "0.tar"), str(tmp_path / "float16" / "1.tar")])
    with pytest.raises(UsageError, match=r"encoded in different ways .*dtype float16 instead of float32"):
        plan_for(ensemble, two)


def test_damage_is_found_while_training_too(ensemble: ModelFolder, raw: ShardIndex, tmp_path: Path) -> None:
    encode(ensemble, raw, tmp_path)
    data = (tmp_path / "0.tar").read_bytes()
    _, *spans = places(tmp_path / "0.tar")
    (tmp_path / "0.tar").write_bytes(flip(data, spans[3][1] - 9, 2))
    index = index_shards([str(tmp_path / "0.tar"), str(tmp_path / "1.tar")])  # without decoding, as finetune does
    assert len(index.samples) == 18
    with pytest.raises(DataError, match=rf"sample 00003 in shard .*0\.tar at byte {spans[3][0]} are damaged"):
        finetune(plan_for(ensemble, index), tmp_path / "run", lambda event: None)

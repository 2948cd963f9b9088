"""Encoded shards: the same losses as from pictures, nothing else in memory, the same bytes for any number of threads, and what is refused."""

import errno
import gc
import io
import json
import struct
import tarfile
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load, load_file, save_file
from shard_sets import flip, write
from tu_diffuse.errors import DataError, OutputError, UsageError
from tu_diffuse.pipeline.folder import ModelFolder, open_folder
from tu_diffuse.pipeline.loading import load_model
from tu_diffuse.shards.check import check_shard
from tu_diffuse.shards.index import ShardIndex, encoding_of, index_shards
from tu_diffuse.shards.writer import write_filtered
from tu_diffuse.text_encoders.clip import CLIPText
from tu_diffuse.text_encoders.t5 import T5Encoder
from tu_diffuse.training import encode_shards as module
from tu_diffuse.training.config import FinetuneConfig
from tu_diffuse.training.encode_shards import EncodedShard, encode_shards, load_encoder
from tu_diffuse.training.encoded import encoding_for, open_source, unpack
from tu_diffuse.training.finetune import Plan, finetune, make_plan
from tu_diffuse.training.loop import InterruptedRunError
from tu_diffuse.training.objective import denoising_loss
from tu_diffuse.training.sources import Source
from tu_diffuse.vae.autoencoder import Autoencoder
from tu_diffuse.vae.autoencoder_dc import AutoencoderDC

CPU = torch.device("cpu")
BASE = FinetuneConfig(shards=("unused",), steps=5, batch_size=4, lr=1e-3, resolution=32, workers=0, save_every=2)
FAMILIES = ["sd1_folder", "sd2_folder", "sdxl_folder", "refiner_folder", "ensemble_folder"]
FROZEN = (CLIPText, T5Encoder, Autoencoder, AutoencoderDC)


def picture(seed: int, width: int, height: int) -> bytes:
    """Noise in large squares, so that the latents of two pictures and of two cuts differ."""
    buffer = io.BytesIO()
    squares = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(squares).resize((width, height), Image.Resampling.NEAREST).save(buffer, "PNG")
    return buffer.getvalue()


def samples(count: int, first: int, sizes: Sequence[tuple[int, int]]) -> list[tuple[str, bytes]]:
    members: list[tuple[str, bytes]] = []
    for i in range(first, first + count):
        width, height = sizes[i % len(sizes)]
        metadata = json.dumps({"width": width, "height": height, "punsafe": i / 100, "key": i}).encode()
        members += [(f"{i:05d}.png", picture(i, width, height)), (f"{i:05d}.txt", b"a star, number %d" % i), (f"{i:05d}.json", metadata)]
    return members


def write_set(folder: Path, sizes: Sequence[tuple[int, int]] = ((32, 32),)) -> ShardIndex:
    folder.mkdir(exist_ok=True)
    return index_shards([str(write(folder / f"{n}.tar", samples(9, 9 * n, sizes))) for n in range(2)])


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    return write_set(tmp_path_factory.mktemp("raw") / "set")


def encode(folder: ModelFolder, index: ShardIndex, out: Path, dtype: str = "float32", buckets: bool = False, **options: Any) -> list[EncodedShard]:
    encoder = load_encoder(folder, 32, buckets, dtype, CPU)
    return list(encode_shards(index, options.pop("reasons", [None] * len(index.samples)), encoder, out, **options))


def read(out: Path) -> ShardIndex:
    return index_shards([str(path) for path in sorted(out.glob("*.tar"))], verify_pictures=True)


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


@pytest.mark.parametrize("threads", [0, 1, 5])
def test_threads_do_not_change_a_byte(ensemble: ModelFolder, tmp_path: Path, threads: int) -> None:
    index = write_set(tmp_path / "raw", [(32, 32), (40, 24)])
    encode(ensemble, index, tmp_path / "a", buckets=True, batch_size=4, threads=2)
    encode(ensemble, index, tmp_path / "b", buckets=True, batch_size=4, threads=threads)
    for path in sorted((tmp_path / "a").iterdir()):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    assert [sample.key for sample in read(tmp_path / "b").samples] == [f"{i:05d}" for i in range(18)]


def test_reading_computing_and_writing_overlap(ensemble: ModelFolder, raw: ShardIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The networks begin with the first batch only when the third was read, and the writer ends the first only when the second was computed."""
    third_read, second_computed = threading.Event(), threading.Event()
    met: list[bool] = []
    read_row, posteriors = module._read, module._posteriors

    def reading(index: ShardIndex, i: int, sizes: Any) -> Any:
        row = read_row(index, i, sizes)
        if i == 8:
            third_read.set()
        return row

    def computing(encoder: Any, rows: Any) -> Any:
        met.append(third_read.wait(30))
        found = posteriors(encoder, rows)
        if rows[0].sample.key == "00003":
            second_computed.set()
        return found

    class SlowFile(io.FileIO):
        def write(self, data: Any) -> int:
            if b"00000.encoded.safetensors" in data:
                met.append(second_computed.wait(30))
            return super().write(data)

    def publishing(fill: Any, final: Path) -> None:
        with SlowFile(final, "w") as file:
            fill(file)

    monkeypatch.setattr(module, "_read", reading)
    monkeypatch.setattr(module, "_posteriors", computing)
    monkeypatch.setattr(module, "publish", publishing)
    encode(ensemble, raw, tmp_path, batch_size=3, threads=1)
    assert met == [True] * 7
    assert len(read(tmp_path).samples) == 18


def test_run_again_keeps_what_is_done(ensemble: ModelFolder, raw: ShardIndex, tmp_path: Path) -> None:
    encode(ensemble, raw, tmp_path / "whole")
    seen: list[int] = []

    def stop(count: int) -> None:
        seen.append(count)
        if sum(seen) > 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode(ensemble, raw, tmp_path / "cut", batch_size=3, progress=stop)
    assert sorted(path.name for path in (tmp_path / "cut").iterdir()) == ["0.tar", "0_stats.json"]
    (tmp_path / "cut" / "0_stats.json").unlink()  # killed between the two
    (tmp_path / "cut" / ".1.tar.0a1b2c3d.partial").write_bytes(b"half")  # killed while writing
    (tmp_path / "cut" / ".other.tar.0a1b2c3d.partial").write_bytes(b"of another run")
    first = (tmp_path / "cut" / "0.tar").stat()
    done = encode(ensemble, raw, tmp_path / "cut", batch_size=3)
    assert [(shard.kept, shard.was_there) for shard in done] == [(9, True), (9, False)]
    assert (tmp_path / "cut" / "0.tar").stat().st_mtime_ns == first.st_mtime_ns
    (tmp_path / "cut" / ".other.tar.0a1b2c3d.partial").unlink()
    assert sorted(path.name for path in (tmp_path / "cut").iterdir()) == sorted(path.name for path in (tmp_path / "whole").iterdir())
    again, whole = read(tmp_path / "cut"), read(tmp_path / "whole")
    for i in range(18):
        one, other = unpack(again.features(i)), unpack(whole.features(i))
        assert all(torch.allclose(tensor, other[name], atol=1e-5) for name, tensor in one.items())
        assert again.metadata(i) == raw.metadata(i)


def test_a_full_disk_leaves_no_half_shard(ensemble: ModelFolder, raw: ShardIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class FullFile(io.BufferedWriter):
        def write(self, data: Any) -> int:
            if b"00012.encoded.safetensors" in data:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data)

    def opening(self: Path, mode: str = "r", **options: Any) -> Any:
        return FullFile(io.FileIO(self, mode.replace("b", ""))) if mode == "xb" else open(self, mode, **options)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", opening)
        with pytest.raises(OutputError, match="No space left on device"):
            encode(ensemble, raw, tmp_path, batch_size=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.tar", "0_stats.json"]
    assert [shard.was_there for shard in encode(ensemble, raw, tmp_path, batch_size=2)] == [True, False]


def test_what_is_there_and_made_otherwise_is_refused(ensemble: ModelFolder, sd1_folder: Path, raw: ShardIndex, tmp_path: Path) -> None:
    encode(ensemble, raw, tmp_path)
    before = (tmp_path / "0.tar").read_bytes()
    with pytest.raises(OutputError, match=r"encoded in another way .*dtype float32 instead of float16"):
        encode(ensemble, raw, tmp_path, "float16")
    with pytest.raises(OutputError, match=r"family clip-t5 instead of sd.*another vae"):
        encode(open_folder(sd1_folder), raw, tmp_path)
    with pytest.raises(OutputError, match="holds other samples than 8"):
        encode(ensemble, raw, tmp_path, reasons=["unsafe", *[None] * 17])
    assert (tmp_path / "0.tar").read_bytes() == before
    (tmp_path / "0.tar").write_bytes(flip(before, len(before) // 2, 3)[:-4096])
    with pytest.raises(OutputError, match="is damaged"):
        encode(ensemble, raw, tmp_path)
    write(tmp_path / "0.tar", samples(9, 0, [(32, 32)]))
    with pytest.raises(OutputError, match="is no encoded shard"):
        encode(ensemble, raw, tmp_path)


def test_samples_that_are_left_out_are_counted(ensemble: ModelFolder, raw: ShardIndex, tmp_path: Path) -> None:
    done = encode(ensemble, raw, tmp_path, reasons=["unsafe", None, "size", *[None] * 6, *["unsafe"] * 9])
    assert [(shard.kept, shard.dropped) for shard in done] == [(7, {"unsafe": 1, "size": 1}), (0, {"unsafe": 9})]
    assert [sample.key for sample in read(tmp_path).samples] == ["00001", *(f"{i:05d}" for i in range(3, 9))]
    assert json.loads((tmp_path / "1_stats.json").read_text())["status_dict"] == {"success": 0, "unsafe": 9}


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


def test_a_filtered_copy_still_says_how_it_was_encoded(sd1_folder: Path, raw: ShardIndex, tmp_path: Path) -> None:
    folder = open_folder(sd1_folder)
    encode(folder, raw, tmp_path / "encoded")
    index = read(tmp_path / "encoded")
    list(write_filtered(index, [None if i % 2 else "x" for i in range(18)], tmp_path / "half"))
    half = read(tmp_path / "half")
    stored = encoding_of(half)
    assert stored is not None
    assert stored.encoding == encoding_for(folder, 32, False, "float32")
    assert [half.features(i) for i in range(9)] == [index.features(2 * i + 1) for i in range(9)]
    assert half.members == {"used": 2 + 27, "skipped": 0, "ignored": 0}


def test_the_library_reads_what_is_stored(sd1_folder: Path, raw: ShardIndex, tmp_path: Path) -> None:
    """Plain tar and safetensors, without this package."""
    encode(open_folder(sd1_folder), raw, tmp_path)
    with tarfile.open(tmp_path / "0.tar") as tar:
        names = tar.getnames()
        files = {name: tar.extractfile(name).read() for name in names}  # type: ignore[union-attr]
    assert names[:4] == ["encoding.safetensors", "00000.encoded.safetensors", "00000.txt", "00000.json"]
    tensors = load(files["00000.encoded.safetensors"])
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "mean": (4, 16, 16),
        "std": (4, 16, 16),
        "sizes": (4,),
        "tokens": (16, 16),
    }
    empty = load(files["encoding.safetensors"])["tokens"]
    assert empty.shape == (16, 16)
    assert not torch.allclose(empty, tensors["tokens"])
    length = struct.unpack("<Q", files["encoding.safetensors"][:8])[0]
    said = json.loads(json.loads(files["encoding.safetensors"][8 : 8 + length])["__metadata__"]["tu-diffuse"])
    assert said["encoding"]["resolution"] == 32
    assert set(said["encoding"]["parts"]) == {"vae", "text_encoder", "tokenizer"}


def places(path: Path) -> Iterator[tuple[int, int]]:
    """From byte, to byte of the content of every safetensors member."""
    with tarfile.open(path) as tar:
        yield from ((m.offset_data, m.offset_data + m.size) for m in tar.getmembers() if m.name.endswith("safetensors"))


def test_every_flipped_bit_is_found(ensemble: ModelFolder, raw: ShardIndex, tmp_path: Path) -> None:
    encode(ensemble, raw, tmp_path, "float16")
    whole = (tmp_path / "0.tar").read_bytes()
    rng = np.random.default_rng(0)
    spans = list(places(tmp_path / "0.tar"))
    assert len(spans) == 10
    path = tmp_path / "flipped.tar"
    for _ in range(300):
        start, end = spans[rng.integers(len(spans))]
        place = int(rng.integers(start, min(end, start + 900) if rng.random() < 0.6 else end))  # the header more often than its share
        path.write_bytes(flip(whole, place, int(rng.integers(8))))
        report = check_shard(str(path), verify_pictures=True)
        assert report.damages, place
        assert report.damages[0].reason in ("encoded", "encoding")
        assert len(report.samples) + sum(report.skipped.values()) == 9
        assert sum(report.members.values()) == 28


def test_damage_is_found_while_training_too(ensemble: ModelFolder, raw: ShardIndex, tmp_path: Path) -> None:
    encode(ensemble, raw, tmp_path)
    data = (tmp_path / "0.tar").read_bytes()
    _, *spans = places(tmp_path / "0.tar")
    (tmp_path / "0.tar").write_bytes(flip(data, spans[3][1] - 9, 2))
    index = index_shards([str(tmp_path / "0.tar"), str(tmp_path / "1.tar")])  # without decoding, as finetune does
    assert len(index.samples) == 18
    with pytest.raises(DataError, match=rf"sample 00003 in shard .*0\.tar at byte {spans[3][0]} are damaged"):
        finetune(plan_for(ensemble, index), tmp_path / "run", lambda event: None)


def test_values_beyond_the_dtype_are_an_error(sd1_folder: Path, raw: ShardIndex, tmp_path: Path) -> None:
    folder = open_folder(sd1_folder)
    encoder = load_encoder(folder, 32, False, "float16", CPU)
    with torch.no_grad():
        encoder.codec.vae.get_submodule("encoder.conv_out").weight.mul_(1e6)  # type: ignore[operator]
    with pytest.raises(DataError, match="Sample 00000: mean holds values that float16 cannot"):
        list(encode_shards(raw, [None] * 18, encoder, tmp_path))
    assert not list(tmp_path.iterdir())

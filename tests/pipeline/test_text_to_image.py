"""One batch of pictures: noise of its own for each, nothing lost when one fails, settings as applied."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tu_diffuse.errors import RenderError
from tu_diffuse.pipeline.model.fingerprint import fingerprint
from tu_diffuse.pipeline.model.folder import open_folder
from tu_diffuse.pipeline.model.loading import Model, load_model
from tu_diffuse.pipeline.request import batches
from tu_diffuse.pipeline.resolve import resolve
from tu_diffuse.pipeline.seeds import draw, noise_source, random_seed, streams
from tu_diffuse.pipeline.text_to_image import Picture, Progress, text_to_image


@pytest.fixture(scope="module")
def model(ensemble_folder: Path) -> Model:
    return load_model(open_folder(ensemble_folder), dtype="float32", device="cpu")


def test_noise_is_the_fields_and_the_same_in_any_batch():
    shape = (4, 6, 5)
    generator = torch.Generator("cpu").manual_seed(8)
    first, second = (torch.randn((1, *shape), generator=generator) for _ in range(2))
    for seeds in ([8], [7, 8], [8, 9, 10], [10, 8]):
        generators, row = streams(seeds), seeds.index(8)
        assert torch.equal(draw(generators, shape)[row], first[0])
        assert torch.equal(noise_source(generators, shape, torch.device("cpu"))()[row], second[0])
    assert not torch.equal(first, second)


def test_random_seeds_leave_room_for_the_count():
    assert all(random_seed(2**32 - 3) + 2**32 - 4 <= 2**32 - 1 for _ in range(50))
    assert len({random_seed() for _ in range(50)}) > 45


def test_events(model: Model):
    events = list(text_to_image(model, resolve(model.folder, "a", [1, 2])))
    steps = [event for event in events if isinstance(event, Progress)]
    pictures = [event for event in events if isinstance(event, Picture)]
    assert events == [*steps, *pictures]
    assert [(step.index, step.expert) for step in steps] == [(0, "high"), (1, "high"), (2, "high"), (3, "low")]
    assert [(picture.index, picture.seed) for picture in pictures] == [(0, 1), (1, 2)]
    assert all(step.x0.shape == (2, 8, 8, 8) for step in steps)
    assert pictures[0].pixels.shape == (32, 32, 3)
    assert pictures[0].pixels.dtype == torch.uint8
    assert pictures[1].settings["batch"] == [1, 2]
    assert pictures[1].settings["experts"][1] == {
        "name": "low",
        "first_step": 4,
        "last_step": 4,
        "sigma_from": steps[3].sigma,
        "sigma_to": 0.0,
    }


def test_each_expert_matters(model: Model):
    request = resolve(model.folder, "a", [1])

    def last(changed: Model) -> torch.Tensor:
        return [event.x0 for event in text_to_image(changed, request) if isinstance(event, Progress)][-1]

    base, entries = last(model), model.folder.experts
    for only in ("low", "high"):
        chosen = next(entry for entry in entries if entry.name == only)
        folder = replace(model.folder, experts=(replace(chosen, sigma_min=0.0, sigma_max=float("inf")),))
        assert (last(load_model(folder, dtype="float32", device="cpu")) - base).abs().max() > 1e-2


def test_an_expert_may_bring_its_own_guidance(model: Model):
    entries = tuple(replace(entry, guidance=1.0 if entry.name == "low" else 6.0) for entry in model.folder.experts)
    own = replace(model, folder=replace(model.folder, experts=entries))

    def last(asked: dict[str, Any]) -> torch.Tensor:
        return [event.x0 for event in text_to_image(own, resolve(own.folder, "a", [1], **asked)) if isinstance(event, Progress)][-1]

    assert (last({}) - last({"guidance": 6.0})).abs().max() > 1e-3
    assert (last({}) - last({"guidance": 1.0})).abs().max() > 1e-3


def test_one_broken_picture_leaves_the_others(model: Model, monkeypatch: pytest.MonkeyPatch):
    decode = model.codec.decode
    calls: list[int] = []

    def sometimes(latents: torch.Tensor) -> Any:
        calls.append(1)
        return decode(latents * float("nan") if len(calls) == 2 else latents)

    monkeypatch.setattr(model.codec, "decode", sometimes)
    events: list[Any] = []
    with pytest.raises(RenderError, match="1 of 3 pictures"):
        events.extend(text_to_image(model, resolve(model.folder, "a", [1, 2, 3])))
    assert [event.seed for event in events if isinstance(event, Picture)] == [1, 3]


def test_batches_hold_every_seed(model: Model):
    request = resolve(model.folder, "a", range(40))
    assert [seed for batch in batches(request) for seed in batch.seeds] == list(range(40))
    assert len(batches(request)) == 3
    assert all(len(batch.seeds) == 1 for batch in batches(replace(request, width=1024, height=1024)))


def test_a_sampler_keeps_the_models_schedule_only_where_it_has_a_use_for_it(model: Model):
    assert resolve(model.folder, "a", [1], sampler="euler").schedule == "trailing"
    assert resolve(model.folder, "a", [1], sampler="lcm").schedule == "lcm"


def test_fingerprints_tell_models_apart(ensemble_folder: Path, tmp_path: Path):
    import shutil

    shutil.copytree(ensemble_folder, tmp_path / "copy")
    assert open_folder(tmp_path / "copy").fingerprint == open_folder(ensemble_folder).fingerprint
    path = tmp_path / "copy" / "unet" / "diffusion_pytorch_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert open_folder(tmp_path / "copy").fingerprint != open_folder(ensemble_folder).fingerprint
    big = tmp_path / "big"
    big.mkdir()
    (big / "w.safetensors").write_bytes(b"\0" * 5_000_000)
    before = fingerprint(big, ["."])
    (big / "w.safetensors").write_bytes(b"\0" * 4_999_999 + b"\1")
    assert fingerprint(big, ["."]) != before

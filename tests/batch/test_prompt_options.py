"""How prompts are read, from option to picture and back: choices by seed, chunks, T5 left out or let go, and pictures from before."""

import gc
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tu_diffuse.batch import studio as studio_module
from tu_diffuse.batch.drafts import Drawn
from tu_diffuse.batch.engine import render
from tu_diffuse.batch.items import Item
from tu_diffuse.batch.plan import Plan, extend, load_plan, save_plan
from tu_diffuse.batch.studio import Studio
from tu_diffuse.cli.main import run
from tu_diffuse.contracts import Conditioning
from tu_diffuse.errors import UsageError
from tu_diffuse.pipeline.adapters.adapters import Shelf
from tu_diffuse.pipeline.model import loading, place
from tu_diffuse.pipeline.model.folder import open_folder
from tu_diffuse.pipeline.model.loading import Model, load_model, texts_of
from tu_diffuse.pipeline.replay import request_of
from tu_diffuse.pipeline.request import EARLIER
from tu_diffuse.pipeline.resolve import resolve, resolve_all
from tu_diffuse.pipeline.text_to_image import Picture, text_to_image
from tu_diffuse.schedulers.schedules import make_schedule
from tu_diffuse.text_encoders.t5 import T5Encoder

LONG = "a red apple to the left of a blue star"  # more than one chunk of the tiny models' 16 tokens


@pytest.fixture(scope="module")
def model(ensemble_folder: Path) -> Model:
    return load_model(open_folder(ensemble_folder), dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def sd(sd1_folder: Path) -> Model:
    return load_model(open_folder(sd1_folder), dtype="float32", device="cpu")


def drawn(model: Model, prompt: str = "a star", seeds: tuple[int, ...] = (5,), **options: Any) -> list[Picture]:
    options = {"steps": 4, "width": 32, "height": 32, "guidance": 3.0} | options
    requests = resolve_all(model.folder, prompt, seeds, **options)
    return [event for request in requests for event in text_to_image(model, request) if isinstance(event, Picture)]


def pixels(model: Model, *arguments: Any, **options: Any) -> torch.Tensor:
    [picture] = drawn(model, *arguments, **options)
    return picture.pixels


def test_long_prompts_are_read_in_chunks_unless_asked_not_to(sd: Model, model: Model) -> None:
    for one in (sd, model):
        chunked, cut, short = drawn(one, LONG), drawn(one, LONG, long_prompts="truncate"), drawn(one, "a red")
        assert (chunked[0].pixels.int() - cut[0].pixels).abs().max() > 1
        assert cut[0].settings["truncated"]["clip"].endswith("a blue star")
        assert "clip" not in chunked[0].settings["truncated"]
        assert torch.equal(short[0].pixels, pixels(one, "a red", long_prompts="truncate"))
    assert drawn(model, LONG)[0].settings["truncated"].keys() == {"t5"}
    with pytest.raises(UsageError, match="text encoder clip"):
        drawn(sd, LONG, long_prompts="truncate", strict=True)
    assert drawn(sd, LONG, strict=True)
    assert (pixels(sd, "a red", negative=LONG).int() - pixels(sd, "a red", negative=LONG, long_prompts="truncate")).abs().max() > 1


def test_syntax_is_plain_unless_asked_for(sd: Model) -> None:
    plain, weighted, none = (pixels(sd, text, syntax=syntax) for text, syntax in (("a (b:3)", "plain"), ("a (b:3)", "weighted"), ("a b", "plain")))
    assert not torch.equal(plain, weighted)
    assert not torch.equal(none, weighted)
    assert torch.equal(none, pixels(sd, "a (b:1)", syntax="weighted"))
    assert torch.equal(none, pixels(sd, "a b", syntax="weighted"))
    assert not torch.equal(pixels(sd, "a b", negative="[c]", syntax="weighted"), pixels(sd, "a b", negative="c"))
    for wrong in ({"prompt": "(a"}, {"prompt": "a", "negative": "b]"}, {"prompt": "()"}):
        with pytest.raises(UsageError):
            resolve(sd.folder, wrong.pop("prompt"), [1], syntax="weighted", **wrong)


def test_each_picture_draws_what_its_seed_chose(model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompt, folder = "a {red|blue|green} {star|\\(b\\)}", str(model.folder.path)
    assert run(["generate", prompt, "--negative", "{x|y}", "--syntax", "weighted", "--seed", "3", "--count", "4", "--model", folder, "--json",
                "--device", "cpu", "--out", f"{tmp_path}/"]) == 0  # fmt: skip
    settings = [json.loads(line)["settings"] for line in capsys.readouterr().out.splitlines()]
    assert sorted(one["seed"] for one in settings) == [3, 4, 5, 6]
    assert len({one["prompt"] for one in settings}) > 1
    assert all("{" not in one["prompt"] and one["template"] == [prompt, "{x|y}"] for one in settings)
    for one, path in zip(settings, sorted(tmp_path.glob("*.png")), strict=True):
        assert run(["replay", str(path), "--model", folder]) == 0
        assert "equal" in capsys.readouterr().out
        again = resolve_all(model.folder, prompt, [one["seed"]], negative="{x|y}", syntax="weighted")
        assert (again[0].prompt, again[0].negative) == (one["prompt"], one["negative"])


def test_a_batch_chooses_by_line_and_seed(items: Callable[..., list[Item]], ensemble_folder: Path, tmp_path: Path) -> None:
    made = items({"prompt": "a {red|blue} star", "seed": 1, "count": 8, "syntax": "weighted"}, {"prompt": "a {b}", "seed": 1})
    assert {item.request.prompt for item in made[:8]} == {"a red star", "a blue star"}
    assert made[8].request.prompt == "a {b}"
    [alone] = items({"prompt": "a {red|blue} star", "seed": 5, "syntax": "weighted"})
    assert alone.request == made[4].request
    plan = extend(Plan(open_folder(ensemble_folder).fingerprint), made, None)
    save_plan(plan, tmp_path)
    assert load_plan(tmp_path, plan.model) == plan


def test_a_folder_of_weighted_lines_replays(ensemble_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [
        {"prompt": "a {red|blue} (star:1.4)", "syntax": "weighted", "seed": 1, "count": 2},
        {"prompt": LONG, "seed": 2},
        {"prompt": LONG, "seed": 2, "long_prompts": "truncate"},
        {"prompt": "a", "seed": 3, "no_t5": True},
        {"prompt": "a", "seed": 3, "clip_weight": 0.5, "t5_weight": 2},
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    common = ["--model", str(ensemble_folder), "--device", "cpu"]
    assert run(["batch", str(tmp_path / "p.jsonl"), "--out", str(tmp_path / "out"), "--steps", "3", *common]) == 0
    capsys.readouterr()
    pictures = sorted((tmp_path / "out").glob("0*.png"))
    assert len(pictures) == 6
    for picture in pictures:
        assert run(["replay", str(picture), *common]) == 0
        assert capsys.readouterr().out == "equal\n"
    assert len({picture.read_bytes()[-3000:] for picture in pictures}) == 6


def test_weights_of_the_encoders(model: Model, sd: Model) -> None:
    same = pixels(model)
    assert torch.equal(same, pixels(model, clip_weight=1, t5_weight=1))
    assert torch.equal(pixels(model, no_t5=True), pixels(model, t5_weight=0))
    others = [pixels(model, **{name: value}) for name in ("clip_weight", "t5_weight") for value in (0, 0.5, 3)]
    assert len({one.numpy().tobytes() for one in (same, *others)}) == 7
    assert drawn(model, "a" * 90, no_t5=True)[0].settings["truncated"] == {}
    for options, message in (
        ({"no_t5": True}, "--no-t5 has no"),
        ({"clip_weight": 2}, "--clip-weight has no"),
        ({"t5_weight": 2}, "--t5-weight has"),
    ):
        with pytest.raises(UsageError, match=message):
            resolve(sd.folder, "a", [1], **options)
    with pytest.raises(UsageError, match="--no-t5 stands beside"):
        resolve(model.folder, "a", [1], no_t5=True, t5_weight=2)
    with pytest.raises(UsageError, match="out of range"):
        resolve(model.folder, "a", [1], clip_weight=-1)


def t5_encoders() -> int:
    gc.collect()
    return sum(isinstance(one, T5Encoder) for one in gc.get_objects())


def test_text_encoders_are_gone_before_the_experts_come(ensemble_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, real, there = open_folder(ensemble_folder), loading.load_experts, list[int]()
    requests = [resolve(folder, text, [5], steps=2) for text in ("a star", "b")]
    before = t5_encoders()

    def counting(*arguments: Any) -> Any:
        there.append(t5_encoders() - before)
        return real(*arguments)

    monkeypatch.setattr(loading, "load_experts", counting)
    read = load_model(folder, dtype="float32", device="cpu", texts=texts_of(Shelf(folder), requests))
    kept = load_model(folder, dtype="float32", device="cpu")
    for request in requests:
        [one], [other] = ([event.pixels for event in text_to_image(m, request) if isinstance(event, Picture)] for m in (read, kept))
        assert torch.equal(one, other)
    assert there == [0, 0]
    assert t5_encoders() - before == 1  # of the model that was not told what it will read
    del kept
    assert t5_encoders() == before


def test_t5_is_not_loaded_where_it_is_left_out(ensemble_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[type] = []
    real = place.fill

    def noting(network: Any, *arguments: Any, **options: Any) -> Any:
        loaded.append(type(network))
        return real(network, *arguments, **options)

    monkeypatch.setattr(place, "fill", noting)
    common = ["generate", "a star", "--model", str(ensemble_folder), "--seed", "1", "--steps", "2", "--device", "cpu"]
    assert run([*common, "--no-t5", "--out", str(tmp_path / "a.png")]) == 0
    assert loaded
    assert T5Encoder not in loaded
    assert run([*common, "--out", str(tmp_path / "b.png")]) == 0
    assert T5Encoder in loaded


def test_pictures_from_before_mean_what_they_meant(model: Model) -> None:
    [picture] = drawn(model, LONG, long_prompts="truncate")
    old = {name: value for name, value in picture.settings.items() if name not in EARLIER}
    assert request_of(model.folder, old) == request_of(model.folder, picture.settings)
    request, _ = request_of(model.folder, old)
    assert (request.long_prompts, request.syntax) == ("truncate", "plain")
    [again] = [event for event in text_to_image(model, request) if isinstance(event, Picture)]
    assert torch.equal(again.pixels, picture.pixels)
    [newer] = drawn(model, "a (star:1.2) {b|c}", syntax="weighted", t5_weight=0.5)
    request, _ = request_of(model.folder, json.loads(json.dumps(newer.settings)))
    assert replace(request, strict=False) == resolve_all(
        model.folder, "a (star:1.2) {b|c}", [5], syntax="weighted", t5_weight=0.5, steps=4, width=32, height=32, guidance=3.0
    )[0]  # fmt: skip


def test_a_weight_in_plain_text_is_worth_a_word(ensemble_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--model", str(ensemble_folder), "--seed", "1", "--steps", "1", "--device", "cpu", "--out", f"{tmp_path}/"]
    for text, arguments, told in (("a (b:1.3)", [], True), ("a (b)", [], False), ("a (b:1.3)", ["--syntax", "weighted"], False)):
        assert run(["generate", text, *arguments, *common]) == 0
        assert ("--syntax weighted" in capsys.readouterr().err) == told


@torch.no_grad()
def test_a_token_counts_as_that_many(sd: Model) -> None:
    schedule = make_schedule(sd.folder.noise, "euler", 3)
    denoise = sd.experts.table(schedule.timestep_at)
    generator = torch.Generator().manual_seed(0)
    x, tokens = torch.randn(1, 4, 16, 16, generator=generator), torch.randn(1, 3, 16, generator=generator)
    counts = torch.tensor([2.0, 0.0, 3.0])
    copies = tokens[:, [0, 0, 2, 2, 2]]
    sigma = torch.tensor([1.0])
    wanted, all_once = (denoise(x, sigma, Conditioning(one)) for one in (copies, tokens))
    assert (wanted - all_once).abs().max() > 1e-3
    assert torch.allclose(denoise(x, sigma, Conditioning(tokens, counts[None])), wanted, atol=1e-5)
    assert torch.equal(denoise(x, sigma, Conditioning(tokens, torch.ones(1, 3))), all_once)


def test_a_batch_lets_go_of_t5_where_memory_is_short(
    items: Callable[..., list[Item]], studio: Callable[..., Studio], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real, there, before = studio_module.load_experts, list[int](), t5_encoders()

    def counting(*arguments: Any, **options: Any) -> Any:
        there.append(t5_encoders() - before)
        return real(*arguments, **options)

    monkeypatch.setattr(studio_module, "load_experts", counting)
    made = items("a star", "b", "c", steps=2)
    short = studio(roomy=False)
    drawn_there = list(render(short, [made[:2], made[2:]], 10**9, tmp_path, lambda _: None))
    assert all(isinstance(one, Drawn) for one in drawn_there)
    assert there == [0]
    assert short.loads["text encoders"] == 1


def test_names_and_scores_see_the_words_alone(items: Callable[..., list[Item]]) -> None:
    [item] = items({"prompt": "a (red:1.3) [star] BREAK \\(b\\)", "syntax": "weighted", "seed": 1})
    assert item.request.words == "a red star (b)"
    assert item.file_name(1) == "00001-a-red-star-b-1.png"

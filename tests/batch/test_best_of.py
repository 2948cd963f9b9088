"""The best of several candidates, judged again by open_clip on the pictures of a run that keeps them all."""

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny_models import CLIP_PAIR
from torchvision.transforms.functional import pil_to_tensor, resize
from transformers import CLIPTextModelWithProjection, CLIPVisionModelWithProjection
from tu_diffuse.batch.drafts import Drawn, Lost
from tu_diffuse.batch.journal import read_journal
from tu_diffuse.batch.scores import Scorer, keep_best, load_scorer, open_score_model
from tu_diffuse.cli.main import run
from tu_diffuse.pipeline.metadata import read_metadata
from tu_diffuse.pipeline.model.folder import EMBEDDED
from tu_diffuse.text_encoders.tokenizer import load_tokenizer
from world import STAGES, captions, render, sample_scene, swap

Batch = Callable[..., tuple[int, list[dict[str, Any]]]]


@pytest.fixture
def batch(ensemble_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Batch:
    def call(text: str, *arguments: str, out: str = "out") -> tuple[int, list[dict[str, Any]]]:
        (tmp_path / "prompts.txt").write_text(text)
        code = run(["batch", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / out), "--model", str(ensemble_folder), "--json", *arguments])
        return code, [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return call


def pixels(path: Path) -> bytes:
    with Image.open(path) as image:
        return image.convert("RGB").tobytes()


def judged(folder: Path, clip_folder: Path) -> dict[int, float]:
    """Seed -> 100 cos of each picture of one prompt."""
    clip, _, transform = open_clip.create_model_and_transforms(f"local-dir:{clip_folder}")
    clip.eval()
    found: dict[int, float] = {}
    for path in folder.glob("0*.png"):
        settings = read_metadata(path)
        with torch.no_grad(), Image.open(path) as image:
            seen = clip.encode_image(transform(image.convert("RGB"))[None])
            said = clip.encode_text(open_clip.tokenize([settings["prompt"]]))
        found[settings["seed"]] = 100 * float(torch.cosine_similarity(seen, said))
    return found


def test_the_best_is_kept_and_all_scores_are_told(
    batch: Batch, tmp_path: Path, clip_folder: Path, ensemble_folder: Path, capsys: pytest.CaptureFixture[str]
):
    arguments = ["--best-of", "4", "--score-model", str(clip_folder), "--sampler", "euler_a"]
    code, events = batch("a red apple --d 7\n", *arguments)
    assert code == 0
    picture = next(event for event in events if event["event"] == "picture")
    scores = {int(seed): score for seed, score in picture["scores"].items()}
    assert (events[-1]["asked"], events[-1]["done"], len(scores), 7 in scores) == (1, 1, 4, True)

    code, _ = batch(f"a red apple --d {','.join(map(str, scores))}\n", "--sampler", "euler_a", out="all")
    assert code == 0
    assert scores == pytest.approx(judged(tmp_path / "all", clip_folder), abs=1e-3)
    best = max(scores, key=lambda seed: scores[seed])
    (kept,) = (tmp_path / "out").glob("0*.png")
    (same,) = (tmp_path / "all").glob(f"*-{best}.png")
    assert pixels(kept) == pixels(same)
    settings = read_metadata(kept)
    assert (settings["seed"], settings["best_of"]["scores"]) == (best, picture["scores"])
    assert picture["score"] == scores[best] == max(scores.values())

    assert f"--seed {best}" in (tmp_path / "out" / "gallery.html").read_text()

    # A line that a kill took is read back from the picture, and the picture can be drawn again.
    (entry,) = read_journal(tmp_path / "out").values()
    (tmp_path / "out" / "journal.jsonl").unlink()
    assert batch("a red apple --d 7\n", *arguments)[1][-1]["drawn"] == 0
    assert list(read_journal(tmp_path / "out").values()) == [entry]
    assert run(["replay", str(kept), "--model", str(ensemble_folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["equal"]


def test_candidates_are_cut_into_batches_and_drawn_again_in_them(batch: Batch, tmp_path: Path, clip_folder: Path):
    text, arguments = "a\nb\nc\nd\n", ["--best-of", "2", "--score-model", str(clip_folder), "--batch-size", "4"]
    code, events = batch(text, *arguments)
    assert (code, events[-1]["asked"], events[-1]["done"]) == (0, 4, 4)
    assert next(event["batches"] for event in events if event["event"] == "plan") == 2
    before = {path.name: pixels(path) for path in (tmp_path / "out").glob("0*.png")}
    next((tmp_path / "out").glob("*-c-*.png")).unlink()
    code, events = batch(text, *arguments, "--memory", "1e-4")
    assert (code, events[-1]["drawn"], events[-1]["done"]) == (0, 1, 4)
    assert {path.name: pixels(path) for path in (tmp_path / "out").glob("0*.png")} == before
    # Without candidates, or with more of them, they are other pictures.
    assert batch(text, "--batch-size", "4")[1][-1]["drawn"] == 4


def test_a_lost_candidate_costs_itself_only(items):
    (item,) = (one for one in items({"prompt": "a", "seed": 4294967295}, best_of=3))
    first, second, third = item.candidates
    assert first == item
    assert len({first.seed, second.seed, third.seed}) == 3
    assert all(0 <= one.seed < 2**32 and one.asked == item.key and one.request.prompt == "a" for one in item.candidates)

    def brightness(pictures: Sequence[torch.Tensor], prompt: str) -> list[float]:
        return [float(picture.float().mean()) for picture in pictures]

    scorer = Scorer("hash", brightness)
    grey = [torch.full((8, 8, 3), level, dtype=torch.uint8) for level in (10, 20)]
    (kept,) = keep_best([Lost(second, "nan"), Drawn(first, grey[0], {}), Drawn(third, grey[1], {})], scorer)
    assert isinstance(kept, Drawn)
    assert (kept.item.key, kept.item.seed, kept.settings["item"]) == (item.key, third.seed, item.key)
    assert kept.settings["best_of"]["scores"] == {str(second.seed): None, str(first.seed): 10.0, str(third.seed): 20.0}
    (lost,) = keep_best([Lost(one, "nan") for one in reversed(item.candidates)], scorer)
    assert isinstance(lost, Lost)
    assert lost.item.key == item.key


@pytest.mark.parametrize("model", [[], ["--model", str(EMBEDDED)]])
def test_the_embedded_model_brings_its_own_pair(tmp_path: Path, capsys: pytest.CaptureFixture[str], model: list[str]):
    """Judged again by transformers' own towers, on the pictures of a run that keeps all."""
    prompts, prompt = tmp_path / "prompts.txt", "a red circle above a blue star"
    prompts.write_text(f"{prompt} --d 7\n")
    arguments = ["--steps", "6", "--json", *model]
    assert run(["batch", str(prompts), "--out", str(tmp_path / "out"), "--best-of", "3", *arguments]) == 0
    picture = next(event for event in map(json.loads, capsys.readouterr().out.splitlines()) if event["event"] == "picture")
    prompts.write_text(f"{prompt} --d {','.join(picture['scores'])}\n")
    assert run(["batch", str(prompts), "--out", str(tmp_path / "all"), *arguments]) == 0

    text = CLIPTextModelWithProjection.from_pretrained(EMBEDDED / "text_encoder", dtype=torch.float32)
    image = CLIPVisionModelWithProjection.from_pretrained(EMBEDDED / "image_encoder", dtype=torch.float32)
    said = text(load_tokenizer(EMBEDDED / "tokenizer").encode([prompt]).ids).text_embeds
    for path in (tmp_path / "all").glob("0*.png"):
        with Image.open(path) as drawn:
            seen = image(resize(pil_to_tensor(drawn.convert("RGB"))[None] / 127.5 - 1, [64, 64], antialias=True)).image_embeds
        cosine = float(torch.cosine_similarity(seen, said).detach())
        assert picture["scores"][str(read_metadata(path)["seed"])] == pytest.approx(100 * cosine, abs=1e-2)
    assert len(picture["scores"]) == 3
    assert picture["score"] == max(picture["scores"].values())


def test_the_embedded_pair_tells_right_from_exchanged():
    """True renders of held-out scenes: the caption, against that with colours exchanged, or relation or place mirrored."""
    score = load_scorer(open_score_model(None), torch.device("cpu")).score
    rng, right, scenes = random.Random(0), 0, 60
    for stage in ("shapes", "stickers") * (scenes // 2):
        scene = sample_scene(rng, STAGES[stage], held_out=True)
        picture = torch.from_numpy(render(scene).copy())
        said, exchanged = (score([picture], captions(one, rng, loose=0))[0] for one in (scene, swap(scene, rng)))
        right += said > exchanged
    assert right >= 0.8 * scenes  # a guess would have half of them


def test_what_cannot_score(batch: Batch, tmp_path: Path, clip_folder: Path):
    model = ["--score-model", str(clip_folder)]
    for arguments in (
        ["--best-of", "2"],  # of a model that is not the embedded one
        model,
        ["--best-of", "1", *model],
        ["--best-of", "65", *model],
        ["--best-of", "2", "--score-model", "none"],
    ):
        assert batch("a\n", *arguments)[0] == 2
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    save_file({"x": torch.ones(1)}, wrong / "open_clip_model.safetensors")
    for config in ({}, {"model_cfg": CLIP_PAIR | {"text_cfg": {"hf_model_name": "roberta-base"}}}, {"model_cfg": CLIP_PAIR}):
        (wrong / "open_clip_config.json").write_text(json.dumps(config))
        assert batch("a\n", "--best-of", "2", "--score-model", str(wrong))[0] == 4

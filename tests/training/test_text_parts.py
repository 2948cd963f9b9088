"""Other text encoders: T5 added to a model that knows CLIP alone, which changes nothing until it is trained; towers from open_clip."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from open_clip import CLIP
from safetensors.torch import load_file, save_file
from tiny_models import randomised, t5_tokenizer
from torch import Tensor
from transformers import T5Config, T5EncoderModel
from tu_diffuse.cli.main import run
from tu_diffuse.errors import ModelError, UnsafeError, UsageError
from tu_diffuse.pipeline.model.folder import open_folder
from tu_diffuse.pipeline.model.loading import load_model
from tu_diffuse.pipeline.model.place import choose_place
from tu_diffuse.pipeline.model.readers import load_text
from tu_diffuse.pipeline.resolve import resolve
from tu_diffuse.pipeline.text_to_image import Picture, text_to_image
from tu_diffuse.shards.index import index_shards
from tu_diffuse.text_encoders.parts import ClipPart
from tu_diffuse.text_encoders.t5_residual import T5Residual, T5ResidualConfig
from tu_diffuse.training.config import FinetuneConfig
from tu_diffuse.training.finetune import finetune, make_plan
from tu_diffuse.training.text_parts import add_t5, use_clip
from world import STAGES
from write_shards import write_shard

LONG = "a red apple to the left of a blue star"
CASES: list[dict[str, Any]] = [
    {"prompt": "a star"},
    {"prompt": LONG, "negative": "grey", "seeds": [3, 4]},
    {"prompt": "a", "negative": LONG, "width": 48, "height": 24},
    {"prompt": "a (red:1.4) star BREAK b", "syntax": "weighted", "sampler": "euler_a"},
]


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("t5") / "t5"
    t5_tokenizer(folder)
    randomised(
        T5EncoderModel(T5Config(vocab_size=103, d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu")), 5
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def with_t5(sd1_folder: Path, t5_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("added") / "sd1-t5"
    assert run(["models", "add-t5", str(sd1_folder), "--t5", str(t5_folder), "--out", str(out)]) == 0
    return out


def pictures(folder: Path, cases: list[dict[str, Any]], **options: Any) -> list[Tensor]:
    model = load_model(open_folder(folder), dtype="float32", device="cpu")
    given = [{"seeds": [7], "steps": 3, "width": 32, "height": 32} | case | options for case in cases]
    requests = [resolve(model.folder, case.pop("prompt"), case.pop("seeds"), **case) for case in given]
    return [event.pixels for request in requests for event in text_to_image(model, request) if isinstance(event, Picture)]


def same(one: list[Tensor], other: list[Tensor]) -> list[bool]:
    return [torch.equal(first, second) for first, second in zip(one, other, strict=True)]


def test_it_draws_what_the_model_drew(sd1_folder: Path, with_t5: Path) -> None:
    before = pictures(sd1_folder, CASES)
    assert len({picture.numpy().tobytes() for picture in before}) == len(before) == 5
    assert all(same(before, pictures(with_t5, CASES)))
    model = open_folder(with_t5)
    assert (model.family, model.parts["conditioner"]) == ("sd-t5", "T5Residual")
    assert json.loads((with_t5 / "model_index.json").read_text())["_class_name"] == "TuDiffusePipeline"


@pytest.mark.parametrize("encoded", [False, True])
def test_training_opens_it(sd1_folder: Path, with_t5: Path, tmp_path: Path, encoded: bool) -> None:
    shard = write_shard(tmp_path, 0, 12, STAGES["shapes"], 5, "png")
    shards = str(shard)
    if encoded:
        assert (
            run(["shards", "encode", shards, "--model", str(with_t5), "--out", str(tmp_path / "encoded"), "--resolution", "32", "--dtype", "float32"])
            == 0
        )
        shards = str(tmp_path / "encoded" / shard.name)
    index = index_shards([shards])
    config = FinetuneConfig(shards=("unused",), steps=3, batch_size=4, lr=2e-2, resolution=32, workers=0, caption_dropout=0.1, train="conditioner")
    finetune(make_plan(config, open_folder(with_t5), index, range(len(index.samples))), tmp_path / "run", lambda _: None)
    tuned = tmp_path / "run" / "model"
    weights = "conditioner/diffusion_pytorch_model.safetensors"
    before, after = load_file(with_t5 / weights), load_file(tuned / weights)
    assert not before["to_out.weight"].any()
    assert all(
        not torch.equal(before[name], after[name]) for name in ("to_out.weight", "to_v.weight", "to_k.weight", "to_q.weight", "norm_t5.weight")
    )
    drawn, old = pictures(tuned, CASES), pictures(sd1_folder, CASES)
    assert not any(same(drawn, old))
    assert all(same(pictures(tuned, CASES, no_t5=True), old))  # CLIP and U-Net are what they were
    assert not any(same(pictures(tuned, CASES, t5_weight=0.5), drawn))
    unet = "unet/diffusion_pytorch_model.safetensors"
    assert (tuned / unet).read_bytes() == (with_t5 / unet).read_bytes()


@pytest.fixture(scope="module", params=["sdxl", "refiner"])
def sdxl_pair(request: pytest.FixtureRequest, t5_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """SDXL, or its refiner, and the same with T5."""
    old = request.getfixturevalue(f"{request.param}_folder")
    out = tmp_path_factory.mktemp("added") / f"{request.param}-t5"
    assert run(["models", "add-t5", str(old), "--t5", str(t5_folder), "--out", str(out)]) == 0
    return old, out


def test_sdxl_draws_what_it_drew_and_training_opens_it(sdxl_pair: tuple[Path, Path], tmp_path: Path) -> None:
    old, new = sdxl_pair
    model = open_folder(new)
    base = open_folder(old)
    assert (model.family, model.zero_negative) == (f"{base.family}-t5", base.zero_negative)
    before = pictures(old, CASES)
    assert len({picture.numpy().tobytes() for picture in before}) == len(before) == 5
    assert all(same(before, pictures(new, CASES)))

    shards = str(write_shard(tmp_path, 0, 8, STAGES["shapes"], 5, "png"))
    encoded = tmp_path / "encoded"
    if base.family == "sdxl":
        assert run(["shards", "encode", shards, "--model", str(new), "--out", str(encoded), "--resolution", "32", "--dtype", "float32"]) == 0
    trained: list[dict[str, Tensor]] = []
    sources = (shards, str(encoded / Path(shards).name)) if base.family == "sdxl" else (shards,)
    for number, source in enumerate(sources):
        index = index_shards([source])
        config = FinetuneConfig(
            shards=("unused",), steps=2, batch_size=4, lr=2e-2, resolution=32, workers=0, caption_dropout=0.1, train="conditioner"
        )
        finetune(make_plan(config, model, index, range(len(index.samples))), tmp_path / str(number), lambda _: None)
        trained.append(load_file(tmp_path / str(number) / "model" / "conditioner" / "diffusion_pytorch_model.safetensors"))
    assert trained[0]["to_out.weight"].abs().max() > 1e-4
    for name, weight in trained[0].items():  # of pictures and of encoded shards alike
        torch.testing.assert_close(weight, trained[-1][name], atol=1e-3, rtol=1e-2)
    drawn = pictures(tmp_path / "0" / "model", CASES)
    assert not any(same(drawn, before))
    assert all(same(pictures(tmp_path / "0" / "model", CASES, no_t5=True), before))
    assert not any(same(pictures(tmp_path / "0" / "model", CASES, t5_weight=0.5), drawn))


def test_loras_of_sdxl_with_t5(sdxl_pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What a run with LoRA writes is taken whole by the model, T5's part too: SDXL's in kohya's layout, the refiner's in diffusers'."""
    old, new = sdxl_pair
    kohya = open_folder(old).family == "sdxl"
    shards = str(write_shard(tmp_path, 0, 8, STAGES["shapes"], 5, "png"))
    arguments = ["finetune", "--model", str(new), "--shards", shards, "--out", str(tmp_path / "run"), "--resolution", "32", "--steps", "2"]
    arguments += ["--batch-size", "4", "--workers", "0", "--lora", "2", "--lr", "0.02", "--device", "cpu", "--train"]
    arguments += ["unet,text-encoders", "--format", "kohya"] if kohya else ["unet,text-encoders,conditioner"]
    assert run(arguments) == 0, capsys.readouterr().err
    [lora] = (tmp_path / "run").glob("*.safetensors")
    assert any(name.startswith("lora_te3_" if kohya else "text_encoder_3.") for name in load_file(lora))
    capsys.readouterr()
    generate = ["generate", LONG, "--model", str(new), "--seed", "3", "--steps", "2", "--json", "--lora", str(lora), "--out", str(tmp_path / "a.png")]
    assert run(generate) == 0, capsys.readouterr().err
    [used] = json.loads(capsys.readouterr().out)["settings"]["loras"]
    assert used["matched"] == used["keys"] > 20


def residual() -> tuple[T5Residual, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = T5Residual(T5ResidualConfig(clip_width=16, t5_width=24, heads=2))
    return model, {
        "clip_tokens": torch.randn(3, 7, 16),
        "t5_tokens": torch.randn(3, 5, 24),
        "t5_mask": torch.tensor([[1, 1, 1, 0, 0], [0] * 5, [1] * 5]) > 0,
    }


def test_the_residual_is_nothing_at_first_and_its_gradient_is_not() -> None:
    model, inputs = residual()
    assert torch.equal(model(**inputs), inputs["clip_tokens"])
    target = torch.randn(3, 7, 16)
    reached: list[set[str]] = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        (model(**inputs) - target).square().mean().backward()
        reached.append({name for name, parameter in model.named_parameters() if parameter.grad is not None and parameter.grad.abs().max() > 1e-7})
        optimizer.step()
    assert reached[0] == {"to_out.weight", "to_out.bias"}
    assert reached[1] >= {"to_v.weight", "to_k.weight", "to_q.weight", "norm_t5.weight", "norm_clip.weight"}


@torch.no_grad()
def test_pads_and_dropped_rows_say_nothing() -> None:
    model, inputs = residual()
    torch.nn.init.normal_(model.to_out.weight)
    out = model(**inputs)
    assert torch.equal(out[1], inputs["clip_tokens"][1])
    assert not torch.allclose(out[[0, 2]], inputs["clip_tokens"][[0, 2]], atol=1e-2)
    noisy = inputs["t5_tokens"].masked_fill(~inputs["t5_mask"][..., None], 100.0)
    assert torch.allclose(model(**inputs | {"t5_tokens": noisy}), out, atol=1e-5)
    assert torch.allclose(model(**inputs, t5_weight=0.5), (out + inputs["clip_tokens"]) / 2, atol=1e-5)


def test_what_cannot_be(sd1_folder: Path, ensemble_folder: Path, t5_folder: Path, with_t5: Path, tmp_path: Path) -> None:
    sd1, out = open_folder(sd1_folder), tmp_path / "out"
    for folder in (ensemble_folder, with_t5):
        with pytest.raises(UsageError, match="T5 is added to models that read as one of sd, sdxl, sdxl-refiner"):
            add_t5(open_folder(folder), t5_folder, out)
    third = tmp_path / "third"  # a third encoder without what joins it
    shutil.copytree(with_t5, third)
    index = json.loads((third / "model_index.json").read_text())
    (third / "model_index.json").write_text(json.dumps(index | {"text_encoder_3": index["text_encoder_2"]}))
    shutil.copytree(third / "text_encoder_2", third / "text_encoder_3")
    with pytest.raises(ModelError, match="third text encoder"):
        open_folder(third)
    with pytest.raises(UsageError, match=r"no config\.json"):
        add_t5(sd1, tmp_path, out)
    with pytest.raises(ModelError, match="clip_text_model"):
        add_t5(sd1, sd1_folder / "text_encoder", out)
    for spoil, error in (("tokenizer.json", ModelError), ("model.safetensors", ModelError)):
        broken = tmp_path / spoil
        shutil.copytree(t5_folder, broken)
        (broken / spoil).unlink()
        with pytest.raises(error):
            add_t5(sd1, broken, out)
    (tmp_path / "model.safetensors" / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(UnsafeError):
        add_t5(sd1, tmp_path / "model.safetensors", out)
    assert not out.exists()
    with pytest.raises(UsageError, match="exists"):
        add_t5(sd1, t5_folder, with_t5)
    config = T5ResidualConfig(clip_width=16, t5_width=24, heads=2)
    assert T5ResidualConfig.from_dict(config.to_dict()) == config
    for change in ({"heads": 3}, {"t5_width": 0}, {"_class_name": "Conditioner"}):
        with pytest.raises(ModelError):
            T5ResidualConfig.from_dict(config.to_dict() | change)
    with pytest.raises(UsageError, match="--clip-weight has no meaning"):
        resolve(open_folder(with_t5), "a", [1], clip_weight=2)
    assert replace(resolve(open_folder(with_t5), "a", [1], no_t5=True), t5_weight=1.0) == resolve(open_folder(with_t5), "a", [1])


def open_clip_tower(folder: Path, width: int, **changes: Any) -> CLIP:
    """A random CLIP, as open_clip lays it out, of the shape of the tiny models' towers and with a layer more."""
    torch.manual_seed(3)
    text = {"context_length": 16, "vocab_size": 514, "width": width, "heads": 2, "layers": 3, "mlp_ratio": 2.0} | changes
    config = {"embed_dim": width, "text_cfg": text, "vision_cfg": {"layers": 1, "width": 16, "head_width": 8, "image_size": 16, "patch_size": 8}}
    model = CLIP(**config).eval()
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    return model


@torch.no_grad()
def theirs(model: CLIP, ids: Tensor, layers: int) -> tuple[Tensor, Tensor]:
    """Tokens after so many layers and the final norm, and the pooled vector, as open_clip computes them."""
    x = model.token_embedding(ids) + model.positional_embedding
    for block in model.transformer.resblocks[:layers]:
        x = block(x, attn_mask=model.attn_mask)
    tokens = model.ln_final(x)
    return tokens, tokens[torch.arange(len(ids)), ids.argmax(dim=-1)] @ model.text_projection


@torch.no_grad()
@pytest.mark.parametrize(("fixture", "part", "width"), [("sd1_folder", "text_encoder", 16), ("sdxl_folder", "text_encoder_2", 24)])
def test_a_tower_from_open_clip(fixture: str, part: str, width: int, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder: Path = request.getfixturevalue(fixture)
    original = open_clip_tower(tmp_path / "tower", width)
    out = tmp_path / "new"
    assert run(["models", "use-clip", str(folder), "--clip", f"local-dir:{tmp_path / 'tower'}", "--part", part, "--out", str(out)]) == 0
    loaded = load_text(open_folder(out), choose_place("float32", "cpu"))
    tower = loaded[1] if isinstance(loaded, tuple) else loaded
    assert isinstance(tower, ClipPart)
    ids = tower.tokenizer.encode(["a red star", "b"]).ids
    ours, (tokens, pooled) = tower.model(ids), theirs(original, ids, 2)
    assert tokens.std() > 0.1
    assert torch.allclose(ours.last_hidden_state, tokens, atol=1e-5)
    assert ours.projected is None if fixture == "sd1_folder" else torch.allclose(ours.projected, pooled, atol=1e-5)
    assert not any(same(pictures(out, CASES[:2]), pictures(folder, CASES[:2])))
    pipeline = {"sd1_folder": StableDiffusionPipeline, "sdxl_folder": StableDiffusionXLPipeline}[fixture].from_pretrained(out)
    theirs_again = getattr(pipeline, part)(ids)
    assert torch.allclose(theirs_again.last_hidden_state, tokens, atol=1e-5)


def test_towers_that_do_not_fit(sd1_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    sd1, out = open_folder(sd1_folder), tmp_path / "out"
    for number, (width, changes) in enumerate([(24, {}), (16, {"layers": 1}), (16, {"vocab_size": 600}), (16, {"context_length": 10})]):
        open_clip_tower(tmp_path / str(number), width, **changes)
        with pytest.raises(ModelError, match="take the tower that the model was trained with"):
            use_clip(sd1, tmp_path / str(number), out)
    open_clip_tower(tmp_path / "good", 16)
    with pytest.raises(UsageError, match="no CLIP text tower 'text_encoder_2'"):
        use_clip(sd1, tmp_path / "good", out, "text_encoder_2")
    (tmp_path / "good" / "open_clip_model.safetensors").unlink()
    (tmp_path / "good" / "open_clip_pytorch_model.bin").write_bytes(b"x")
    with pytest.raises((UnsafeError, ModelError)):
        use_clip(sd1, tmp_path / "good", out)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name, words in (
        ("hf-hub:laion/CLIP-ViT-H-14", "laion/CLIP-ViT-H-14"),
        ("hf-hub:nothing", "is no name of a tower"),
        ("ViT-B-32", "is no name of a tower"),
        (f"local-dir:{tmp_path}", "has no open_clip_config.json"),
    ):
        assert run(["models", "use-clip", str(sd1_folder), "--clip", name, "--out", str(out)]) == 2
        assert words in capsys.readouterr().err
    assert not out.exists()

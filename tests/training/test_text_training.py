"""Text encoders and the conditioner trained: LoRA files in diffusers against the merged model, resume, and what stays as it was."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from tu_diffuse.errors import UsageError
from tu_diffuse.pipeline.adapters.adapters import Shelf, baked
from tu_diffuse.pipeline.model.folder import open_folder
from tu_diffuse.pipeline.model.loading import load_model
from tu_diffuse.pipeline.resolve import resolve
from tu_diffuse.pipeline.text_to_image import Picture, text_to_image
from tu_diffuse.shards.index import ShardIndex, index_shards
from tu_diffuse.single_file.names import ldm_names
from tu_diffuse.training.composing import compose
from tu_diffuse.training.config import FinetuneConfig, make_config
from tu_diffuse.training.encoded import open_source
from tu_diffuse.training.finetune import finetune, make_plan
from tu_diffuse.training.intervals import sigma_of
from tu_diffuse.training.loop import InterruptedRunError
from tu_diffuse.training.objective import Draw
from tu_diffuse.training.result import LORA_FILE
from tu_diffuse.training.subject import read_as
from tu_diffuse.unet.deltas import read_expert
from world import STAGES
from write_shards import write_shard

CPU = torch.device("cpu")
BASE = FinetuneConfig(shards=("unused",), steps=3, batch_size=4, lr=2e-2, resolution=32, workers=0, caption_dropout=0.3)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    return index_shards([str(write_shard(tmp_path_factory.mktemp("shards"), 0, 12, STAGES["shapes"], 5, "png"))])


def run(folder: Path, index: ShardIndex, out: Path, should_stop: Any = lambda: False, **changes: Any) -> list[str]:
    lines: list[str] = []
    plan = make_plan(replace(BASE, **changes), open_folder(folder), index, range(len(index.samples)))
    finetune(plan, out, lambda event: lines.append(str(event)), should_stop=should_stop)
    return lines


def changed(one: Path, other: Path) -> set[str]:
    """The components whose weights differ between two model folders."""
    found: set[str] = set()
    for path in one.glob("*/*.safetensors"):
        before, after = load_file(path), load_file(other / path.relative_to(one))
        assert before.keys() == after.keys()
        assert all(tensor.dtype == after[name].dtype for name, tensor in before.items())
        if any(not torch.equal(tensor, after[name]) for name, tensor in before.items()):
            found.add(path.parent.name)
    return found


def said(pipeline: Any) -> Tensor:
    """What a pipeline of diffusers predicts for a fixed input and prompt, its text encoders included."""
    width = pipeline.unet.config.sample_size
    x = torch.randn(1, 4, width, width, generator=torch.Generator().manual_seed(0))
    encoded = pipeline.encode_prompt("a red star", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    extra = {}
    if len(encoded) == 4:
        extra = {"added_cond_kwargs": {"text_embeds": encoded[2], "time_ids": torch.tensor([[32.0, 32, 0, 0, 32, 32]])}}
    with torch.no_grad():
        return pipeline.unet(x, torch.tensor([300]), encoded[0], **extra).sample


def assert_baked(folder: Path, loras: list[str], trained: Path) -> None:
    """The LoRA files, added by us to the model that was trained, make the result."""
    model, wanted = open_folder(folder), open_folder(trained)
    shelf = Shelf(model)
    uses = tuple(map(shelf.lora, loras))
    assert all(use.matched == use.keys > 0 for use in uses)
    adapters, names = shelf.adapters(uses), [entry.name for entry in model.experts]
    for own, other in zip(model.experts, wanted.experts, strict=True):
        got = baked(adapters, "unet", {name: stored.tensor for name, stored in read_expert(folder / own.subfolder).items()}, [own.name])
        for name, stored in read_expert(trained / other.subfolder).items():
            torch.testing.assert_close(got[name], stored.tensor, atol=1e-6, rtol=1e-5)
    for component in ("text_encoder", "text_encoder_2", "conditioner"):
        for path in (folder / component).glob("*.safetensors"):
            got = baked(adapters, component, load_file(path), names)
            for name, tensor in load_file(trained / component / path.name).items():
                torch.testing.assert_close(got[name], tensor, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("fixture", "format", "train"),
    [
        ("sd1_folder", "diffusers", "text-encoders"),
        ("sd1_folder", "kohya", "unet,text-encoders"),
        ("sdxl_folder", "diffusers", "unet,text-encoders"),
        ("sdxl_folder", "kohya", "unet,text-encoders"),
    ],
)
def test_lora_files_load_in_diffusers_and_equal_the_merged_model(
    request: pytest.FixtureRequest, index: ShardIndex, tmp_path: Path, fixture: str, format: str, train: str
) -> None:
    import diffusers

    folder = request.getfixturevalue(fixture)
    run(folder, index, tmp_path, lora=4, lora_alpha=8.0, format=format, train=train)
    towers = {"sd1_folder": {"text_encoder"}, "sdxl_folder": {"text_encoder", "text_encoder_2"}}[fixture] if "text" in train else set()
    assert changed(folder, tmp_path / "model") == towers | ({"unet"} if "unet" in train else set())
    before, pipeline, merged = (
        diffusers.DiffusionPipeline.from_pretrained(path, torch_dtype=torch.float32) for path in (folder, folder, tmp_path / "model")
    )
    pipeline.load_lora_weights(tmp_path / LORA_FILE)
    adapted = sum(hasattr(module, "lora_A") for part in (pipeline.unet, *(getattr(pipeline, tower) for tower in towers)) for module in part.modules())
    assert adapted == sum(name.endswith((".lora_A.weight", ".lora_down.weight")) for name in load_file(tmp_path / LORA_FILE)) > 0
    assert (said(pipeline) - said(before)).abs().max() > 1e-3
    torch.testing.assert_close(said(pipeline), said(merged), atol=2e-5, rtol=0)
    assert_baked(folder, [str(tmp_path / LORA_FILE)], tmp_path / "model")


def test_kohya_names_are_those_of_the_original_network(sdxl_folder: Path, index: ShardIndex, tmp_path: Path) -> None:
    """SDXL's transformers lie at entries 4, 5, 7 and 8 of the way down and 0 to 5 of the way up (Podell et al. 2023; sgm's configuration)."""
    attention = "transformer_blocks.0.attn1.to_q"
    down = [f"down_blocks.{level}.attentions.{i}.{attention}" for level in (1, 2) for i in range(2)]
    up = [f"up_blocks.{level}.attentions.{i}.{attention}" for level in (0, 1) for i in range(3)]
    originals = [*(f"input_blocks.{entry}" for entry in (4, 5, 7, 8)), *(f"output_blocks.{entry}" for entry in range(6)), "middle_block"]
    modules = [*down, *up, f"mid_block.attentions.0.{attention}"]
    sdxl = {"down_block_types": ["DownBlock2D", *["CrossAttnDownBlock2D"] * 2]}
    assert ldm_names(modules, sdxl) == {f"{entry}.1.{attention}": module for entry, module in zip(originals, modules, strict=True)}
    run(sdxl_folder, index, tmp_path, steps=1, lora=2, format="kohya", train="unet,text-encoders")
    names = set(load_file(tmp_path / LORA_FILE))
    assert "lora_te2_text_model_encoder_layers_1_self_attn_out_proj.alpha" in names
    assert {name.split("_")[1] for name in names} == {"unet", "te1", "te2"}


@pytest.mark.parametrize("lora", [None, 2])
def test_stopped_and_resumed_equals_uninterrupted(ensemble_folder: Path, index: ShardIndex, tmp_path: Path, lora: int | None) -> None:
    options: dict[str, Any] = {"lora": lora, "ema": 0.9, "train": "unet,text-encoders,conditioner", "t5_dropout": 0.2, "lr": 1e-3}
    run(ensemble_folder, index, tmp_path / "whole", **options)
    with pytest.raises(InterruptedRunError):
        run(ensemble_folder, index, tmp_path / "cut", should_stop=lambda: True, **options)
    run(ensemble_folder, index, tmp_path / "cut", **options)
    assert changed(tmp_path / "whole" / "model", tmp_path / "cut" / "model") == set()
    assert changed(ensemble_folder, tmp_path / "whole" / "model") == {"unet", "unet_low", "text_encoder", "text_encoder_2", "conditioner"}
    model = load_model(open_folder(tmp_path / "whole" / "model"))
    [picture] = [event for event in text_to_image(model, resolve(model.folder, "a red star", [1], steps=2)) if isinstance(event, Picture)]
    assert picture.pixels.float().std() > 1


def test_an_ensembles_lora_is_a_file_for_each_network(ensemble_folder: Path, index: ShardIndex, tmp_path: Path) -> None:
    run(ensemble_folder, index, tmp_path, lora=2, train="unet,text-encoders,conditioner")
    names = {"low": "unet", "high": "unet"} | {name: name for name in ("text_encoder", "text_encoder_2", "conditioner")}
    assert {path.name for path in tmp_path.glob("*.safetensors")} == {f"{name}-{LORA_FILE}" for name in names}
    for name, prefix in names.items():
        with safe_open(tmp_path / f"{name}-{LORA_FILE}", framework="pt") as file:
            settings = json.loads(file.metadata()["lora_adapter_metadata"])
            assert all(key.startswith(f"{prefix}.") for key in [*file.keys(), *settings])
            ups = [file.get_tensor(key) for key in file.keys() if key.endswith("lora_B.weight")]  # noqa: SIM118
        assert settings[f"{prefix}.r"] == 2
        assert len(ups) > 0
        assert any(bool(up.any()) for up in ups)
    specs = [f"{tmp_path / name}-{LORA_FILE}{f'@{name}' if prefix == 'unet' else ''}" for name, prefix in names.items()]
    assert_baked(ensemble_folder, specs, tmp_path / "model")


def test_the_conditioner_alone(ensemble_folder: Path, index: ShardIndex, tmp_path: Path) -> None:
    lines = run(ensemble_folder, index, tmp_path, expert="high", train="conditioner")
    assert changed(ensemble_folder, tmp_path / "model") == {"conditioner"}
    assert any("change what all experts" in line for line in lines)


def test_a_dropped_caption_is_what_the_trained_encoder_says_of_none(sd1_folder: Path, index: ShardIndex, tmp_path: Path) -> None:
    """With nearly every caption dropped only the empty prompt can teach the encoder."""
    run(sd1_folder, index, tmp_path, train="text-encoders", caption_dropout=0.9999)
    assert changed(sd1_folder, tmp_path / "model") == {"text_encoder"}


def test_an_expert_of_its_own_reading_is_told_what_the_model_it_came_from_is_told(
    sdxl_folder: Path, refiner_folder: Path, index: ShardIndex, tmp_path: Path
) -> None:
    """The refiner in an ensemble: conditioning and latents are those of its own folder; trained, it changes and the base does not."""
    base = open_folder(sdxl_folder)
    compose([base, open_folder(refiner_folder)], [sigma_of(base.noise, 200)], tmp_path / "both")
    both = open_folder(tmp_path / "both")
    reading, text = read_as(both, "t0000-0200")
    assert text is not None
    kept = torch.tensor([True, False, True])
    drawn = Draw(torch.zeros(3, dtype=torch.int64), torch.zeros(3), kept, kept)
    batches = [
        source.batch([source.read(number, (32, 32), None) for number in range(3)], None)
        for source in (open_source(reading, index, None, CPU, text), open_source(open_folder(refiner_folder), index, None, CPU))
    ]
    ours, alone = (batch.said(drawn) for batch in batches)
    assert torch.equal(batches[0].latents, batches[1].latents)
    for one, other in ((ours.tokens, alone.tokens), (ours.pooled, alone.pooled), (ours.size_ids, alone.size_ids)):
        assert one is not None
        assert other is not None
        assert torch.equal(one, other)
    assert not torch.equal(ours.tokens[0], ours.tokens[1])
    run(tmp_path / "both", index, tmp_path / "low", expert="t0000-0200", lora=2, format="kohya")
    assert changed(tmp_path / "both", tmp_path / "low" / "model") == {"unet_t0000-0200"}
    run(tmp_path / "both", index, tmp_path / "high", expert="t0200-1000")
    assert changed(tmp_path / "both", tmp_path / "high" / "model") == {"unet"}
    with pytest.raises(UsageError, match="train one at a time"):
        run(tmp_path / "both", index, tmp_path / "all")
    with pytest.raises(UsageError, match="the folder that it came from"):
        run(tmp_path / "both", index, tmp_path / "text", expert="t0000-0200", train="text-encoders")


@pytest.mark.parametrize("value", ["", "vae", "unet,unet", "unet,,conditioner"])
def test_parts_that_are_none_are_refused(value: str) -> None:
    with pytest.raises(UsageError, match="--train"):
        make_config({"shards": "a.tar", "steps": 1, "train": value})


def test_parts_that_do_not_fit_are_refused(sd1_folder: Path, index: ShardIndex, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not join CLIP and T5"):
        run(sd1_folder, index, tmp_path, train="conditioner")
    with pytest.raises(UsageError, match="no names for the conditioner"):
        make_config({"shards": "a.tar", "steps": 1, "train": "conditioner", "lora": 2, "format": "kohya"})

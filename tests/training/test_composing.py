"""Several models as one ensemble: SDXL's base and refiner draw what diffusers draws with two pipelines; what models share is stored once."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tu_diffuse.errors import ModelError, UsageError
from tu_diffuse.pipeline.model.folder import ModelFolder, open_folder
from tu_diffuse.pipeline.model.loading import load_model
from tu_diffuse.pipeline.resolve import resolve
from tu_diffuse.pipeline.text_to_image import Picture, Progress, text_to_image
from tu_diffuse.text_encoders.prompts import Reading, Text
from tu_diffuse.training.composing import compose
from tu_diffuse.training.forking import drop, fork, put_weights
from tu_diffuse.training.intervals import expert_of, sigma_of
from tu_diffuse.training.merging import merge
from tu_diffuse.unet.experts import ExpertText

WHOLE = "diffusion_pytorch_model.safetensors"
STEPS, GUIDANCE, SEED, PROMPT = 10, 4.0, 11, "a red apple"


def opened(*folders: Path) -> list[ModelFolder]:
    return [open_folder(folder) for folder in folders]


def at(folder: Path, *timesteps: float) -> list[float]:
    return [sigma_of(open_folder(folder).noise, timestep) for timestep in timesteps]


def run(folder: Path, **asked: Any) -> tuple[Tensor, list[str]]:
    """The last prediction, which Euler's last step ends on, and the expert of each step."""
    model = load_model(open_folder(folder), dtype="float32", device="cpu")
    settings: dict[str, Any] = {"steps": STEPS, "guidance": GUIDANCE, "sampler": "euler"} | asked
    steps = [event for event in text_to_image(model, resolve(model.folder, PROMPT, [SEED], **settings)) if isinstance(event, Progress)]
    return steps[-1].x0, [step.expert for step in steps]


def pixels(folder: Path) -> Tensor:
    model = load_model(open_folder(folder), dtype="float32", device="cpu")
    request = resolve(model.folder, PROMPT, [SEED], steps=STEPS, guidance=GUIDANCE, sampler="euler")
    return next(event.pixels for event in text_to_image(model, request) if isinstance(event, Picture))


def theirs(base: Path, refiner: Path, share: float, **asked: Any) -> Tensor:
    """diffusers' two pipelines, the base until `share` of the steps, the refiner from there, as its documentation has it."""
    from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline

    first, second = StableDiffusionXLPipeline.from_pretrained(base), StableDiffusionXLImg2ImgPipeline.from_pretrained(refiner)
    common: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "output_type": "latent"} | asked
    for pipeline in (first, second):
        pipeline.set_progress_bar_config(disable=True)
    latents = first(PROMPT, denoising_end=share, generator=torch.Generator().manual_seed(SEED), **common).images
    return second(PROMPT, image=latents, denoising_start=share, **common).images


@pytest.mark.parametrize(("share", "border", "high"), [(0.8, 200, 8), (0.5, 500, 5)])
@pytest.mark.parametrize("negative", ["", "grey"])
def test_base_and_refiner_draw_what_diffusers_draws(
    sdxl_folder: Path, refiner_folder: Path, tmp_path: Path, share: float, border: int, high: int, negative: str
):
    composed = compose(opened(sdxl_folder, refiner_folder), at(sdxl_folder, border), tmp_path / "sdxl")
    names = [f"t0000-{border:04d}", f"t{border:04d}-1000"]
    assert [entry.name for entry in composed.experts] == names
    assert composed.notes == ()
    latents, used = run(tmp_path / "sdxl", negative=negative)
    assert used == [names[1]] * high + [names[0]] * (STEPS - high)
    wanted = theirs(sdxl_folder, refiner_folder, share, **({"negative_prompt": negative} if negative else {}))
    assert wanted.std() > 0.05
    difference = float((latents - wanted).abs().max())
    print(f"base and refiner at {border}, negative {negative!r}: {difference:.1e} of {float(wanted.abs().max()):.1f}")
    assert difference <= 1e-4
    assert (run(sdxl_folder, negative=negative)[0] - wanted).abs().max() > 1e-2


def test_what_base_and_refiner_share_is_stored_once(sdxl_folder: Path, refiner_folder: Path, tmp_path: Path):
    compose(opened(sdxl_folder, refiner_folder), at(sdxl_folder, 200), tmp_path / "sdxl")
    model = open_folder(tmp_path / "sdxl")
    low, high = model.experts
    assert (high.subfolder, high.text) == ("unet", None)
    assert low.text == ExpertText("sdxl-refiner", {"text_encoder_2": "text_encoder_2", "tokenizer_2": "tokenizer_2"}, False)
    assert {path.name for path in (tmp_path / "sdxl").iterdir()} == {path.name for path in sdxl_folder.iterdir()} | {low.subfolder, "experts.json"}
    assert json.loads((tmp_path / "sdxl" / "experts.json").read_text())["version"] == 2
    loaded = load_model(model, dtype="float32", device="cpu")
    assert len(set(loaded.readers.values())) == 2
    assert loaded.readers[low.name](Text("a", "", 32, 32, Reading()))[0].conditioning.tokens.shape == (1, 16, 24)


def test_text_encoders_that_differ_come_along_and_go_again(sdxl_folder: Path, refiner_folder: Path, tmp_path: Path):
    other = shutil.copytree(refiner_folder, tmp_path / "other")
    path = other / "text_encoder_2" / "model.safetensors"
    save_file({name: tensor * 1.25 for name, tensor in load_file(path).items()}, path)
    compose(opened(sdxl_folder, other), at(sdxl_folder, 500), tmp_path / "sdxl")
    model = open_folder(tmp_path / "sdxl")
    text = model.experts[0].text
    assert text is not None
    assert text.parts == {"text_encoder_2": "text_encoder_2_t0000-0500", "tokenizer_2": "tokenizer_2"}
    latents, _ = run(tmp_path / "sdxl")
    assert (latents - theirs(sdxl_folder, other, 0.5)).abs().max() <= 1e-4
    assert (latents - theirs(sdxl_folder, refiner_folder, 0.5)).abs().max() > 1e-3
    # Composed once more they stay, forked they stay, and with the refiner they go.
    fork(model, at(sdxl_folder, 250), tmp_path / "forked", expert="t0000-0500")
    assert torch.equal(run(tmp_path / "forked")[0], latents)
    compose(opened(tmp_path / "forked", sdxl_folder), at(sdxl_folder, 100), tmp_path / "again")
    assert [entry.text is None for entry in open_folder(tmp_path / "again").experts] == [True, False, False, True]
    drop(model, "t0000-0500", tmp_path / "base", heir="higher")
    assert {p.relative_to(tmp_path / "base") for p in (tmp_path / "base").rglob("*")} == {p.relative_to(sdxl_folder) for p in sdxl_folder.rglob("*")}
    assert "text_encoder_2_t0000-0500" not in json.loads((tmp_path / "base" / "model_index.json").read_text())
    drop(model, "t0500-1000", tmp_path / "refiner", heir="lower")
    [left] = open_folder(tmp_path / "refiner").experts
    assert left.text == text
    assert (run(tmp_path / "refiner")[0] - latents).abs().max() > 1e-3


def test_experts_that_read_differently_do_not_merge(sdxl_folder: Path, refiner_folder: Path, tmp_path: Path):
    compose(opened(sdxl_folder, refiner_folder), at(sdxl_folder, 200), tmp_path / "sdxl")
    with pytest.raises(ModelError, match="differ in architecture or in how they read prompts"):
        merge(open_folder(tmp_path / "sdxl"), tmp_path / "out")


def test_children_trained_apart_come_together_on_one_base(sd1_folder: Path, tmp_path: Path):
    """Two people train the two children of one fork; composed, each contributes its own, and the base is there once."""
    fork(open_folder(sd1_folder), at(sd1_folder, 500), tmp_path / "forked")
    base = load_file(sd1_folder / "unet" / WHOLE)
    changes = {
        "t0500-1000": base | {"conv_out.bias": base["conv_out.bias"] + 0.25},
        "t0000-0500": base | {"conv_in.bias": base["conv_in.bias"] - 0.25},
    }
    for name, state in changes.items():
        put_weights(open_folder(tmp_path / "forked"), name, tmp_path / name, tensors=state)
    put_weights(open_folder(tmp_path / "t0500-1000"), "t0000-0500", tmp_path / "both", tensors=changes["t0000-0500"])
    compose(opened(tmp_path / "t0500-1000", tmp_path / "t0000-0500"), at(sd1_folder, 500), tmp_path / "composed")
    assert [path.parent.name for path in sorted((tmp_path / "composed").glob("*/diffusion_pytorch_model.safetensors"))] == ["unet", "vae"]
    assert torch.equal(pixels(tmp_path / "composed"), pixels(tmp_path / "both"))
    assert not torch.equal(pixels(tmp_path / "composed"), pixels(sd1_folder))


def test_ensembles_keep_their_borders_inside(ensemble_folder: Path, tmp_path: Path):
    fork(open_folder(ensemble_folder), at(ensemble_folder, 800), tmp_path / "three", expert="high")
    models = opened(ensemble_folder, tmp_path / "three", ensemble_folder)
    border = expert_of(models[1], "t0800-1000").sigma_min
    composed = compose(models, at(ensemble_folder, 100, 900), tmp_path / "out")
    middle = composed.experts[1].name[6:]
    assert [entry.name for entry in composed.experts] == ["t0000-0100", f"t0100-{middle}", f"t{middle}-0800", "t0800-0900", "t0900-1000"]
    assert composed.experts[3].sigma_min == border
    assert torch.equal(pixels(tmp_path / "out"), pixels(ensemble_folder))
    assert len(list((tmp_path / "out").glob("unet*/diffusion_pytorch_model.safetensors"))) == 2  # `low` and `high`, once each


def test_three_models_each_on_its_own_levels(sd1_folder: Path, tmp_path: Path):
    folders = [sd1_folder]
    for number in (1, 2):
        folder = shutil.copytree(sd1_folder, tmp_path / f"model{number}")
        state = load_file(folder / "unet" / WHOLE)
        save_file(state | {"conv_out.bias": state["conv_out.bias"] + 0.1 * number}, folder / "unet" / WHOLE)
        folders.append(folder)
    composed = compose(opened(*folders), at(sd1_folder, 300, 700), tmp_path / "out")
    for entry, folder in zip(reversed(composed.experts), folders, strict=True):
        assert (tmp_path / "out" / entry.subfolder / WHOLE).read_bytes() == (folder / "unet" / WHOLE).read_bytes()
    assert run(tmp_path / "out")[1] == ["t0700-1000"] * 3 + ["t0300-0700"] * 4 + ["t0000-0300"] * 3


def _edit(name: str, **changes: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | changes))

    return edit


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_edit("scheduler/scheduler_config.json", prediction_type="v_prediction"), "predict epsilon and v_prediction"),
        (_edit("scheduler/scheduler_config.json", beta_end=0.02), "different noise schedules"),
        (_edit("scheduler/scheduler_config.json", num_train_timesteps=500), "different noise schedules"),
        (_edit("vae/config.json", scaling_factor=0.5), "different latents"),
        (_edit("unet/config.json", in_channels=9), "different latents"),
    ],
)
def test_models_that_cannot_share_latents_are_refused(sd1_folder: Path, tmp_path: Path, change: Callable[[Path], None], said: str):
    other = shutil.copytree(sd1_folder, tmp_path / "other")
    change(other)
    with pytest.raises(ModelError, match=said):
        compose(opened(sd1_folder, other), [1.0], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_vaes_of_other_weights_are_told_of(sd1_folder: Path, tmp_path: Path):
    other = shutil.copytree(sd1_folder, tmp_path / "other")
    path = other / "vae" / WHOLE
    save_file({name: tensor + 0.1 for name, tensor in load_file(path).items()}, path)
    [note] = compose(opened(sd1_folder, other), [1.0], tmp_path / "out").notes
    assert "'tiny-sd1' was taken" in note
    assert (tmp_path / "out" / "vae" / WHOLE).read_bytes() == (sd1_folder / "vae" / WHOLE).read_bytes()


@pytest.mark.parametrize("borders", [[], [1.0, 2.0], [1.0, 1.0, 2.0], [100.0], [0.0001], [float("inf")], [-1.0], [float("nan")]])
def test_borders_that_do_not_fit(sd1_folder: Path, tmp_path: Path, borders: list[float]):
    with pytest.raises(UsageError):
        compose(opened(sd1_folder, sd1_folder), borders, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


TEXT: dict[str, Any] = {"family": "sdxl-refiner", "parts": {"text_encoder_2": "text_encoder_2", "tokenizer_2": "tokenizer_2"}, "zero_negative": False}


@pytest.mark.parametrize(
    "text",
    [
        "sdxl",
        TEXT | {"family": "magic"},
        TEXT | {"family": "clip-t5"},
        TEXT | {"family": "sd", "parts": {"text_encoder": "text_encoder_2", "tokenizer": "tokenizer_2", "code": "unet"}},
        TEXT | {"parts": {"text_encoder_2": "text_encoder_2"}},
        TEXT | {"parts": {"text_encoder_2": "../other", "tokenizer_2": "tokenizer_2"}},
        TEXT | {"parts": {"text_encoder_2": "absent", "tokenizer_2": "tokenizer_2"}},
        TEXT | {"parts": {"text_encoder_2": "vae", "tokenizer_2": "tokenizer_2"}},
        TEXT | {"parts": ["text_encoder_2"]},
        TEXT | {"zero_negative": "no"},
        TEXT | {"auto_map": "x"},
    ],
)
def test_hostile_readings_are_refused(sdxl_folder: Path, refiner_folder: Path, tmp_path: Path, text: object):
    compose(opened(sdxl_folder, refiner_folder), at(sdxl_folder, 200), tmp_path / "sdxl")
    path = tmp_path / "sdxl" / "experts.json"
    content = json.loads(path.read_text())
    content["experts"][0]["text"] = TEXT
    path.write_text(json.dumps(content))
    assert open_folder(tmp_path / "sdxl").experts[0].text is not None
    content["experts"][0]["text"] = text
    path.write_text(json.dumps(content))
    with pytest.raises(ModelError) as raised:
        open_folder(tmp_path / "sdxl")
    assert "\n" not in str(raised.value)


def test_guidance_momentum_stays_within_a_reading(sdxl_folder: Path, refiner_folder: Path, tmp_path: Path):
    """APG sums past updates; those of the base and of the refiner are kept apart, and equal readers share theirs."""
    compose(opened(sdxl_folder, refiner_folder), at(sdxl_folder, 200), tmp_path / "sdxl")
    fork(open_folder(sdxl_folder), at(sdxl_folder, 500), tmp_path / "forked")
    assert torch.equal(run(tmp_path / "forked", apg=True)[0], run(sdxl_folder, apg=True)[0])
    model = load_model(replace(open_folder(tmp_path / "sdxl")), dtype="float32", device="cpu")
    assert len(set(model.readers.values())) == 2
    assert not torch.equal(run(tmp_path / "sdxl", apg=True)[0], run(tmp_path / "sdxl")[0])

"""Fine-tuning of tiny models of every family: the loss against diffusers' classes, exact resume, LoRA files in diffusers, experts, validation."""

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from tu_diffuse.errors import UsageError
from tu_diffuse.pipeline.model.folder import ModelFolder, open_folder
from tu_diffuse.pipeline.model.loading import load_model
from tu_diffuse.pipeline.resolve import resolve
from tu_diffuse.pipeline.text_to_image import Picture, text_to_image
from tu_diffuse.shards.index import ShardIndex, index_shards
from tu_diffuse.training.batches import fit
from tu_diffuse.training.checkpoints import load_newest
from tu_diffuse.training.config import FinetuneConfig, make_config
from tu_diffuse.training.encoded import open_source
from tu_diffuse.training.finetune import Plan, finetune, make_plan
from tu_diffuse.training.loop import InterruptedRunError, Logged
from tu_diffuse.training.memory import recompute_activations
from tu_diffuse.training.objective import Objective, denoising_loss, draw
from tu_diffuse.training.result import LORA_FILE
from tu_diffuse.training.subject import load_subject, predictor
from tu_diffuse.training.train_config import TrainConfig
from tu_diffuse.training.turns import expert_of_step, owned_timesteps
from world import STAGES
from write_shards import write_shard

CPU = torch.device("cpu")
BASE = FinetuneConfig(shards=("unused",), steps=6, batch_size=4, lr=1e-3, resolution=32, workers=0, save_every=2)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    folder = tmp_path_factory.mktemp("shards")
    return index_shards([str(write_shard(folder, number, 12, STAGES["shapes"], 5, "png")) for number in range(2)])


def plan_for(folder: Path | ModelFolder, index: ShardIndex, **changes: Any) -> Plan:
    model = open_folder(folder) if isinstance(folder, Path) else folder
    return make_plan(replace(BASE, **changes), model, index, range(len(index.samples)))


def run(plan: Plan, out: Path, **options: Any) -> list[str]:
    lines: list[str] = []
    finetune(plan, out, lambda event: lines.append(str(event)), **options)
    return lines


def unet_of(out: Path, subfolder: str = "unet") -> dict[str, Tensor]:
    return load_file(out / "model" / subfolder / "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize("fixture", ["sd1_folder", "sd2_folder", "sdxl_folder"])
def test_the_loss_is_that_of_diffusers_own_classes(request: pytest.FixtureRequest, index: ShardIndex, fixture: str) -> None:
    """The usual training step, written with diffusers' pipeline parts: encode, add noise, predict, compare with the target."""
    import diffusers

    path = request.getfixturevalue(fixture)
    plan = plan_for(path, index)
    subject = load_subject(plan.folder, None, CPU)
    noise = plan.folder.noise
    objective = Objective(sigmas=noise.sigmas, t_min=0, t_max=1000, prediction_type=noise.prediction_type, drop_all=0, drop_clip=0)
    fitted = [fit(index.picture(i), (32, 32)) for i in range(4)]
    captions = [index.samples[i].caption for i in range(4)]
    source = open_source(plan.folder, plan.index, None, CPU)
    batch = source.batch([source.read(i, (32, 32), None) for i in range(4)], [torch.Generator().manual_seed(i) for i in range(4)])
    latents = batch.latents
    drawn = draw(objective, tuple(latents.shape), torch.Generator().manual_seed(1))
    ours = denoising_loss(predictor(subject, "unet", batch.said), objective, latents, drawn)["loss"]

    pipeline = diffusers.DiffusionPipeline.from_pretrained(path, torch_dtype=torch.float32)
    pixels = torch.stack([one.pixels for one in fitted])
    posterior = pipeline.vae.encode(pixels).latent_dist
    noises = torch.cat([torch.randn((1, *posterior.mean.shape[1:]), generator=torch.Generator().manual_seed(i)) for i in range(4)])
    theirs = (posterior.mean + posterior.std * noises) * pipeline.vae.config.scaling_factor
    torch.testing.assert_close(latents, theirs, atol=1e-5, rtol=0)
    scheduler = diffusers.DDPMScheduler.from_config(pipeline.scheduler.config)
    noisy = scheduler.add_noise(theirs, drawn.noise, drawn.t)
    if fixture == "sdxl_folder":
        tokens, _, pooled, _ = pipeline.encode_prompt(captions, do_classifier_free_guidance=False)
        told = torch.tensor([[*one.original, *one.corner, 32, 32] for one in fitted], dtype=torch.float32)
        extra = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": told}}
    else:
        tokens, extra = pipeline.encode_prompt(captions, CPU, 1, do_classifier_free_guidance=False)[0], {}
    output = pipeline.unet(noisy, drawn.t, tokens, **extra).sample
    v = scheduler.config.prediction_type == "v_prediction"
    target = scheduler.get_velocity(theirs, drawn.noise, drawn.t) if v else drawn.noise
    wanted = torch.nn.functional.mse_loss(output, target)
    assert ours.item() == pytest.approx(wanted.item(), rel=1e-4)
    assert ours.item() > 1e-3


def test_a_full_run_lowers_the_loss_and_its_result_draws(sd1_folder: Path, index: ShardIndex, tmp_path: Path) -> None:
    plan = plan_for(sd1_folder, index, steps=60, lr=3e-3, save_every=60, validation_share=0.25, validate_every=30, caption_dropout=0.0)
    run(plan, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "validation" / "validation.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [30, 60]
    before = plan_for(sd1_folder, index, steps=1, lr=1e-12, validation_share=0.25)
    run(before, tmp_path / "before")
    first = json.loads((tmp_path / "before" / "validation" / "validation.jsonl").read_text())
    assert lines[1]["t300"] < 0.9 * first["t300"]
    model = load_model(open_folder(tmp_path / "run" / "model"))
    [picture] = [event for event in text_to_image(model, resolve(model.folder, "a red star", [1], steps=2)) if isinstance(event, Picture)]
    assert picture.pixels.float().std() > 1


@pytest.mark.parametrize("lora", [None, 4])
@pytest.mark.parametrize("stop_after", [1, 3, 5])
def test_stopped_and_resumed_equals_uninterrupted(sd2_folder: Path, index: ShardIndex, tmp_path: Path, lora: int | None, stop_after: int) -> None:
    plan = plan_for(sd2_folder, index, lora=lora, ema=0.9, accumulate=2)
    run(plan, tmp_path / "whole")
    steps: list[int] = []

    def count() -> bool:
        steps.append(1)
        return len(steps) == stop_after

    with pytest.raises(InterruptedRunError):
        run(plan, tmp_path / "cut", should_stop=count)
    run(plan, tmp_path / "cut")
    whole, cut = unet_of(tmp_path / "whole"), unet_of(tmp_path / "cut")
    assert all(torch.equal(tensor, cut[name]) for name, tensor in whole.items())
    for name in ("model", "average", "optimizer"):
        one, other = (load_file(tmp_path / run / "checkpoints" / "checkpoint-00000006" / f"{name}.safetensors") for run in ("whole", "cut"))
        assert one.keys() == other.keys()
        assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())
    original = load_file(sd2_folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert any(not torch.equal(tensor, original[name]) for name, tensor in whole.items())


@pytest.mark.parametrize("lora", [None, 4])
def test_recomputed_activations_change_nothing(sdxl_folder: Path, index: ShardIndex, tmp_path: Path, lora: int | None) -> None:
    for name, recompute in (("kept", False), ("again", True)):
        run(plan_for(sdxl_folder, index, lora=lora, steps=2, gradient_checkpointing=recompute), tmp_path / name)
    kept, again = unet_of(tmp_path / "kept"), unet_of(tmp_path / "again")
    assert all(torch.equal(tensor, again[key]) for key, tensor in kept.items())


def test_recomputed_activations_are_not_kept(sd1_folder: Path) -> None:
    """What autograd saves for the way back, counted by its own hooks."""

    def saved(recompute: bool) -> int:
        unet = load_subject(open_folder(sd1_folder), None, CPU).unets["unet"]
        if recompute:
            recompute_activations(unet)
        tokens = torch.randn(2, 8, unet.config.cross_attention_dim)
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            unet(torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), unet.text_keys_values(tokens)).sum()
        return sum(sizes)

    assert saved(True) < 0.5 * saved(False)


def test_float16_trains_with_a_scaled_loss_and_resumes_exactly(sd1_folder: Path, index: ShardIndex, tmp_path: Path) -> None:
    plan = plan_for(sd1_folder, index, precision="float16", lora=4)
    run(plan, tmp_path / "whole")
    with pytest.raises(InterruptedRunError):
        run(plan, tmp_path / "cut", should_stop=lambda: len(list((tmp_path / "cut" / "checkpoints").glob("checkpoint-*"))) == 2)
    run(plan, tmp_path / "cut")
    whole, cut = unet_of(tmp_path / "whole"), unet_of(tmp_path / "cut")
    assert all(torch.equal(tensor, cut[name]) for name, tensor in whole.items())
    plain = plan_for(sd1_folder, index, lora=4)
    run(plain, tmp_path / "plain")
    losses = [json.loads((tmp_path / name / "checkpoints" / "losses.jsonl").read_text()) for name in ("whole", "plain")]
    assert losses[0]["loss"] == pytest.approx(losses[1]["loss"], rel=1e-2)
    assert losses[0]["loss"] != losses[1]["loss"]


@pytest.mark.parametrize(
    ("options", "steps", "rates"),
    [
        ({}, 10, {0: 1.0, 9: 1.0}),
        ({"lr_schedule": "constant", "warmup": 4}, 10, {0: 0.25, 3: 1.0, 9: 1.0}),
        ({"cooldown": 4}, 10, {6: 1.0, 8: 0.5}),
        ({"lr_schedule": "linear", "warmup": 2}, 10, {1: 1.0, 2: 1.0, 6: 0.5, 9: 0.125}),
        ({"lr_schedule": "linear", "cooldown": 4}, 10, {6: 1.0, 9: 0.25}),
    ],
)
def test_learning_rates_of_the_options(options: dict[str, Any], steps: int, rates: dict[int, float]) -> None:
    config = make_config({"shards": ["a"], "steps": steps, "lr": 1.0, **options})
    cooldown, fall = config.falling
    training = TrainConfig(steps=steps, lr=1.0, warmup=config.warmup, cooldown=cooldown, fall=fall)
    assert {step: training.learning_rate(step) for step in rates} == pytest.approx(rates)


def test_resume_goes_on_and_refuses_to_begin(sd1_folder: Path, index: ShardIndex, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no checkpoint to resume"):
        run(plan_for(sd1_folder, index, resume=True), tmp_path / "run")
    assert not list(tmp_path.iterdir())
    with pytest.raises(InterruptedRunError):
        run(plan_for(sd1_folder, index), tmp_path / "run", should_stop=lambda: True)
    with pytest.raises(UsageError, match="the checkpoint of step 1"):
        run(plan_for(sd1_folder, index, resume=True, lr=1e-5), tmp_path / "run")
    assert "goes on from the checkpoint of step 1" in run(plan_for(sd1_folder, index, resume=True), tmp_path / "run")


def test_zero_terminal_snr_trains_and_records_the_schedule_that_diffusers_makes(sd2_folder: Path, index: ShardIndex, tmp_path: Path) -> None:
    import diffusers

    plan = plan_for(sd2_folder, index, zero_terminal_snr=True)
    theirs = diffusers.DDIMScheduler.from_pretrained(sd2_folder / "scheduler", rescale_betas_zero_snr=True)
    torch.testing.assert_close(plan.folder.noise.alphas_cumprod.float(), theirs.alphas_cumprod, atol=1e-6, rtol=1e-4)
    assert plan.folder.noise.sigma_max > 100 * open_folder(sd2_folder).noise.sigma_max
    run(plan, tmp_path / "run")
    run(plan_for(sd2_folder, index), tmp_path / "plain")
    result = open_folder(tmp_path / "run" / "model")
    assert torch.equal(result.noise.sigmas, plan.folder.noise.sigmas)
    assert result.noise.spacing == "trailing"
    written = diffusers.DDIMScheduler.from_pretrained(tmp_path / "run" / "model" / "scheduler")
    assert written.config.rescale_betas_zero_snr
    assert written.alphas_cumprod[-1] < 1e-6
    one, other = unet_of(tmp_path / "run"), unet_of(tmp_path / "plain")
    assert any(not torch.equal(tensor, other[name]) for name, tensor in one.items())
    model = load_model(result)
    [picture] = [event for event in text_to_image(model, resolve(result, "a star", [1], steps=2)) if isinstance(event, Picture)]
    assert picture.pixels.float().std() > 1
    with pytest.raises(UsageError, match="already"):
        plan_for(tmp_path / "run" / "model", index, zero_terminal_snr=True)


@pytest.mark.parametrize("threads", [1, 3])
def test_readers_do_not_change_the_run(sd1_folder: Path, index: ShardIndex, tmp_path: Path, threads: int) -> None:
    run(plan_for(sd1_folder, index, workers=0), tmp_path / "none")
    run(plan_for(sd1_folder, index, workers=threads), tmp_path / "some")
    none, some = unet_of(tmp_path / "none"), unet_of(tmp_path / "some")
    assert all(torch.equal(tensor, some[name]) for name, tensor in none.items())


@pytest.mark.parametrize("change", [{"lr": 2e-3}, {"lora": 2}, {"caption_dropout": 0.3}, {"resolution": 16}, {"min_snr": 5.0}])
def test_a_folder_of_another_run_is_refused(sd1_folder: Path, index: ShardIndex, tmp_path: Path, change: dict[str, Any]) -> None:
    def stop() -> bool:
        return True

    with pytest.raises(InterruptedRunError):
        run(plan_for(sd1_folder, index), tmp_path / "run", should_stop=stop)
    with pytest.raises(UsageError, match="the checkpoint of step 1"):
        run(plan_for(sd1_folder, index, **change), tmp_path / "run")


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
@pytest.mark.parametrize("alpha", [None, 8.0])
def test_lora_files_load_in_diffusers_and_equal_the_merged_result(
    sd1_folder: Path, index: ShardIndex, tmp_path: Path, format: str, alpha: float | None
) -> None:
    import diffusers

    plan = plan_for(sd1_folder, index, lora=4, lora_alpha=alpha, lr=2e-2, format=format)
    run(plan, tmp_path)
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(sd1_folder, torch_dtype=torch.float32, safety_checker=None)
    x, tokens = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)), torch.randn(1, 16, pipeline.unet.config.cross_attention_dim)
    t = torch.tensor([300])
    plain = pipeline.unet(x, t, tokens).sample
    pipeline.load_lora_weights(tmp_path / LORA_FILE)
    adapted = [name for name, module in pipeline.unet.named_modules() if hasattr(module, "lora_A")]
    keys = load_file(tmp_path / LORA_FILE)
    assert len(adapted) == sum(key.endswith(("lora_A.weight", "lora_down.weight")) for key in keys) > 0
    changed = pipeline.unet(x, t, tokens).sample
    merged = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "model" / "unet", torch_dtype=torch.float32)(x, t, tokens).sample
    assert (changed - plain).abs().max() > 1e-3
    torch.testing.assert_close(changed, merged, atol=1e-5, rtol=0)


def test_untrained_lora_changes_nothing(sd1_folder: Path, index: ShardIndex, tmp_path: Path) -> None:
    run(plan_for(sd1_folder, index, lora=4, steps=1, lr=1e-30), tmp_path)
    original, result = load_file(sd1_folder / "unet" / "diffusion_pytorch_model.safetensors"), unet_of(tmp_path)
    assert original.keys() == result.keys()
    assert all(torch.allclose(tensor, result[name], atol=1e-6) for name, tensor in original.items())


def test_one_expert_is_trained_and_the_other_left_alone(ensemble_folder: Path, index: ShardIndex, tmp_path: Path) -> None:
    run(plan_for(ensemble_folder, index, expert="low"), tmp_path)
    same, other = (load_file(ensemble_folder / name / "diffusion_pytorch_model.safetensors") for name in ("unet", "unet_low"))
    assert all(torch.equal(tensor, unet_of(tmp_path)[name]) for name, tensor in same.items())
    assert any(not torch.equal(tensor, unet_of(tmp_path, "unet_low")[name]) for name, tensor in other.items())
    subject = load_subject(open_folder(ensemble_folder), "low", CPU)
    border = int((open_folder(ensemble_folder).noise.sigmas < 1.5).sum())
    assert subject.owned == {"low": (0, border + 50)}


def test_all_experts_are_trained_each_on_its_own_levels(ensemble_folder: Path, index: ShardIndex, tmp_path: Path) -> None:
    run(plan_for(ensemble_folder, index, clip_dropout=0.1, t5_dropout=0.1), tmp_path)
    for name in ("unet", "unet_low"):
        before = load_file(ensemble_folder / name / "diffusion_pytorch_model.safetensors")
        assert any(not torch.equal(tensor, unet_of(tmp_path, name)[key]) for key, tensor in before.items())
    subject = load_subject(open_folder(ensemble_folder), None, CPU)
    (first, border), (again, end) = subject.owned["low"], subject.owned["high"]
    assert (first, border, end) == (0, again, 1000)


def test_a_step_trains_the_expert_whose_turn_it_is_and_no_other(ensemble_folder: Path, index: ShardIndex, tmp_path: Path):
    owned = owned_timesteps(open_folder(ensemble_folder), None)
    weights: list[dict[str, Tensor]] = []
    for steps in range(1, 5):
        run(plan_for(ensemble_folder, index, steps=steps, save_every=1, warmup=0), tmp_path / str(steps))
        found = load_newest(tmp_path / str(steps) / "checkpoints")
        assert found is not None
        weights.append(found.model)
    for step, (before, after) in enumerate(pairwise(weights), 1):
        changed = {name.split(".")[1] for name in after if not torch.equal(before[name], after[name])}
        assert changed == {expert_of_step(owned, step)}
    assert {expert_of_step(owned, step) for step in range(1, 4)} == {"low", "high"}


def test_an_expert_with_a_dot_in_its_name_is_refused(ensemble_folder: Path) -> None:
    folder = open_folder(ensemble_folder)
    dotted = replace(folder, experts=tuple(replace(entry, name=f"{entry.name}.1") for entry in folder.experts))
    with pytest.raises(UsageError, match=r"'low\.1' has a dot"):
        load_subject(dotted, None, CPU)


def test_validation_pictures_are_drawn_with_the_weights_of_the_moment(sd1_folder: Path, index: ShardIndex, tmp_path: Path) -> None:
    seen: dict[int, Tensor] = {}

    def draw_prompts(folder: Path, step: int) -> None:
        model = load_model(open_folder(folder))
        events = text_to_image(model, resolve(model.folder, "a star", [1], steps=2, width=32, height=32))
        seen[step] = next(event.pixels for event in events if isinstance(event, Picture))

    plan = plan_for(sd1_folder, index, lora=4, lr=5e-2, validate_every=3, prompts=("a star",))
    run(plan, tmp_path, draw_prompts=draw_prompts)
    assert list(seen) == [3, 6]
    assert not torch.equal(seen[3], seen[6])
    final = load_model(open_folder(tmp_path / "model"))
    request = resolve(final.folder, "a star", [1], steps=2, width=32, height=32)
    [picture] = [event for event in text_to_image(final, request) if isinstance(event, Picture)]
    assert torch.equal(picture.pixels, seen[6])
    assert not [path for path in (tmp_path / "validation").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"resolution": 33}, "multiple"),
        ({"t5_dropout": 0.1}, "no T5"),
        ({"batch_size": 25}, "fewer than --batch-size"),
        ({"expert": "middle"}, "middle"),
    ],
)
def test_options_that_do_not_fit_are_refused(sd1_folder: Path, index: ShardIndex, tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        run(plan_for(sd1_folder, index, **changes), tmp_path)


def test_events_tell_steps_and_speed(sd1_folder: Path, index: ShardIndex, tmp_path: Path) -> None:
    events: list[Logged | str] = []
    report: Callable[[Logged | str], None] = events.append
    finetune(plan_for(sd1_folder, index), tmp_path, report)
    [logged] = [event for event in events if isinstance(event, Logged)]
    assert (logged.step, logged.steps) == (6, 6)
    assert logged.seconds_a_step > 0
    assert {"loss", "loss/expert/unet", "grad_norm", "lr"} <= logged.scalars.keys()
    bins = [value for name, value in logged.scalars.items() if name.startswith("loss/t")]
    assert 4 <= len(bins) <= 10
    assert min(bins) < logged.scalars["loss"] < max(bins)

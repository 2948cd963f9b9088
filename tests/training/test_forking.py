"""The life of an expert on whole model folders: a fork draws what its parent drew, a merge gives it back, nothing is overwritten or half written."""

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tu_diffuse.errors import ModelError, OutputError, UsageError
from tu_diffuse.pipeline.describe import describe_experts
from tu_diffuse.pipeline.folder import ModelFolder, open_folder
from tu_diffuse.pipeline.loading import load_model
from tu_diffuse.pipeline.request import resolve
from tu_diffuse.pipeline.text_to_image import Picture, text_to_image
from tu_diffuse.training.expert_files import Kept, state_of
from tu_diffuse.training.forking import drop, expert_of, fork, interval_name, merge, merged_state, put_weights, sigma_of
from tu_diffuse.unet.deltas import INDEX, LORA, TENSORS, chain
from tu_diffuse.unet.residency import load_expert

INF = math.inf
WHOLE = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def plain(sd1_folder: Path) -> ModelFolder:
    return open_folder(sd1_folder)


@pytest.fixture
def ensemble(ensemble_folder: Path) -> ModelFolder:
    return open_folder(ensemble_folder)


def draw(folder: Path, dtype: str = "float32") -> tuple[Tensor, list[str]]:
    """One picture of 12 steps, and the experts that drew it."""
    model = load_model(open_folder(folder), dtype=dtype, device="cpu")
    request = resolve(model.folder, "a red apple", [5], steps=12, sampler="euler", guidance=3.0)
    picture = next(event for event in text_to_image(model, request) if isinstance(event, Picture))
    return picture.pixels, [expert["name"] for expert in picture.settings["experts"]]


def at(model: ModelFolder, *timesteps: float) -> list[float]:
    return [sigma_of(model.noise, timestep) for timestep in timesteps]


def weights_of(folder: Path, name: str) -> dict[str, Tensor]:
    model = open_folder(folder)
    entry = expert_of(model, name)
    assert entry.sha256 is not None
    return load_expert(folder / entry.subfolder, "epsilon", lambda s: s, sha256=entry.sha256).unet.state_dict()


def trained(folder: Path, name: str, out: Path, change: Callable[[str, Tensor], Tensor]) -> ModelFolder:
    """The folder with an expert's weights changed, as training would."""
    state = {
        tensor: change(tensor, value.clone()) for tensor, value in state_of(Kept(folder / expert_of(open_folder(folder), name).subfolder)).items()
    }
    put_weights(open_folder(folder), name, out, tensors=state)
    return open_folder(out)


def assert_equal(came: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert came.keys() == wanted.keys()
    assert [name for name in wanted if came[name].dtype != wanted[name].dtype or not torch.equal(came[name], wanted[name])] == []


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def size(folder: Path) -> int:
    return sum(len(data) for data in files(folder).values())


@pytest.mark.parametrize("whole", [False, True])
def test_a_fork_draws_what_its_parent_drew(plain: ModelFolder, tmp_path: Path, whole: bool):
    before = files(plain.path)
    children = fork(plain, at(plain, 500, 250), tmp_path / "forked", whole=whole)
    assert [child.name for child in children] == ["t0000-0250", "t0250-0500", "t0500-1000"]
    assert [child.parent for child in children] == ["unet"] * 3
    assert [(child.sigma_min, child.sigma_max) for child in children] == [
        (0.0, float(plain.noise.sigmas[250])),
        (float(plain.noise.sigmas[250]), float(plain.noise.sigmas[500])),
        (float(plain.noise.sigmas[500]), INF),
    ]
    pixels, used = draw(tmp_path / "forked")
    assert used == ["t0500-1000", "t0250-0500", "t0000-0250"]
    wanted, _ = draw(plain.path)
    assert wanted.float().std() > 5
    assert torch.equal(pixels, wanted)
    assert files(plain.path) == before
    grown = size(tmp_path / "forked") - size(plain.path)
    unet = (plain.path / "unet" / WHOLE).stat().st_size
    assert 2 * unet < grown < 2.2 * unet if whole else grown < 2500


def test_children_that_are_whole_are_networks_of_diffusers(plain: ModelFolder, tmp_path: Path):
    from diffusers import UNet2DConditionModel

    fork(plain, at(plain, 500), tmp_path / "forked", whole=True)
    wanted = UNet2DConditionModel.from_pretrained(plain.path / "unet").state_dict()
    for subfolder in ("unet", "unet_t0000-0500"):
        assert_equal(UNet2DConditionModel.from_pretrained(tmp_path / "forked" / subfolder).state_dict(), wanted)


def test_a_forked_folder_is_still_the_parent_to_diffusers(plain: ModelFolder, tmp_path: Path):
    from diffusers import StableDiffusionPipeline

    fork(plain, at(plain, 500), tmp_path / "forked")
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "forked")
    assert_equal(pipeline.unet.state_dict(), load_file(plain.path / "unet" / WHOLE))


def test_nested_forks_and_merges(ensemble: ModelFolder, tmp_path: Path):
    """high -> two, its lower one -> three more; merged again from the inside out, with `low` left alone."""
    wanted, _ = draw(ensemble.path)
    border = interval_name(ensemble.noise, 1.5, INF)[1:5]
    fork(ensemble, at(ensemble, 800), tmp_path / "a", expert="high")
    middle = f"t{border}-0800"
    fork(open_folder(tmp_path / "a"), at(ensemble, 700, 600), tmp_path / "b", expert=middle)
    names = ["low", f"t{border}-0600", "t0600-0700", "t0700-0800", "t0800-1000"]
    model = open_folder(tmp_path / "b")
    assert [entry.name for entry in model.experts] == names
    assert [entry.parent for entry in model.experts] == [None, middle, middle, middle, "high"]
    assert [folder.name for folder in chain(tmp_path / "b" / model.experts[2].subfolder)] == ["unet_t0600-0700", f"unet_{middle}", "unet"]
    pixels, used = draw(tmp_path / "b")
    assert torch.equal(pixels, wanted)
    assert used[::-1] == names

    merged = merge(model, tmp_path / "c", experts=names[1:4])
    assert merged.parent == f"unet_{middle}"
    assert [entry.name for entry in open_folder(tmp_path / "c").experts] == ["low", middle, "t0800-1000"]
    merge(open_folder(tmp_path / "c"), tmp_path / "d", experts=[middle, "t0800-1000"])
    model = open_folder(tmp_path / "d")
    assert [(e.name, e.subfolder, e.sigma_min) for e in model.experts] == [("low", "unet_low", 0.0), (f"t{border}-1000", "unet", 1.5)]
    assert torch.equal(draw(tmp_path / "d")[0], wanted)
    assert files(tmp_path / "d" / "unet") == files(ensemble.path / "unet")
    assert sorted(path.name for path in (tmp_path / "d").iterdir()) == sorted(path.name for path in ensemble.path.iterdir())


def test_fork_then_merge_gives_the_folder_back(plain: ModelFolder, tmp_path: Path):
    fork(plain, at(plain, 300), tmp_path / "forked")
    merged = merge(open_folder(tmp_path / "forked"), tmp_path / "merged")
    assert merged.shares == {"t0000-0300": 0.3, "t0300-1000": 0.7}
    assert files(tmp_path / "merged") == files(plain.path)


@pytest.mark.parametrize("shares", [None, {"t0000-0300": 1.0, "t0300-1000": 0.5}, {"t0000-0300": -1.0, "t0300-1000": 0.0}])
def test_a_merge_adds_weighted_task_vectors(plain: ModelFolder, tmp_path: Path, shares: dict[str, float] | None):
    fork(plain, at(plain, 300), tmp_path / "forked")
    trained(tmp_path / "forked", "t0000-0300", tmp_path / "one", lambda name, t: t + 0.125 if name.startswith("conv_in") else t)
    trained(tmp_path / "one", "t0300-1000", tmp_path / "both", lambda name, t: {"conv_out.weight": t * 3, "conv_in.bias": t - 1}.get(name, t))
    merged = merge(open_folder(tmp_path / "both"), tmp_path / "merged", shares=shares)
    low, high = merged.shares["t0000-0300"], merged.shares["t0300-1000"]
    assert (low, high) == ((0.3, 0.7) if shares is None else tuple(shares.values()))
    assert merged.parent == "unet"
    theta = load_file(plain.path / "unet" / WHOLE)
    came = load_file(tmp_path / "merged" / "unet" / WHOLE)
    wanted = theta | {
        "conv_in.weight": theta["conv_in.weight"] + low * 0.125,
        "conv_in.bias": theta["conv_in.bias"] + low * 0.125 - high,
        "conv_out.weight": theta["conv_out.weight"] * (1 + 2 * high),
    }
    for name, tensor in wanted.items():
        torch.testing.assert_close(came[name], tensor, atol=1e-6, rtol=1e-6)
    changed = {name for name in theta if not torch.equal(came[name], theta[name])}
    assert changed == ({"conv_in.weight", "conv_in.bias", "conv_out.weight"} - ({"conv_out.weight"} if high == 0 else set()))
    assert not (tmp_path / "merged" / "experts.json").exists()


def test_without_a_parent_children_are_averaged(ensemble: ModelFolder, tmp_path: Path):
    merged = merge(ensemble, tmp_path / "merged", shares={"low": 1.0, "high": 3.0})
    assert merged.parent is None
    assert merged.shares == {"low": 0.25, "high": 0.75}
    low, high = (load_file(ensemble.path / name / WHOLE) for name in ("unet_low", "unet"))
    came = load_file(tmp_path / "merged" / "unet" / WHOLE)
    for name in low:
        torch.testing.assert_close(came[name], (0.25 * low[name].double() + 0.75 * high[name].double()).float(), atol=1e-7, rtol=1e-7)
    assert draw(tmp_path / "merged")[1] == ["unet"]


def test_merged_numbers():
    parent = {"a": torch.tensor([1.0, -0.0]), "b": torch.tensor([3.0])}
    children = [parent | {"b": torch.tensor([5.0])}, parent | {"b": torch.tensor([2.0])}]
    merged = merged_state(children, [0.5, 2.0], parent)
    assert merged["b"].tolist() == [3.0 + 0.5 * 2 + 2.0 * -1]
    assert merged["a"] is parent["a"]
    average = merged_state([{"b": torch.ones(1).half()}, {"b": torch.full((1,), 4.0)}], [0.5, 0.5], None)["b"]
    assert (average.tolist(), average.dtype) == ([2.5], torch.float32)
    half = {"b": torch.ones(1, dtype=torch.float16)}
    assert merged_state([{"b": torch.full((1,), 1.5)}], [1.0], half)["b"].dtype == torch.float16
    with pytest.raises(ModelError, match=r"b overflows torch\.float16"):
        merged_state([{"b": torch.full((1,), 2.0)}], [1e6], half)


@pytest.mark.parametrize(("name", "heir", "left"), [("t0250-0500", "lower", "t0000-0500"), ("t0250-0500", "higher", "t0250-1000")])
def test_drop_hands_the_interval_to_a_neighbour(plain: ModelFolder, tmp_path: Path, name: str, heir: str, left: str):
    fork(plain, at(plain, 250, 500), tmp_path / "forked")
    trained(tmp_path / "forked", "t0000-0250", tmp_path / "one", lambda name, t: t + 1 if name == "conv_in.bias" else t)
    trained(tmp_path / "one", "t0500-1000", tmp_path / "both", lambda name, t: t - 1 if name == "conv_in.bias" else t)
    model = open_folder(tmp_path / "both")
    neighbour = "t0000-0250" if heir == "lower" else "t0500-1000"
    wanted = weights_of(tmp_path / "both", neighbour)
    taken = drop(model, name, tmp_path / "left", heir=heir)
    assert (taken.name, taken.subfolder) == (left, f"unet_{left}")
    assert_equal(weights_of(tmp_path / "left", left), wanted)
    entries = {entry.name: entry for entry in open_folder(tmp_path / "left").experts}
    assert entries.keys() == {left, "t0500-1000" if heir == "lower" else "t0000-0250"}
    border = plain.noise.sigmas[500 if heir == "lower" else 250]
    assert (entries[left].sigma_max if heir == "lower" else entries[left].sigma_min) == float(border)


def test_the_last_expert_becomes_an_ordinary_folder(ensemble: ModelFolder, tmp_path: Path):
    for gone, heir, stays in (("high", "lower", "unet_low"), ("low", "higher", "unet")):
        out = tmp_path / gone
        drop(ensemble, gone, out, heir=heir)
        assert not (out / "experts.json").exists()
        assert files(out / "unet") == files(ensemble.path / stays)
        assert not (out / "unet_low").exists()
    fork(ensemble, at(ensemble, 900), tmp_path / "forked", expert="high")
    trained(tmp_path / "forked", "t0900-1000", tmp_path / "trained", lambda name, t: t + 1 if name == "conv_in.bias" else t)
    wanted = weights_of(tmp_path / "trained", "t0900-1000")
    name = open_folder(tmp_path / "trained").experts[1].name
    drop(open_folder(tmp_path / "trained"), name, tmp_path / "two", heir="higher")
    drop(open_folder(tmp_path / "two"), "low", tmp_path / "one", heir="higher")
    assert_equal(load_file(tmp_path / "one" / "unet" / WHOLE), wanted)
    assert not (tmp_path / "one" / "unet" / INDEX).exists()


def test_a_lone_expert_keeps_its_guidance(ensemble: ModelFolder, tmp_path: Path):
    with_scale = replace(ensemble, experts=tuple(replace(entry, guidance=2.5) for entry in ensemble.experts))
    drop(with_scale, "low", tmp_path / "one", heir="higher")
    assert [(e.name, e.guidance, e.subfolder) for e in open_folder(tmp_path / "one").experts] == [("t0000-1000", 2.5, "unet")]


def test_where_the_highest_expert_goes_unet_stays_filled(ensemble: ModelFolder, tmp_path: Path):
    """`unet/`, which every model folder has, gets the weights of the highest that is left; deltas of it follow."""
    fork(ensemble, at(ensemble, 100, 50), tmp_path / "forked", expert="low")
    drop(open_folder(tmp_path / "forked"), "high", tmp_path / "left", heir="lower")
    entries = open_folder(tmp_path / "left").experts
    assert [entry.subfolder for entry in entries] == ["unet_t0000-0050", "unet_t0050-0100", "unet"]
    wanted = load_file(ensemble.path / "unet_low" / WHOLE)
    for entry in entries:
        assert_equal(weights_of(tmp_path / "left", entry.name), wanted)


def test_trained_weights_are_stored_as_what_differs(plain: ModelFolder, tmp_path: Path):
    fork(plain, at(plain, 500), tmp_path / "forked")
    base = weights_of(tmp_path / "forked", "t0000-0500")
    trained(tmp_path / "forked", "t0000-0500", tmp_path / "trained", lambda name, t: t + 0.5 if "attn2.to_k" in name else t)
    own = load_file(tmp_path / "trained" / "unet_t0000-0500" / TENSORS)
    assert sorted(own) == sorted(name for name in base if "attn2.to_k" in name)
    assert_equal(weights_of(tmp_path / "trained", "t0000-0500"), {name: t + 0.5 if "attn2.to_k" in name else t for name, t in base.items()})
    assert_equal(weights_of(tmp_path / "trained", "t0500-1000"), base)
    # The same weights as whole folders draw the same pixels, and others than the parent's.
    fork(plain, at(plain, 500), tmp_path / "whole", whole=True)
    trained(tmp_path / "whole", "t0000-0500", tmp_path / "whole-trained", lambda name, t: t + 0.5 if "attn2.to_k" in name else t)
    assert (tmp_path / "whole-trained" / "unet_t0000-0500" / WHOLE).exists()
    for dtype in ("float32", "bfloat16"):
        pixels, _ = draw(tmp_path / "trained", dtype)
        assert torch.equal(pixels, draw(tmp_path / "whole-trained", dtype)[0])
        assert not torch.equal(pixels, draw(plain.path, dtype)[0])


def lora_file(path: Path, model: ModelFolder, scale: float = 0.3) -> dict[str, Tensor]:
    """A LoRA for every to_q and for conv_out, and what it adds to each weight."""
    generator, tensors, added = torch.Generator().manual_seed(4), dict[str, Tensor](), dict[str, Tensor]()
    for name, weight in load_file(model.path / "unet" / WHOLE).items():
        if name.endswith("to_q.weight") or name == "conv_out.weight":
            module = name.removesuffix(".weight")
            down = scale * torch.randn((2, *weight.shape[1:]), generator=generator)
            up = scale * torch.randn((weight.shape[0], 2, *[1] * (weight.ndim - 2)), generator=generator)
            tensors |= {f"unet.{module}.lora.down.weight": down, f"unet.{module}.lora.up.weight": up}
            added[name] = (up.flatten(1) @ down.flatten(1)).view(weight.shape)
    save_file(tensors, path)
    return added


@pytest.mark.parametrize("half", [False, True])
def test_a_lora_expert_draws_what_its_merged_weights_draw(plain: ModelFolder, tmp_path: Path, half: bool):
    source = plain
    if half:
        shutil.copytree(plain.path, tmp_path / "half")
        path = tmp_path / "half" / "unet" / WHOLE
        save_file({name: tensor.half() for name, tensor in load_file(path).items()}, path)
        source = open_folder(tmp_path / "half")
    added = lora_file(tmp_path / "lora.safetensors", source)
    fork(source, at(source, 500), tmp_path / "forked")
    put_weights(open_folder(tmp_path / "forked"), "t0500-1000", tmp_path / "lora", lora=tmp_path / "lora.safetensors")
    assert sorted(path.name for path in (tmp_path / "lora" / "unet_t0500-1000").iterdir()) == [INDEX, LORA]
    base = load_file(source.path / "unet" / WHOLE)
    merged = base | {name: base[name].float() + extra for name, extra in added.items()}
    put_weights(open_folder(tmp_path / "forked"), "t0500-1000", tmp_path / "whole", tensors=merged)
    assert_equal(weights_of(tmp_path / "lora", "t0500-1000"), weights_of(tmp_path / "whole", "t0500-1000"))
    pixels, _ = draw(tmp_path / "lora")
    assert torch.equal(pixels, draw(tmp_path / "whole")[0])
    assert not torch.equal(pixels, draw(source.path)[0])


def test_a_lora_on_whole_weights_keeps_them_as_its_base(ensemble: ModelFolder, tmp_path: Path):
    added = lora_file(tmp_path / "a.safetensors", ensemble)
    put_weights(ensemble, "low", tmp_path / "once", lora=tmp_path / "a.safetensors")
    model = open_folder(tmp_path / "once")
    assert [e.name for e in model.experts] == ["low", "high"]
    assert [folder.name for folder in chain(tmp_path / "once" / model.experts[0].subfolder)] == ["unet_low", "unet_low_2"]
    low = load_file(ensemble.path / "unet_low" / WHOLE)
    assert_equal(weights_of(tmp_path / "once", "low"), low | {name: low[name] + extra for name, extra in added.items()})
    put_weights(model, "low", tmp_path / "twice", lora=tmp_path / "a.safetensors")
    assert_equal(weights_of(tmp_path / "twice", "low"), low | {name: low[name] + extra + extra for name, extra in added.items()})
    assert_equal(weights_of(tmp_path / "twice", "high"), load_file(ensemble.path / "unet" / WHOLE))


def test_a_lora_on_a_lone_model_is_merged(plain: ModelFolder, tmp_path: Path):
    added = lora_file(tmp_path / "a.safetensors", plain)
    put_weights(plain, None, tmp_path / "out", lora=tmp_path / "a.safetensors")
    base = load_file(plain.path / "unet" / WHOLE)
    assert_equal(load_file(tmp_path / "out" / "unet" / WHOLE), base | {name: base[name] + extra for name, extra in added.items()})
    assert not (tmp_path / "out" / "experts.json").exists()


def test_links_cost_no_disk_and_draw_the_same(plain: ModelFolder, tmp_path: Path):
    fork(plain, at(plain, 500), tmp_path / "forked", link=True)
    for name in ("unet", "vae", "text_encoder"):
        [weights] = (tmp_path / "forked" / name).glob("*.safetensors")
        assert weights.samefile(plain.path / name / weights.name)
    assert torch.equal(draw(tmp_path / "forked")[0], draw(plain.path)[0])


def test_the_facts_of_a_fork(plain: ModelFolder, tmp_path: Path):
    fork(plain, at(plain, 500), tmp_path / "forked")
    trained(tmp_path / "forked", "t0000-0500", tmp_path / "trained", lambda name, t: t + 1 if name == "conv_in.bias" else t)
    facts = describe_experts(open_folder(tmp_path / "trained"))
    high, low = facts["experts"]
    unet = tmp_path / "trained" / "unet" / WHOLE
    assert (high["name"], high["stored"], high["base"], high["parent"]) == ("t0500-1000", "delta", "unet", "unet")
    assert (high["timestep_min"], high["timestep_max"], low["timestep_min"], low["timestep_max"]) == (500.0, 1000.0, 0.0, 500.0)
    sigma = float(plain.noise.sigmas[500])
    assert high["log_snr_max"] == pytest.approx(math.log(1 / sigma**2))
    assert (high["log_snr_min"], low["log_snr_max"], high["sigma_max"]) == (None, None, None)
    assert high["shared_tensors"] == high["tensors"] == len(load_file(unet)) == low["shared_tensors"] + 1
    assert high["shared_bytes"] - low["shared_bytes"] == 4 * 16
    assert facts["bytes"] == unet.stat().st_size + high["bytes"] + low["bytes"]
    assert high["bytes"] < 200
    assert "Infinity" not in json.dumps(facts)


def test_names_follow_the_first_whole_timestep(plain: ModelFolder):
    noise = plain.noise
    for timestep in range(1, 1000):
        sigma = sigma_of(noise, timestep)
        assert interval_name(noise, sigma, INF) == f"t{timestep:04d}-1000"
        assert interval_name(noise, 0.0, sigma) == f"t0000-{timestep:04d}"
        assert interval_name(noise, 0.0, math.nextafter(sigma, INF)) == f"t0000-{timestep + 1:04d}"
    with pytest.raises(UsageError, match="no whole timestep"):
        interval_name(noise, sigma_of(noise, 500.2), sigma_of(noise, 500.8))


def _fork(borders: list[float] | None = None, **asked: Any) -> Callable[[ModelFolder, Path], object]:
    return lambda model, out: fork(model, [2.0] if borders is None else borders, out, **asked)


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (_fork(), "none was named"),
        (_fork(expert="middle"), "'middle' is none of them"),
        (_fork([1.5], expert="high"), "is not inside the expert 'high'"),
        (_fork([1.0], expert="high"), "is not inside the expert 'high'"),
        (_fork([2.0, math.nan], expert="high"), "is not inside"),
        (_fork([INF], expert="high"), "is not inside"),
        (_fork([], expert="high"), "No border"),
        (_fork([2.0, 2.0001], expert="high"), "no whole timestep"),
        (_fork([20.0], expert="high"), "no whole timestep"),
        (_fork([0.001], expert="low"), "no whole timestep"),
        (lambda m, out: drop(m, "low", out, heir="lower"), "no expert lower than 'low'"),
        (lambda m, out: drop(m, "high", out, heir="higher"), "no expert higher than 'high'"),
        (lambda m, out: drop(m, "middle", out, heir="higher"), "'middle' is none of them"),
        (lambda m, out: merge(m, out, experts=["low"]), "two experts or more"),
        (lambda m, out: merge(m, out, experts=["low", "low"]), "two experts or more"),
        (lambda m, out: merge(m, out, experts=["low", "middle"]), "'middle' is none of them"),
        (lambda m, out: merge(m, out, shares={"low": 1.0}), "one weight for each"),
        (lambda m, out: merge(m, out, shares={"low": 1.0, "high": math.nan}), "finite"),
        (lambda m, out: merge(m, out, shares={"low": 1.0, "high": -1.0}), "sum to 0"),
    ],
)
def test_what_cannot_be_done_is_said_and_nothing_is_written(ensemble: ModelFolder, tmp_path: Path, act: Callable[..., object], said: str):
    with pytest.raises(UsageError, match=said):
        act(ensemble, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("timestep", [0.0, -1.0, 999.5, 1000.0, math.nan, INF])
def test_borders_outside_the_schedule(plain: ModelFolder, timestep: float):
    with pytest.raises(UsageError, match="above 0 and up to 999"):
        sigma_of(plain.noise, timestep)


def test_only_neighbours_merge(plain: ModelFolder, tmp_path: Path):
    fork(plain, at(plain, 200, 400), tmp_path / "forked")
    with pytest.raises(UsageError, match="'t0000-0200' and 't0400-1000' are not neighbours"):
        merge(open_folder(tmp_path / "forked"), tmp_path / "out", experts=["t0000-0200", "t0400-1000"])


def test_only_one_architecture_merges(ensemble: ModelFolder, tmp_path: Path):
    config = dict(ensemble.configs["unet"]) | {"attention_head_dim": 8}
    with pytest.raises(ModelError, match="differ in architecture"):
        merge(replace(ensemble, configs={**ensemble.configs, "unet": config}), tmp_path / "out")


def test_nothing_is_overwritten(plain: ModelFolder, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("empty", "file", "dangling"):
        with pytest.raises(UsageError, match="never overwritten"):
            fork(plain, at(plain, 500), tmp_path / name)
    assert list((tmp_path / "empty").iterdir()) == []
    assert (tmp_path / "file").read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 3


def test_damage_is_not_built_upon(ensemble: ModelFolder, tmp_path: Path):
    fork(ensemble, at(ensemble, 800), tmp_path / "forked", expert="high")
    path = tmp_path / "forked" / "unet" / WHOLE
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    model = open_folder(tmp_path / "forked")
    top = model.experts[-1].name
    acts: list[Callable[[Path], object]] = [
        lambda out: fork(model, at(model, 900), out, expert=top),
        lambda out: merge(model, out),
        lambda out: drop(model, "low", out, heir="higher"),
    ]
    for act in acts:
        with pytest.raises(ModelError, match="are not the ones that"):
            act(tmp_path / "out")
    with pytest.raises(ModelError, match="are not the ones that"):
        draw(tmp_path / "forked")
    shutil.rmtree(tmp_path / "forked" / "unet_low")
    shutil.rmtree(tmp_path / "forked" / "unet")
    with pytest.raises(ModelError, match="'unet'"):
        open_folder(tmp_path / "forked")
    assert [path.name for path in tmp_path.iterdir()] == ["forked"]


def test_weights_that_do_not_fit_are_refused(ensemble: ModelFolder, tmp_path: Path):
    state = load_file(ensemble.path / "unet" / WHOLE)
    del state["conv_in.bias"]
    with pytest.raises(ModelError, match="names and shapes of the expert 'high'"):
        put_weights(ensemble, "high", tmp_path / "out", tensors=state)
    save_file({"unet.no_such.lora.down.weight": torch.zeros(1, 2), "unet.no_such.lora.up.weight": torch.zeros(2, 1)}, tmp_path / "a.safetensors")
    with pytest.raises(ModelError, match="no_such"):
        put_weights(ensemble, "high", tmp_path / "out", lora=tmp_path / "a.safetensors")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_nothing(plain: ModelFolder, tmp_path: Path):
    """Files may grow to 4 KiB only; the unet is larger, so writing fails in the middle."""
    code = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from tu_diffuse.pipeline.folder import open_folder\n"
        "from tu_diffuse.training.forking import fork\n"
        "from tu_diffuse.errors import OutputError\n"
        "model = open_folder(Path(sys.argv[1]))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "for whole in (False, True):\n"
        "    try:\n"
        "        fork(model, [1.0], Path(sys.argv[2]) / 'out', whole=whole, link=whole)\n"
        "    except OutputError as error:\n"
        "        print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, plain.path, tmp_path], capture_output=True, text=True, check=True)
    assert done.stdout.count("cannot be written") == 2, done.stdout + done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(plain: ModelFolder, tmp_path: Path):
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="cannot be written"):
        fork(plain, at(plain, 500), tmp_path / "out")


def test_an_interrupted_write_leaves_nothing(plain: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from tu_diffuse.training import expert_files

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(expert_files, "write_experts", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fork(plain, at(plain, 500), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []

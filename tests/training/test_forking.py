"""The life of an expert on whole model folders: a fork draws what its parent drew, a merge gives it back."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from expert_folders import WHOLE, assert_equal, at, draw, files, size, trained, weights_of
from safetensors.torch import load_file, save_file
from torch import Tensor
from tu_diffuse.errors import UsageError
from tu_diffuse.pipeline.model.describe import describe, describe_experts
from tu_diffuse.pipeline.model.folder import ModelFolder, open_folder
from tu_diffuse.training.forking import drop, fork, put_weights
from tu_diffuse.training.intervals import expert_of, interval_name, sigma_of
from tu_diffuse.training.merging import merge
from tu_diffuse.unet.deltas import INDEX, LORA, TENSORS, chain

INF = math.inf


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
    for sampler in () if whole else ("euler_a", "heun", "unipc", "dpmpp_2m_sde"):
        assert torch.equal(draw(tmp_path / "forked", sampler=sampler)[0], draw(plain.path, sampler=sampler)[0]), sampler
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
    # An untrained child is no base of its own: its children are stored against the weights that it has.
    assert [folder.name for folder in chain(tmp_path / "b" / model.experts[2].subfolder)] == ["unet_t0600-0700", "unet"]
    pixels, used = draw(tmp_path / "b")
    assert torch.equal(pixels, wanted)
    assert used[::-1] == names

    merged = merge(model, tmp_path / "c", experts=names[1:4])
    assert merged.parent == "unet"
    assert [entry.name for entry in open_folder(tmp_path / "c").experts] == ["low", middle, "t0800-1000"]
    assert torch.equal(draw(tmp_path / "c")[0], wanted)
    merge(open_folder(tmp_path / "c"), tmp_path / "d", experts=[middle, "t0800-1000"])
    model = open_folder(tmp_path / "d")
    assert [(e.name, e.subfolder, e.sigma_min) for e in model.experts] == [("low", "unet_low", 0.0), (f"t{border}-1000", "unet", 1.5)]
    assert torch.equal(draw(tmp_path / "d")[0], wanted)
    assert files(tmp_path / "d" / "unet") == files(ensemble.path / "unet")
    assert sorted(path.name for path in (tmp_path / "d").iterdir()) == sorted(path.name for path in ensemble.path.iterdir())


def test_a_trained_child_is_a_base(plain: ModelFolder, tmp_path: Path):
    fork(plain, at(plain, 500), tmp_path / "a")
    trained(tmp_path / "a", "t0500-1000", tmp_path / "b", lambda name, t: t + 1 if name == "conv_in.bias" else t)
    fork(open_folder(tmp_path / "b"), at(plain, 750), tmp_path / "c", expert="t0500-1000")
    model = open_folder(tmp_path / "c")
    for name in ("t0500-0750", "t0750-1000"):
        folders = chain(tmp_path / "c" / expert_of(model, name).subfolder)
        assert [folder.name for folder in folders] == [f"unet_{name}", "unet_t0500-1000", "unet"]
    assert torch.equal(draw(tmp_path / "c")[0], draw(tmp_path / "b")[0])
    trained(tmp_path / "c", "t0750-1000", tmp_path / "d", lambda name, t: t * 2 if name == "conv_out.bias" else t)
    merged = merge(open_folder(tmp_path / "d"), tmp_path / "e", experts=["t0500-0750", "t0750-1000"], shares={"t0500-0750": 5.0, "t0750-1000": 1.0})
    assert merged.parent == "unet_t0500-1000"
    base = load_file(plain.path / "unet" / WHOLE)
    changed = {"conv_in.bias": base["conv_in.bias"] + 1, "conv_out.bias": base["conv_out.bias"] * 2}
    assert_equal(weights_of(tmp_path / "e", "t0500-1000"), base | changed)


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
    described = describe(open_folder(tmp_path / "trained"))
    assert [expert["megabytes"] for expert in described["experts"]] == [0.0, 0.0]
    assert len({expert["parameters"] for expert in [*described["experts"], *describe(plain)["experts"]]}) == 1
    assert "Infinity" not in json.dumps([facts, described])


def test_names_follow_the_first_whole_timestep(plain: ModelFolder):
    noise = plain.noise
    for timestep in range(1, 1000):
        sigma = sigma_of(noise, timestep)
        assert interval_name(noise, sigma, INF) == f"t{timestep:04d}-1000"
        assert interval_name(noise, 0.0, sigma) == f"t0000-{timestep:04d}"
        assert interval_name(noise, 0.0, math.nextafter(sigma, INF)) == f"t0000-{timestep + 1:04d}"
    with pytest.raises(UsageError, match="no whole timestep"):
        interval_name(noise, sigma_of(noise, 500.2), sigma_of(noise, 500.8))

"""Experts merged: the parent comes back when nothing was trained, and weighted task vectors when something was."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from expert_folders import WHOLE, at, draw, files, trained
from safetensors.torch import load_file
from tu_diffuse.errors import ModelError, UsageError
from tu_diffuse.pipeline.model.folder import ModelFolder, open_folder
from tu_diffuse.training.forking import drop, fork
from tu_diffuse.training.merging import merge, merged_state


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


def test_a_given_parent_is_what_differences_are_taken_from(ensemble: ModelFolder, plain: ModelFolder, tmp_path: Path):
    """Two whole experts, and as parent the model in which only one of them is left; weights that do not sum to 1 tell it from an average."""
    drop(ensemble, "low", tmp_path / "parent", heir="higher")
    merged = merge(ensemble, tmp_path / "merged", shares={"low": 0.5, "high": 3.0}, parent=open_folder(tmp_path / "parent"))
    assert merged.parent == "parent"
    assert merged.shares == {"low": 0.5, "high": 3.0}
    low, high = (load_file(ensemble.path / name / WHOLE) for name in ("unet_low", "unet"))
    came = load_file(tmp_path / "merged" / "unet" / WHOLE)
    for name in low:
        torch.testing.assert_close(came[name], (high[name].double() + 0.5 * (low[name].double() - high[name].double())).float(), atol=1e-6, rtol=1e-6)
    with pytest.raises(ModelError, match="another architecture"):
        merge(ensemble, tmp_path / "out", parent=plain)
    with pytest.raises(UsageError, match="a model of one expert"):
        merge(ensemble, tmp_path / "out", parent=ensemble)


def test_a_given_parent_wins_over_the_base(plain: ModelFolder, tmp_path: Path):
    fork(plain, at(plain, 300), tmp_path / "forked")
    trained(tmp_path / "forked", "t0000-0300", tmp_path / "low", lambda name, t: t + 0.125 if name == "conv_in.bias" else t)
    trained(plain.path, "unet", tmp_path / "other", lambda name, t: t + 1.0 if name == "conv_in.bias" else t)
    shares = {"t0000-0300": 0.5, "t0300-1000": 0.25}
    merge(open_folder(tmp_path / "low"), tmp_path / "merged", shares=shares, parent=open_folder(tmp_path / "other"))
    theta, came = (load_file(folder / "unet" / WHOLE) for folder in (plain.path, tmp_path / "merged"))
    torch.testing.assert_close(came["conv_in.bias"], theta["conv_in.bias"] + 1.0 + 0.5 * (0.125 - 1.0) - 0.25)
    assert [name for name in theta if not torch.equal(theta[name], came[name])] == ["conv_in.bias"]


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


def test_only_neighbours_merge(plain: ModelFolder, tmp_path: Path):
    fork(plain, at(plain, 200, 400), tmp_path / "forked")
    with pytest.raises(UsageError, match="'t0000-0200' and 't0400-1000' are not neighbours"):
        merge(open_folder(tmp_path / "forked"), tmp_path / "out", experts=["t0000-0200", "t0400-1000"])


def test_only_one_architecture_merges(ensemble: ModelFolder, tmp_path: Path):
    config = dict(ensemble.configs["unet"]) | {"attention_head_dim": 8}
    with pytest.raises(ModelError, match="differ in architecture"):
        merge(replace(ensemble, configs={**ensemble.configs, "unet": config}), tmp_path / "out")


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"experts": ["low"]}, "two experts or more"),
        ({"experts": ["low", "low"]}, "two experts or more"),
        ({"experts": ["low", "middle"]}, "'middle' is none of them"),
        ({"shares": {"low": 1.0}}, "one weight for each"),
        ({"shares": {"low": 1.0, "high": math.nan}}, "finite"),
        ({"shares": {"low": 1.0, "high": -1.0}}, "sum to 0"),
    ],
)
def test_what_cannot_be_merged_is_said(ensemble: ModelFolder, tmp_path: Path, asked: dict[str, object], said: str):
    with pytest.raises(UsageError, match=said):
        merge(ensemble, tmp_path / "out", **asked)
    assert list(tmp_path.iterdir()) == []

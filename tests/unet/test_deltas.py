"""Experts stored as deltas: the same weights as whole ones, shared once in memory, and everything that is damaged refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tu_diffuse.contracts import Conditioning
from tu_diffuse.errors import ModelError, UnsafeError
from tu_diffuse.model_files import weights_sha256
from tu_diffuse.unet.deltas import INDEX, LORA, MAX_CHAIN, TENSORS, chain, differing, expert_sha256, read_delta, read_expert, write_delta
from tu_diffuse.unet.experts import ExpertEntry
from tu_diffuse.unet.residency import expert_pool, load_expert
from unet_configs import inputs, random_unet

CHANGED = ("conv_in.weight", "mid_block.resnets.0.norm1.bias")
STATE = random_unet("embedded", 0).state_dict()


def told(sigma):
    return 60 * sigma


def changed_state(names=CHANGED, by=0.1):
    return STATE | {name: STATE[name] + by for name in names}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """`unet` whole, `near` equal to it, `low` with two tensors of its own, `lower` with one more on top of `low`."""
    write_whole(tmp_path / "unet", STATE)
    write_delta(tmp_path / "near", tmp_path / "unet", {})
    write_delta(tmp_path / "low", tmp_path / "unet", differing(changed_state(), STATE))
    write_delta(tmp_path / "lower", tmp_path / "low", {"conv_out.bias": STATE["conv_out.bias"] - 1})
    return tmp_path


def write_whole(folder: Path, state: dict[str, torch.Tensor]) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(random_unet("embedded").config.to_dict()))
    save_file(state, folder / "diffusion_pytorch_model.safetensors")


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_expert(folder, "v_prediction", told).unet.state_dict()


def assert_equal(came: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert came.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(came[name], wanted[name])] == []


def test_a_delta_is_its_base_but_for_its_own_tensors(model: Path):
    assert_equal(weights_of(model / "near"), STATE)
    assert_equal(weights_of(model / "low"), changed_state())
    assert_equal(weights_of(model / "lower"), changed_state() | {"conv_out.bias": STATE["conv_out.bias"] - 1})
    assert sorted(load_file(model / "low" / TENSORS)) == sorted(CHANGED)
    assert [path.name for path in (model / "near").iterdir()] == [INDEX]
    assert sum(path.stat().st_size for path in (model / "near").iterdir()) < 200


def test_a_delta_computes_what_whole_weights_compute(model: Path):
    write_whole(model / "whole", changed_state())
    given = inputs("embedded")
    prompt, sigma = Conditioning(given["tokens"], pooled=given["pooled"]), torch.tensor([3.0, 0.4])
    answers = {name: load_expert(model / name, "v_prediction", told)(given["x"], sigma, prompt) for name in ("unet", "low", "whole")}
    assert torch.equal(answers["low"], answers["whole"])
    assert (answers["low"] - answers["unet"]).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shared_tensors_are_in_memory_once(model: Path, dtype: torch.dtype):
    entries = [ExpertEntry("lower", "lower", 0.0, 0.5), ExpertEntry("low", "low", 0.5, 2.0), ExpertEntry("near", "near", 2.0)]
    pool = expert_pool(model, entries, "v_prediction", told, dtype, keep="all")
    states = {name: pool.get(name).unet.state_dict() for name in ("lower", "low", "near")}
    for name in STATE:
        places = {expert: state[name].data_ptr() for expert, state in states.items()}
        own = (1 if name in CHANGED else 0) + (1 if name == "conv_out.bias" else 0)
        assert len(set(places.values())) == 1 + own, name
    assert all(tensor.dtype == dtype for tensor in states["low"].values())
    if dtype == torch.float32:
        with open("/proc/self/maps") as maps:
            ranges = [line.split()[0].split("-") for line in maps if str(model / "unet") in line]
        address = states["low"]["mid_block.resnets.0.conv1.weight"].data_ptr()
        assert any(int(low, 16) <= address < int(high, 16) for low, high in ranges)


def test_an_active_pool_keeps_the_base_and_drops_the_experts(model: Path):
    pool = expert_pool(model, [ExpertEntry("low", "low", 0.0, 2.0), ExpertEntry("near", "near", 2.0)], "v_prediction", told, torch.bfloat16)
    before = pool.get("near").unet.mid_block.resnets[0].conv1.weight.data_ptr()
    assert pool.get("low").unet.mid_block.resnets[0].conv1.weight.data_ptr() == before
    assert pool.held == ("low",)


def test_only_bits_that_differ_are_stored():
    zeros = {"a": torch.zeros(3), "b": torch.zeros(3), "c": torch.ones(2), "d": torch.tensor(1.0)}
    assert list(differing(zeros, zeros)) == []
    assert list(differing({"a": -zeros["a"], "b": zeros["b"].half(), "c": zeros["c"], "d": torch.tensor(2.0)}, zeros)) == ["a", "b", "d"]


def test_the_hash_of_an_expert_pins_its_bases(model: Path):
    assert expert_sha256(model / "unet") == weights_sha256(model / "unet")
    delta = read_delta(model / "lower")
    assert delta is not None
    assert (delta.base, delta.base_sha256) == ("low", expert_sha256(model / "low"))
    load_expert(model / "lower", "v_prediction", told, sha256=expert_sha256(model / "lower"))
    with pytest.raises(ModelError, match=r"lower are not the ones that experts\.json names"):
        load_expert(model / "lower", "v_prediction", told, sha256=expert_sha256(model / "low"))


def _other_base(model: Path) -> None:
    save_file({**STATE, "conv_in.bias": STATE["conv_in.bias"] + 1e-3}, model / "unet" / "diffusion_pytorch_model.safetensors")


def _one_bit(name: str) -> Callable[[Path], None]:
    def flip(model: Path) -> None:
        path = model / name
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)

    return flip


def _cut(model: Path) -> None:
    path = model / "low" / TENSORS
    path.write_bytes(path.read_bytes()[:-4])


def _no_base(model: Path) -> None:
    shutil.rmtree(model / "unet")


def _nan(model: Path) -> None:
    save_file({"conv_in.bias": torch.full((32,), float("nan"))}, model / "low" / TENSORS)


def _unknown(model: Path) -> None:
    save_file({"conv_between.bias": torch.zeros(32)}, model / "low" / TENSORS)


def _other_shape(model: Path) -> None:
    save_file({"conv_in.bias": torch.zeros(31)}, model / "low" / TENSORS)


def _both(model: Path) -> None:
    shutil.copy(model / "unet" / "diffusion_pytorch_model.safetensors", model / "low")


def _circle(model: Path) -> None:
    shutil.rmtree(model / "unet")
    for one, other in (("unet", "low"), ("low", "unet")):
        shutil.rmtree(model / one, ignore_errors=True)
        (model / one).mkdir()
        (model / one / INDEX).write_text(json.dumps({"version": 1, "base": other, "base_sha256": "0" * 64}))


def _long(model: Path) -> None:
    for i in range(MAX_CHAIN):
        write_delta(model / f"d{i}", model / ("low" if i == 0 else f"d{i - 1}"), {})
    (model / "low").rename(model / "was-low")
    (model / f"d{MAX_CHAIN - 1}").rename(model / "low")
    (model / "was-low").rename(model / "d-base")
    (model / "d0" / INDEX).write_text(json.dumps({"version": 1, "base": "d-base", "base_sha256": "0" * 64}))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_other_base, r"unet are not the ones that low/delta\.json names"),
        (_one_bit("unet/diffusion_pytorch_model.safetensors"), r"unet are not the ones that low/delta\.json names"),
        (_cut, "not a whole safetensors file"),
        (_no_base, "is a delta of 'unet', which is not there"),
        (_nan, r"conv_in\.bias in .*low holds NaN"),
        (_unknown, r"conv_between\.bias.*its base does not have"),
        (_other_shape, r"conv_in\.bias.*\(31,\).*its base does not have"),
        (_both, "holds both delta.json and whole weights"),
        (_circle, "go round in a circle"),
        (_long, "more than 16 times"),
    ],
)
def test_a_damaged_delta_is_refused(model: Path, damage: Callable[[Path], None], said: str):
    weights_of(model / "low")
    damage(model)
    with pytest.raises(ModelError, match=said):
        load_expert(model / "low", "v_prediction", told)


def test_a_damaged_delta_file_is_refused_by_its_own_hash(model: Path):
    digest = expert_sha256(model / "low")
    _one_bit(f"low/{TENSORS}")(model)
    with pytest.raises(ModelError, match=r"low are not the ones that experts\.json names"):
        load_expert(model / "low", "v_prediction", told, sha256=digest)


GOOD = {"version": 1, "base": "unet", "base_sha256": "0" * 64}


@pytest.mark.parametrize(
    "content",
    [
        GOOD | {"version": 2},
        GOOD | {"version": True},
        GOOD | {"base": "../unet"},
        GOOD | {"base": "/etc"},
        GOOD | {"base": ".."},
        GOOD | {"base": "."},
        GOOD | {"base": ""},
        GOOD | {"base": "low"},
        GOOD | {"base": "a/b"},
        GOOD | {"base": "..\\unet"},
        GOOD | {"base": "C:"},
        GOOD | {"base": None},
        GOOD | {"base": 3},
        GOOD | {"base_sha256": "abc"},
        GOOD | {"base_sha256": None},
        GOOD | {"auto_map": "x.Y"},
        {"version": 1, "base": "unet"},
        [],
    ],
)
def test_a_bad_index_is_refused(model: Path, content: object):
    (model / "low" / INDEX).write_text(json.dumps(content))
    with pytest.raises(ModelError) as raised:
        chain(model / "low")
    assert "\n" not in str(raised.value)


def test_a_pickled_base_is_refused(model: Path):
    (model / "unet" / "diffusion_pytorch_model.safetensors").rename(model / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(UnsafeError, match="pickle"):
        load_expert(model / "low", "v_prediction", told)


def test_lora_is_a_delta_too(model: Path):
    module = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    down, up = torch.randn(2, 32), torch.randn(32, 2)
    write_delta(model / "styled", model / "low", {})
    save_file({f"unet.{module}.lora.down.weight": down, f"unet.{module}.lora.up.weight": up}, model / "styled" / LORA)
    assert_equal(weights_of(model / "styled"), changed_state() | {f"{module}.weight": STATE[f"{module}.weight"] + up @ down})
    origins = {name: stored.origin.name for name, stored in read_expert(model / "styled").items()}
    assert {name for name, origin in origins.items() if origin == "styled"} == {f"{module}.weight"}
    assert {name for name, origin in origins.items() if origin == "low"} == set(CHANGED)
    before = expert_sha256(model / "styled")
    save_file({f"unet.{module}.lora.down.weight": down, f"unet.{module}.lora.up.weight": up * 2}, model / "styled" / LORA)
    assert expert_sha256(model / "styled") != before

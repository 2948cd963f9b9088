"""The expert table: its checks, its routing, and experts.json."""

import json
import math
from dataclasses import dataclass, field, replace

import pytest
import torch
from tu_diffuse.contracts import Conditioning
from tu_diffuse.errors import ModelError
from tu_diffuse.unet.experts import Expert, ExpertEntry, ExpertTable, ExpertText, read_experts, write_experts

INF = math.inf


@dataclass
class Marker:
    """A denoiser that answers with its own number plus sigma and the row's first token."""

    number: float
    calls: list[list[float]] = field(default_factory=list)

    def __call__(self, x, sigma, conditioning):
        self.calls.append(sigma.tolist())
        return torch.zeros_like(x) + self.number + (sigma + conditioning.tokens[:, 0, 0]).view(-1, 1, 1, 1)


def expert(name, low, high, number=0.0, **rest):
    marker = Marker(number)
    return Expert(name, low, high, lambda: marker, **rest), marker


def table(*intervals, covers=(0.0, INF)):
    return ExpertTable([expert(f"e{i}", low, high)[0] for i, (low, high) in enumerate(intervals)], covers)


@pytest.mark.parametrize(
    ("intervals", "message"),
    [
        ([(0, 1), (2, INF)], r"gap between the experts 'e0' and 'e1', sigma 1 to 2"),
        ([(0, 2), (1, INF)], r"overlap between the experts 'e0' and 'e1', sigma 1 to 2"),
        ([(0.5, INF)], r"No expert covers sigma 0 to 0.5"),
        ([(0, 1), (1, 80)], r"No expert covers sigma 80 to inf"),
        ([], r"empty"),
        ([(1, 1), (0, INF)], r"'e0'.*sigma_min < sigma_max"),
        ([(-1, INF)], r"'e0'"),
        ([(0, math.nan)], r"'e0'"),
        ([(math.nan, INF)], r"'e0'"),
    ],
)
def test_a_bad_table_says_where(intervals, message):
    with pytest.raises(ModelError, match=message):
        table(*intervals)


def test_the_schedule_may_be_all_there_is_to_cover():
    assert table((0.02, 1), (1, 15), covers=(0.03, 14.6)).borders == (1,)
    with pytest.raises(ModelError, match=r"sigma 14\.6 to 14\.6"):
        table((0.02, 1), (1, 14.6), covers=(0.03, 14.6))


def test_names_are_unique():
    with pytest.raises(ModelError, match="same name"):
        ExpertTable([expert("a", 0, 1)[0], expert("a", 1, INF)[0]])


def test_routing_by_sigma_alone():
    experts = table((1.5, INF), (0, 0.25), (0.25, 1.5))
    assert experts.borders == (0.25, 1.5)
    owners = {0.0: "e1", 0.01: "e1", 0.2499999: "e1", 0.25: "e2", 0.7: "e2", 1.4999: "e2", 1.5: "e0", 14.6146: "e0", 4096.0: "e0"}
    assert {sigma: experts.expert_for(sigma).name for sigma in owners} == owners


def test_a_border_where_nothing_changes_is_none():
    """Multistep samplers restart at borders; a fork whose children were not trained must not make them."""
    names = ("a", "a", "b", None, None, "b")
    experts = ExpertTable([expert(f"e{i}", i, INF if i == 5 else i + 1, identity=name)[0] for i, name in enumerate(names)])
    assert experts.borders == (2, 3, 4, 5)


@pytest.mark.parametrize("sigma", [-1.0, math.nan, INF])
def test_a_sigma_that_nobody_owns(sigma):
    with pytest.raises(ModelError, match="No expert owns"):
        table((0, 1), (1, INF)).expert_for(sigma)


def test_the_table_is_a_denoiser_and_splits_a_mixed_batch():
    (low, low_net), (high, high_net) = expert("low", 0, 1, 100.0), expert("high", 1, INF, 200.0)
    experts = ExpertTable([high, low])
    tokens = torch.arange(4.0).view(4, 1, 1).expand(4, 3, 2)
    mixed = Conditioning(tokens, torch.ones(4, 3, dtype=torch.bool), tokens[:, 0], None)
    sigma = torch.tensor([5.0, 0.5, 1.0, 0.25])
    x0 = experts(torch.zeros(4, 2, 3, 3), sigma, mixed)
    assert x0.shape == (4, 2, 3, 3)
    assert x0[:, 0, 0, 0].tolist() == [205.0, 101.5, 203.0, 103.25]
    assert (low_net.calls, high_net.calls) == ([[0.5, 0.25]], [[5.0, 1.0]])
    experts(torch.zeros(4, 2, 3, 3), torch.full((4,), 2.0), mixed)
    assert high_net.calls[1:] == [[2.0] * 4]
    assert len(low_net.calls) == 1


def test_the_neighbour_below_is_prefetched_near_the_border():
    asked = []
    experts = ExpertTable(
        [expert(f"e{i}", low, high, prefetch=lambda i=i: asked.append(i))[0] for i, (low, high) in enumerate([(0, 1), (1, 1.5), (1.5, INF)])]
    )
    prompt = Conditioning(torch.zeros(1, 1, 1))
    for sigma, expected in [(10.0, []), (3.0, []), (2.9, [1]), (1.6, [1]), (1.2, [0]), (0.5, [])]:
        asked.clear()
        experts(torch.zeros(1, 1, 2, 2), torch.tensor([sigma]), prompt)
        assert asked == expected


ENTRIES = (
    ExpertEntry("detail", "unet_low", 0.0, 1.618, None, None, "0" * 64),
    ExpertEntry("layout", "experts/high", 1.618, INF, 3.5, "detail", None),
)
READING = ExpertText("sdxl-refiner", {"text_encoder_2": "text_encoder_2", "tokenizer_2": "other_tokenizer"}, False)


def test_experts_json_goes_round(tmp_path):
    path = write_experts(tmp_path, ENTRIES)
    assert read_experts(tmp_path) == ENTRIES
    assert json.loads(path.read_text())["experts"][1]["sigma_max"] is None
    assert [p.name for p in tmp_path.iterdir()] == ["experts.json"]


def test_an_expert_that_reads_in_its_own_way_needs_version_2(tmp_path):
    entries = (replace(ENTRIES[0], text=READING), ENTRIES[1])
    path = write_experts(tmp_path, entries)
    assert read_experts(tmp_path) == entries
    assert json.loads(path.read_text())["version"] == 2
    assert json.loads(write_experts(tmp_path, ENTRIES).read_text())["version"] == 1
    assert "text" not in path.read_text()


def test_a_folder_without_experts_is_an_ensemble_of_one(tmp_path):
    assert read_experts(tmp_path) == (ExpertEntry("unet", "unet", 0.0, INF),)


def changed(index, **fields):
    experts = [
        {"name": "low", "subfolder": "unet", "sigma_min": 0, "sigma_max": 1, "guidance": None, "parent": None, "sha256": None},
        {"name": "high", "subfolder": "unet_2", "sigma_min": 1, "sigma_max": None, "guidance": 2, "parent": "low", "sha256": None},
    ]
    experts[index] |= fields
    return {"version": 1, "experts": experts}


@pytest.mark.parametrize(
    "content",
    [
        {"version": 2, "experts": []},
        {"version": True, "experts": changed(0)["experts"]},
        {"experts": changed(0)["experts"]},
        {"version": 1},
        {"version": 1, "experts": []},
        {"version": 1, "experts": ["unet"]},
        [],
        changed(0, subfolder="../elsewhere"),
        changed(0, subfolder="/etc"),
        changed(0, subfolder="a/../../b"),
        changed(0, subfolder="..\\b"),
        changed(0, subfolder="C:/b"),
        changed(0, subfolder=""),
        changed(0, subfolder=None),
        changed(0, sigma_max=0.9),
        changed(0, sigma_min="0"),
        changed(0, sigma_min=None),
        changed(0, sigma_min=-1),
        changed(1, sigma_max=80),
        changed(1, guidance="high"),
        changed(1, guidance=True),
        changed(1, name="low"),
        changed(1, name="a/b"),
        changed(1, name=7),
        changed(1, sha256="abc"),
        changed(1, parent=3),
        changed(1, parent="high"),
        changed(0, parent="high"),
        changed(1, code="import os"),
    ],
)
def test_bad_experts_json(tmp_path, content):
    (tmp_path / "experts.json").write_text(json.dumps(content))
    with pytest.raises(ModelError) as raised:
        read_experts(tmp_path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("text", ["", "{", '{"version": 1, "experts": [{"name": "a", "subfolder": "u", "sigma_min": NaN}]}'])
def test_damaged_experts_json(tmp_path, text):
    (tmp_path / "experts.json").write_text(text)
    with pytest.raises(ModelError):
        read_experts(tmp_path)


def test_what_could_not_be_read_is_not_written(tmp_path):
    with pytest.raises(ModelError, match="gap"):
        write_experts(tmp_path, [ExpertEntry("a", "unet", 0, 1), ExpertEntry("b", "unet_2", 2)])
    assert not list(tmp_path.iterdir())

"""Experts come from disk when needed, go when left, and compute the same either way."""

import json
import threading
import time
import weakref
from functools import partial

import pytest
import torch
from safetensors.torch import save_file
from tu_diffuse.contracts import Conditioning
from tu_diffuse.errors import ModelError
from tu_diffuse.model_files import weights_sha256
from tu_diffuse.unet.experts import ExpertEntry
from tu_diffuse.unet.residency import ExpertPool, expert_pool, load_expert, parked
from unet_configs import inputs, random_unet

ENTRIES = (
    ExpertEntry("low", "low", 0.0, 0.5),
    ExpertEntry("middle", "middle", 0.5, 3.0),
    ExpertEntry("high", "high", 3.0, guidance=2.0),
)
SIGMAS = (14.0, 9.0, 5.0, 3.1, 2.9, 1.5, 0.9, 0.6, 0.4, 0.2)


def told(sigma):
    return 60 * sigma


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("ensemble")
    for seed, entry in enumerate(ENTRIES):
        unet = random_unet("embedded", seed)
        (root / entry.subfolder).mkdir()
        (root / entry.subfolder / "config.json").write_text(json.dumps(unet.config.to_dict()))
        save_file(unet.state_dict(), root / entry.subfolder / "diffusion_pytorch_model.safetensors")
    return root


class Watched:
    """Loaders that remember, weakly, every network they made, and the most that were alive at once."""

    def __init__(self, folder, delay=0.0):
        self.made, self.most, self.threads, self.delay = [], 0, set(), delay
        self.loaders = {entry.name: partial(self.load, folder / entry.subfolder, entry.name) for entry in ENTRIES}

    def load(self, path, name):
        self.threads.add(threading.current_thread().name)
        time.sleep(self.delay)
        denoiser = load_expert(path, "v_prediction", told)
        self.made.append((name, weakref.ref(denoiser.unet)))
        self.most = max(self.most, len(self.alive()))
        return denoiser

    def alive(self):
        return [name for name, ref in self.made if ref() is not None]


def run(pool):
    """A crude sampler from the highest sigma to the lowest; returns every x0."""
    given = inputs("embedded")
    prompt, experts = Conditioning(given["tokens"], pooled=given["pooled"]), pool.table(told)
    x, seen = given["x"] * SIGMAS[0], []
    for sigma, following in zip(SIGMAS, (*SIGMAS[1:], 0.0), strict=True):
        x0 = experts(x, torch.full((2,), sigma), prompt)
        x = x0 + (x - x0) * following / sigma
        seen.append(x0)
    return torch.stack(seen)


def test_active_keeps_two_at_most_and_computes_the_same(folder):
    every, few = Watched(folder), Watched(folder)
    with_all = ExpertPool(ENTRIES, every.loaders, keep="all")
    with_active = ExpertPool(ENTRIES, few.loaders, keep="active")
    expected = run(with_all)
    assert expected.std() > 0.1
    assert torch.equal(run(with_active), expected)
    assert few.most <= 2
    assert few.alive() == ["low"]
    assert with_active.held == ("low",)
    assert sorted(every.alive()) == ["high", "low", "middle"]
    # A second run begins at the top again; with "all" nothing is loaded twice.
    assert torch.equal(run(with_all), expected)
    assert torch.equal(run(with_active), expected)
    assert (len(every.made), len(few.made)) == (3, 6)
    assert few.most <= 2


def test_nothing_is_loaded_before_it_is_needed(folder):
    watched = Watched(folder)
    pool = ExpertPool(ENTRIES, watched.loaders)
    experts, given = pool.table(told), inputs("embedded")
    prompt = Conditioning(given["tokens"], pooled=given["pooled"])
    assert watched.made == []
    experts(given["x"], torch.full((2,), 14.0), prompt)
    assert watched.alive() == ["high"]
    experts(given["x"], torch.full((2,), 5.0), prompt)
    assert pool.held == ("high", "middle")
    assert pool.get("high") is not None
    assert pool.held == ("high", "middle")
    pool._held["middle"].result()
    assert watched.alive() == ["high", "middle"]
    pool.get("middle")
    assert watched.alive() == ["middle"]
    assert experts.expert_for(5.0).guidance == 2.0


def test_prefetch_returns_at_once_and_loads_on_another_thread(folder):
    watched = Watched(folder, delay=0.3)
    pool = ExpertPool(ENTRIES, watched.loaders)
    start = time.perf_counter()
    pool.prefetch("low")
    pool.prefetch("low")
    assert time.perf_counter() - start < 0.2
    assert pool.get("low").unet is pool.get("low").unet
    assert len(watched.made) == 1
    assert threading.current_thread().name not in watched.threads


def test_a_prefetch_that_was_wrong_is_let_go(folder):
    watched = Watched(folder)
    pool = ExpertPool(ENTRIES, watched.loaders)
    pool.get("high")
    for name in ("middle", "low", "middle"):
        pool.prefetch(name)
    pool.get("middle")
    assert pool.held == ("middle",)
    assert watched.most <= 3  # the active one, the abandoned one, and the one that is just being made
    assert watched.alive() == ["middle"]


def test_prompts_are_remembered_through_a_run(folder):
    pool, given = ExpertPool(ENTRIES, Watched(folder).loaders, keep="all"), inputs("embedded")
    prompt = Conditioning(given["tokens"], pooled=given["pooled"])
    for _ in range(2):
        experts = pool.table(told)
        for sigma in (14.0, 5.0):
            experts(given["x"], torch.full((2,), sigma), prompt)
    denoiser = pool.get("high")
    assert len(denoiser._prompts) == 1


def test_a_failed_load_is_told_each_time_and_can_be_tried_again(folder):
    attempts = []

    def flaky():
        attempts.append(1)
        if len(attempts) < 3:
            raise ModelError("not yet")
        return load_expert(folder / "low", "v_prediction", told)

    pool = ExpertPool(ENTRIES[:1], {"low": flaky})
    pool.prefetch("low")
    for _ in range(2):
        with pytest.raises(ModelError, match="not yet"):
            pool.get("low")
    assert pool.get("low") is not None


def test_the_pool_of_a_folder_checks_the_hashes(folder):
    sound = ExpertEntry("low", "low", sha256=weights_sha256(folder / "low"))
    swapped = ExpertEntry("low", "low", sha256=weights_sha256(folder / "high"))
    assert expert_pool(folder, [sound], "v_prediction", told).get("low").prediction_type == "v_prediction"
    with pytest.raises(ModelError, match="SHA-256"):
        expert_pool(folder, [swapped], "v_prediction", told).get("low")


def test_loaded_weights_are_those_of_the_file_and_frozen(folder):
    unet, expected = load_expert(folder / "low", "v_prediction", told).unet, random_unet("embedded", 0)
    assert all(torch.equal(a, b) for a, b in zip(unet.parameters(), expected.parameters(), strict=True))
    assert not unet.training
    assert not any(p.requires_grad for p in unet.parameters())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_parked_experts_compute_the_same_on_cuda(folder):
    loaders = {e.name: parked(partial(load_expert, folder / e.subfolder, "v_prediction", told), "cuda") for e in ENTRIES}
    given = {name: tensor.cuda() for name, tensor in inputs("embedded").items()}
    prompt = Conditioning(given["tokens"], pooled=given["pooled"])
    pool, resident = ExpertPool(ENTRIES, loaders), expert_pool(folder, ENTRIES, "v_prediction", told, device="cuda", keep="all")
    for sigma in (5.0, 2.0, 0.2, 5.0):
        levels = torch.full((2,), sigma, device="cuda")
        assert torch.equal(pool.table(told)(given["x"], levels, prompt), resident.table(told)(given["x"], levels, prompt))
    assert loaders["low"]().unet.conv_in.weight.is_cuda


def test_no_thread_outlives_its_load(folder):
    """Its OpenMP threads would make those that compute sleep at every barrier."""
    pool = ExpertPool(ENTRIES, Watched(folder).loaders, "active")
    pool.get("high")
    pool.prefetch("middle")
    pool.get("middle")
    loading = [thread for thread in threading.enumerate() if thread.name.startswith("expert")]
    for thread in loading:
        thread.join(10)
    assert not [thread for thread in loading if thread.is_alive()]

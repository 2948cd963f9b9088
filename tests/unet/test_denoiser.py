"""The adapters against their closed forms, and the memory of prompts."""

import gc
import math
import weakref
from dataclasses import replace

import pytest
import torch
from tu_diffuse.contracts import Conditioning
from tu_diffuse.errors import ModelError
from tu_diffuse.unet.config import UNetConfig
from tu_diffuse.unet.denoiser import UNetDenoiser
from tu_diffuse.unet.unet import UNet
from unet_configs import FAMILIES, inputs, random_unet


def conditioning(family: str, **changes) -> Conditioning:
    given = inputs(family)
    return Conditioning(**({"tokens": given["tokens"], "pooled": given.get("pooled"), "size_ids": given.get("size_ids")} | changes))


class Ideal(UNet):
    """A network that knows x0 and answers as the prediction type asks."""

    def __init__(self, prediction_type, x0, sigma):
        super().__init__(UNetConfig.from_dict(FAMILIES["sd1"]))
        self.kind, self.x0, self.sigma = prediction_type, x0, sigma.view(-1, 1, 1, 1)

    def forward(self, x, t, keys_values, *rest):
        # x arrives as sqrt(abar)·x0 + sqrt(1 − abar)·n with abar = 1/(sigma² + 1).
        abar = 1 / (self.sigma**2 + 1)
        noise = (x - abar.sqrt() * self.x0) / (1 - abar).sqrt()
        return {"epsilon": noise, "v_prediction": abar.sqrt() * noise - (1 - abar).sqrt() * self.x0, "sample": self.x0}[self.kind]


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_an_ideal_network_gives_x0_back(kind):
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(3, 4, 8, 8, generator=generator), torch.randn(3, 4, 8, 8, generator=generator)
    sigma = torch.tensor([0.03, 1.0, 14.6])
    denoise = UNetDenoiser(Ideal(kind, x0, sigma), kind, lambda s: s)
    prompt = Conditioning(torch.zeros(3, 2, 24))
    assert (denoise(x0 + sigma.view(-1, 1, 1, 1) * noise, sigma, prompt) - x0).abs().max() <= 2e-5


@pytest.mark.parametrize(
    ("kind", "closed_form"),
    [
        ("epsilon", lambda x, out, s: x - s * out),
        ("v_prediction", lambda x, out, s: x / (s**2 + 1) - out * s / math.sqrt(s**2 + 1)),
        ("sample", lambda x, out, s: out),
    ],
)
def test_closed_forms_around_a_real_network(kind, closed_form):
    unet, prompt = random_unet("embedded"), conditioning("embedded")
    x = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(3)) * 5
    told = []
    denoise = UNetDenoiser(unet, kind, lambda sigma: told.append(sigma.tolist()) or 100 * sigma)
    got = denoise(x, torch.tensor([2.5, 0.5]), prompt)
    assert told == [[2.5, 0.5]]
    for row, s in enumerate((2.5, 0.5)):
        one = slice(row, row + 1)
        out = unet(x[one] / math.sqrt(s**2 + 1), torch.tensor([100 * s]), unet.text_keys_values(prompt.tokens[one]), pooled=prompt.pooled[one])
        assert (got[one] - closed_form(x[one], out, s)).abs().max() <= 1e-5


def test_pooled_and_size_ids_matter():
    for family, name in (("embedded", "pooled"), ("sdxl", "pooled"), ("sdxl", "size_ids"), ("refiner", "size_ids")):
        denoise = UNetDenoiser(random_unet(family), "epsilon", lambda s: 100 * s)
        x, sigma = inputs(family)["x"], torch.ones(2)
        plain = denoise(x, sigma, conditioning(family))
        assert (plain - denoise(x, sigma, conditioning(family, **{name: getattr(conditioning(family), name) * 2}))).abs().max() > 1e-3


def test_text_is_computed_once_per_conditioning_and_forgotten_with_it(monkeypatch):
    unet, calls = random_unet("embedded"), []
    original = unet.text_keys_values
    monkeypatch.setattr(unet, "text_keys_values", lambda tokens: calls.append(1) or original(tokens))
    denoise = UNetDenoiser(unet, "v_prediction", lambda s: 100 * s)
    x, sigma = inputs("embedded")["x"], torch.ones(2)
    prompt, other = conditioning("embedded"), conditioning("embedded", tokens=torch.randn(2, 9, 24))
    first = denoise(x, sigma, prompt)
    assert torch.equal(first, denoise(x, sigma, prompt))
    assert torch.equal(first, replace(denoise, to_timestep=lambda s: 100 * s)(x, sigma, prompt))
    assert len(calls) == 1
    assert not torch.equal(first, denoise(x, sigma, other))
    assert torch.equal(first, denoise(x, sigma, prompt))
    assert len(calls) == 2
    alive = [weakref.ref(denoise._prompts[p].keys_values[0][0]) for p in (prompt, other)]
    del prompt
    gc.collect()
    assert [ref() is None for ref in alive] == [True, False]


def test_mask_that_hides_nothing_is_dropped_and_one_that_hides_counts():
    unet, x, sigma = random_unet("embedded"), inputs("embedded")["x"], torch.ones(2)
    denoise = UNetDenoiser(unet, "epsilon", lambda s: 100 * s)
    full = conditioning("embedded", mask=torch.ones(2, 7, dtype=torch.bool))
    half = conditioning("embedded", mask=torch.arange(7).expand(2, 7) < 3)
    assert torch.equal(denoise(x, sigma, full), denoise(x, sigma, conditioning("embedded")))
    assert denoise._prompts[full].mask is None
    assert not torch.allclose(denoise(x, sigma, half), denoise(x, sigma, full))


def test_a_half_network_is_surrounded_by_float32():
    unet = random_unet("embedded")
    x, sigma, prompt = inputs("embedded")["x"] * 100, torch.tensor([0.01, 80.0]), conditioning("embedded")
    exact = UNetDenoiser(unet, "epsilon", lambda s: s)(x, sigma, prompt)
    half = UNetDenoiser(random_unet("embedded").to(torch.bfloat16), "epsilon", lambda s: s)(x, sigma, prompt)
    assert half.dtype == torch.float32
    # At sigma 0.01 the network's share is 1e-2 of its rounding error; x itself must pass unrounded.
    assert (half[0] - exact[0]).abs().max() < 2e-3


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("embedded", {"tokens": torch.zeros(2, 7, 23)}, "width 23"),
        ("embedded", {"pooled": None}, "pooled"),
        ("embedded", {"pooled": torch.zeros(2, 19)}, "19"),
        ("sdxl", {"size_ids": None}, "size ids"),
        ("sdxl", {"size_ids": torch.zeros(2, 5)}, "20 \\+ 40"),
    ],
)
def test_conditioning_that_does_not_fit(family, changes, message):
    denoise = UNetDenoiser(random_unet(family), "epsilon", lambda s: s)
    with pytest.raises(ModelError, match=message):
        denoise(inputs(family)["x"], torch.ones(2), conditioning(family, **changes))


def test_a_plain_network_ignores_pooled_text():
    denoise, x = UNetDenoiser(random_unet("sd1"), "epsilon", lambda s: s), inputs("sd1")["x"]
    with_pooled = denoise(x, torch.ones(2), conditioning("sd1", pooled=torch.ones(2, 20)))
    assert torch.equal(with_pooled, denoise(x, torch.ones(2), conditioning("sd1")))


def test_unknown_prediction_type():
    with pytest.raises(ModelError, match="flow"):
        UNetDenoiser(random_unet("sd1"), "flow", lambda s: s)


def test_recorder_reaches_the_network():
    seen = []
    denoise = UNetDenoiser(random_unet("embedded"), "epsilon", lambda s: s, recorder=lambda name, query, key: seen.append(name))
    denoise(inputs("embedded")["x"], torch.ones(2), conditioning("embedded"))
    assert len(seen) == 7

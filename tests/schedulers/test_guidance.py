"""Guidance on closed forms, against diffusers' functions, and by counting network calls."""

import gc
import math

import pytest
import torch
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from tu_diffuse.contracts import Conditioning
from tu_diffuse.errors import UsageError
from tu_diffuse.schedulers.guidance import Apg, Guidance, GuidedDenoiser, expert_scale, join_conditionings, piecewise_scale, rescaled

SHAPE = (2, 4, 6, 6)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Network:
    """x0 that depends on each row's conditioning; remembers the batch sizes and conditionings it saw."""

    def __init__(self):
        self.batches = []
        self.conditionings = []

    def __call__(self, x, sigma, conditioning):
        self.batches.append(len(x))
        self.conditionings.append(conditioning)
        mask = torch.ones(conditioning.tokens.shape[:2]) if conditioning.mask is None else conditioning.mask
        pull = (conditioning.tokens.mean(-1) * mask).sum(-1).view(-1, 1, 1, 1)
        return torch.tanh(x * 0.5 + pull * x.cos()) + 0.1 * sigma.view(-1, 1, 1, 1)


COND = Conditioning(tokens=randn(2, 5, 8, seed=1))
NEGATIVE = Conditioning(tokens=randn(2, 5, 8, seed=2))
X = randn(*SHAPE, seed=3) * 2
SIGMA = torch.full((2,), 1.7)


def pair():
    network = Network()
    return network(X, SIGMA, COND), network(X, SIGMA, NEGATIVE)


def guided(guidance, x=X, sigma=SIGMA, cond=COND, negative=NEGATIVE):
    return GuidedDenoiser(Network(), guidance, negative)(x, sigma, cond)


@pytest.mark.parametrize("scale", [0.0, 3.0, 7.5, -1.0])
def test_code_form_and_paper_form(scale):
    cond, uncond = pair()
    w = scale - 1
    torch.testing.assert_close(guided(Guidance(scale)), uncond + scale * (cond - uncond))
    torch.testing.assert_close(guided(Guidance(scale)), (1 + w) * cond - w * uncond)
    assert not torch.allclose(cond, uncond, atol=1e-2)


@pytest.mark.parametrize("space", ["epsilon", "v_prediction"])
def test_plain_guidance_is_the_same_in_every_space(space):
    cond, uncond = pair()
    s = 1.7
    out = (lambda x0: (X - x0) / s) if space == "epsilon" else (lambda x0: (X / (1 + s**2) - x0) * math.sqrt(1 + s**2) / s)
    mixed = out(uncond) + 5 * (out(cond) - out(uncond))
    torch.testing.assert_close(out(guided(Guidance(5.0))), mixed, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("phi", [0.3, 0.7, 1.0])
@pytest.mark.parametrize("space", ["epsilon", "v_prediction", "sample"])
def test_rescale_equals_diffusers_in_the_networks_space(space, phi):
    cond, uncond = pair()
    s = 1.7
    out = {
        "epsilon": lambda x0: (X - x0) / s,
        "v_prediction": lambda x0: (X / (1 + s**2) - x0) * math.sqrt(1 + s**2) / s,
        "sample": lambda x0: x0,
    }[space]
    expected = rescale_noise_cfg(out(uncond) + 5 * (out(cond) - out(uncond)), out(cond), phi)
    mine = guided(Guidance(5.0, rescale=phi, rescale_space=space))
    torch.testing.assert_close(out(mine), expected, atol=1e-5, rtol=1e-5)


def test_rescale_depends_on_the_space():
    spaces = [guided(Guidance(5.0, rescale=0.7, rescale_space=space)) for space in ("epsilon", "v_prediction", "sample")]
    assert not torch.allclose(spaces[0], spaces[1], atol=1e-2)
    assert not torch.allclose(spaces[1], spaces[2], atol=1e-2)


def test_full_rescale_in_x0_restores_the_deviation():
    cond, uncond = pair()
    out = rescaled(uncond + 9 * (cond - uncond), cond, X, SIGMA, 1.0, "sample")
    torch.testing.assert_close(out.std((1, 2, 3)), cond.std((1, 2, 3)))


@pytest.mark.parametrize("apg", [Apg(), Apg(eta=0.5, norm_cap=2.0, momentum=0.0), Apg(eta=1.0, norm_cap=None, momentum=0.3)])
def test_apg_is_the_papers(apg):
    """diffusers' function in its original formulation, with scale s − 1, is the paper's; two calls exercise the momentum."""
    cond, uncond = pair()
    wrapped = GuidedDenoiser(Network(), Guidance(6.0, apg=apg), NEGATIVE)
    buffer = MomentumBuffer(apg.momentum)
    cap = 0.0 if apg.norm_cap is None else apg.norm_cap
    for _ in range(2):
        expected = normalized_guidance(cond, uncond, 5.0, buffer, apg.eta, cap, use_original_formulation=True)
        torch.testing.assert_close(wrapped(X, SIGMA, COND), expected, atol=1e-5, rtol=1e-5)


def test_apg_closed_forms():
    cond, uncond = pair()
    plain = guided(Guidance(6.0, apg=Apg(eta=1.0, norm_cap=None, momentum=0.0)))
    torch.testing.assert_close(plain, uncond + 6 * (cond - uncond), atol=1e-5, rtol=1e-5)
    update = (guided(Guidance(6.0, apg=Apg(eta=0.0, norm_cap=None, momentum=0.0))) - cond).double()
    cosine = (update * cond.double()).sum((1, 2, 3)) / (update.flatten(1).norm(dim=1) * cond.double().flatten(1).norm(dim=1))
    assert float(cosine.abs().max()) < 1e-5
    capped = guided(Guidance(6.0, apg=Apg(eta=1.0, norm_cap=0.5, momentum=0.0))) - cond
    torch.testing.assert_close(capped.flatten(1).norm(dim=1), torch.full((2,), 2.5), atol=1e-4, rtol=0)


def test_momentum_belongs_to_one_instance():
    guidance = Guidance(6.0, apg=Apg(momentum=-0.5))
    wrapped = GuidedDenoiser(Network(), guidance, NEGATIVE)
    first, second = wrapped(X, SIGMA, COND), wrapped(X, SIGMA, COND)
    assert not torch.allclose(first, second, atol=1e-3)
    assert torch.equal(GuidedDenoiser(Network(), guidance, NEGATIVE)(X, SIGMA, COND), first)


def test_outside_the_interval_there_is_no_second_pass():
    network = Network()
    wrapped = GuidedDenoiser(network, Guidance(7.5, interval=(0.28, 5.42)), NEGATIVE)
    for sigma in (14.6, 5.43, 5.42, 1.0, 0.29, 0.28, 0.05):
        wrapped(X, torch.full((2,), sigma, dtype=torch.float64), COND)
    assert network.batches == [2, 2, 4, 4, 4, 2, 2]


def test_scale_one_makes_no_second_pass():
    network = Network()
    out = GuidedDenoiser(network, Guidance(1.0), NEGATIVE)(X, SIGMA, COND)
    assert network.batches == [2]
    assert network.conditionings == [COND]
    assert torch.equal(out, pair()[0])


def test_scales_of_rows():
    cond, uncond = pair()
    out = guided(Guidance(torch.tensor([1.0, 7.0])))
    assert torch.equal(out[0], cond[0])
    torch.testing.assert_close(out[1], (uncond + 7 * (cond - uncond))[1])
    with pytest.raises(UsageError):
        guided(Guidance(torch.tensor([1.0, 7.0, 3.0])))


def test_rows_at_different_sigmas():
    sigma = torch.tensor([9.0, 1.0])
    out = guided(Guidance(5.0, interval=(0.5, 2.0)), sigma=sigma)
    network = Network()
    cond, uncond = network(X, sigma, COND), network(X, sigma, NEGATIVE)
    assert torch.equal(out[0], cond[0])
    torch.testing.assert_close(out[1], (uncond + 5 * (cond - uncond))[1])


def test_scale_as_a_function_of_sigma():
    table = piecewise_scale([(10.0, 2.0), (1.0, 8.0)])
    assert [table(s) for s in (0.1, 1.0, 5.5, 10.0, 14.0)] == [8.0, 8.0, 5.0, 2.0, 2.0]
    assert piecewise_scale([(3.0, 4.0)])(100.0) == 4.0
    cond, uncond = pair()
    torch.testing.assert_close(guided(Guidance(piecewise_scale([(0.0, 0.0), (3.4, 10.0)]))), uncond + 5 * (cond - uncond), atol=1e-5, rtol=1e-5)
    for bad in ([], [(1.0, 2.0), (1.0, 3.0)]):
        with pytest.raises(UsageError):
            piecewise_scale(bad)


def test_scale_of_experts():
    scale = expert_scale([(0.0, 4.0, 3.0), (4.0, 9.0, None), (9.0, 20.0, 6.0)], default=5.0)
    assert [scale(s) for s in (0.5, 4.0, 8.9, 9.0, 30.0)] == [3.0, 5.0, 5.0, 6.0, 5.0]


def test_dynamic_threshold():
    out = guided(Guidance(30.0, threshold=0.9))
    plain = guided(Guidance(30.0))
    for row in range(2):
        limit = max(1.0, float(torch.quantile(plain[row].abs().flatten(), 0.9)))
        assert limit > 1
        torch.testing.assert_close(out[row], plain[row].clamp(-limit, limit) / limit)
    small = GuidedDenoiser(lambda x, sigma, conditioning: x * 0.01, Guidance(1.0, threshold=0.9), NEGATIVE)(X, SIGMA, COND)
    torch.testing.assert_close(small, X * 0.01)
    unguided = GuidedDenoiser(lambda x, sigma, conditioning: x, Guidance(1.0, threshold=0.9), NEGATIVE)(X, SIGMA, COND)
    assert float(unguided.abs().max()) <= 1


def test_joined_conditioning_is_made_once_and_let_go():
    network = Network()
    wrapped = GuidedDenoiser(network, Guidance(5.0), NEGATIVE)
    cond = Conditioning(tokens=COND.tokens.clone())
    wrapped(X, SIGMA, cond)
    wrapped(X, SIGMA, cond)
    assert network.conditionings[0] is network.conditionings[1]
    assert len(wrapped._joined) == 1
    del cond
    gc.collect()
    assert len(wrapped._joined) == 0


def test_joining_pads_and_masks():
    short = Conditioning(tokens=randn(1, 3, 8, seed=5), pooled=randn(1, 6), size_ids=randn(1, 6))
    long = Conditioning(
        tokens=randn(2, 5, 8, seed=6), mask=torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]]).bool(), pooled=randn(2, 6), size_ids=randn(2, 6)
    )
    joined = join_conditionings(short, long)
    assert joined.tokens.shape == (4, 5, 8)
    assert joined.mask.tolist() == [[True] * 3 + [False] * 2] * 2 + long.mask.tolist()
    assert torch.equal(joined.tokens[1, :3], short.tokens[0])
    assert float(joined.tokens[:2, 3:].abs().sum()) == 0
    assert joined.pooled.shape == (4, 6)
    assert torch.equal(joined.size_ids[2:], long.size_ids)
    assert join_conditionings(COND, NEGATIVE).mask is None


def test_padding_does_not_change_the_prediction():
    short = Conditioning(tokens=NEGATIVE.tokens[:, :3])
    cond, uncond = Network()(X, SIGMA, COND), Network()(X, SIGMA, short)
    torch.testing.assert_close(guided(Guidance(5.0), negative=short), uncond + 5 * (cond - uncond), atol=1e-5, rtol=1e-5)


def test_joining_refuses_what_does_not_fit():
    with pytest.raises(UsageError):
        join_conditionings(Conditioning(tokens=randn(3, 5, 8)), COND)
    with pytest.raises(UsageError):
        join_conditionings(Conditioning(tokens=randn(2, 5, 8), pooled=randn(2, 4)), COND)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Guidance(interval=(2.0, 1.0)),
        lambda: Guidance(interval=(-1.0, 1.0)),
        lambda: Guidance(rescale=1.5),
        lambda: Guidance(rescale_space="score"),
        lambda: Guidance(threshold=0.0),
        lambda: Guidance(float("nan")),
        lambda: Apg(norm_cap=0.0),
        lambda: Apg(momentum=1.0),
    ],
)
def test_refusals(make):
    with pytest.raises(UsageError):
        make()


def test_a_row_alone_equals_a_row_in_a_batch():
    """Rescale, APG and threshold measure each row by itself."""
    guidance = Guidance(6.0, rescale=0.5, apg=Apg(), threshold=0.95)
    together = guided(guidance)
    for row in range(2):
        one = slice(row, row + 1)
        alone = guided(guidance, X[one], SIGMA[one], Conditioning(tokens=COND.tokens[one]), Conditioning(tokens=NEGATIVE.tokens[one]))
        torch.testing.assert_close(alone[0], together[row], atol=1e-6, rtol=1e-6)

"""Where to fork an expert: what two specialists could gain over one network, measured for every border between bins of noise.

One network follows the mean gradient of its loss over all the noise levels that it owns. Where bins of noise pull the same weights in different
directions, part of every pull is lost; two specialists lose less of it. With w_b the share of timesteps in bin b, g_b the gradient of the loss
there, and W, ḡ the summed weight and the weighted mean gradient of the bins below (L) and above (H) a border, a small step of size η lowers the
loss by η·‖W_L ḡ_L + W_H ḡ_H‖² for one network, and by η·(W_L ‖ḡ_L‖² + W_H ‖ḡ_H‖²) for two. The difference,

    η · W_L W_H ‖ḡ_L − ḡ_H‖²,

is what a border could gain, and the border where it is largest is proposed. This is the criterion by which Ward (1963) splits clusters and Otsu
(1979) an image's histogram, put on gradients. Lengths are those that AdamW's step gives them: each coordinate is divided by the fourth root of its
mean squared gradient v, so that ‖g‖² = Σ g²/√v.

It is a first-order measure at the weights of this moment, for the plain loss of all timesteps alike. It does not say how far a specialist would
get in a long training, and in a network that has learned little yet all bins agree, so measure after training rather than before.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import ModelError, UsageError
from ..pipeline.model.folder import ModelFolder
from ..shards.index import ShardIndex
from .encoded import open_source, stored_encoding
from .intervals import expert_of, first_timestep
from .loop import generator_for
from .objective import Draw, Objective, denoising_loss
from .subject import load_subject, predictor, read_as

FOLDS = 8  # independent sets of pictures: products of gradients of different folds have no bias from sampling, and leaving each out shows the spread
_COORDINATES = 1 << 18  # of the gradient, drawn at random; all that is kept of it

Batch = tuple[float, Callable[[int], Tensor]]
"""Its share of a fold's pictures, and its loss in a bin, with the graph."""


@dataclass(frozen=True)
class Suggestion:
    """Where to fork.

    Attributes:
        expert: which one was measured.
        samples: pictures used.
        edges: timesteps at which bins begin, and the end of the last.
        losses: mean squared error in each bin.
        gains: for each border between two bins what it gains, as a share of what a network for each bin would; 0 to 1 but for sampling error.
        error: standard error of the largest of them, from leaving out each fold.
        timestep: the border of the largest gain; None when that is not above twice its error.
        lowest: lowest border of the largest gain when a fold is left out; None as above.
        highest: the highest of these.
    """

    expert: str
    samples: int
    edges: tuple[int, ...]
    losses: tuple[float, ...]
    gains: tuple[float, ...]
    error: float
    timestep: int | None
    lowest: int | None
    highest: int | None


def suggest_boundary(
    folder: ModelFolder,
    index: ShardIndex,
    *,
    expert: str | None = None,
    bins: int = 16,
    samples: int = 64,
    batch_size: int = 8,
    seed: int = 0,
    device: torch.device | None = None,
    report: Callable[[str], None] = lambda text: None,  # noqa: ARG005
) -> Suggestion:
    """Measure an expert's loss and gradient in bins of equally many timesteps, and propose the border between two of them.

    Every bin sees the same pictures, captions and noise, so that bins differ in noise level only.

    Args:
        folder: the model.
        index: of the shards.
        expert: which one; may be None when there is one only.
        bins: at least 2; borders lie between them.
        samples: pictures drawn, rounded down to a multiple of FOLDS.
        batch_size: pictures a backward pass; changes the result by rounding only.
        seed: of pictures and noise.
        device: of the networks; the CPU by default.
        report: told of progress.

    Raises:
        UsageError: no such expert, fewer timesteps than bins, fewer pictures than `samples`, or shards that were encoded for another model.
        ModelError: weights that cannot be loaded, or a loss that is not finite.
    """
    entry = expert_of(folder, expert)
    first, end = (first_timestep(folder.noise, sigma) for sigma in (entry.sigma_min, entry.sigma_max))
    if not 2 <= bins <= end - first:
        raise UsageError(f"--bins {bins} does not fit the expert {entry.name!r}, which owns {end - first} timesteps; give a number from 2 to that.")
    each = samples // FOLDS
    if not FOLDS <= each * FOLDS <= len(index.samples):
        raise UsageError(f"--samples {samples} was asked for and the shards hold {len(index.samples)}; give a number from {FOLDS} to that.")
    edges = tuple(first + round(number * (end - first) / bins) for number in range(bins + 1))
    where = torch.device("cpu") if device is None else device
    size = (folder.defaults.width, folder.defaults.height)
    subject = load_subject(folder, entry.name, where)
    reading, text = read_as(folder, entry.name)
    source = open_source(reading, index, stored_encoding(folder, index, size[0], buckets=False), where, text)
    objective = Objective(sigmas=folder.noise.sigmas, t_min=first, t_max=end, prediction_type=folder.noise.prediction_type)
    chosen = torch.randperm(len(index.samples), generator=generator_for(seed, 0)).tolist()

    def batch(numbers: Sequence[int], places: Tensor) -> Batch:
        """`places` in [0, 1) say where in a bin each picture's timestep lies."""
        generators = [generator_for(seed, 1 + number) for number in numbers]
        seen = source.batch([source.read(number, size, None) for number in numbers], generators)
        noise = torch.cat([torch.randn((1, *seen.latents.shape[1:]), generator=generator) for generator in generators]).to(where)
        kept = torch.ones(len(numbers), dtype=torch.bool)
        said = seen.said(Draw(torch.zeros(len(numbers), dtype=torch.int64), noise, kept, kept))

        def loss_in(bin: int) -> Tensor:
            t = edges[bin] + (places * (edges[bin + 1] - edges[bin])).long().to(where)
            return denoising_loss(predictor(subject, entry.name, lambda _: said), objective, seen.latents, Draw(t, noise, kept, kept))["loss"]

        return len(numbers) / each, loss_in

    def fold(number: int) -> Iterable[Batch]:
        report(f"fold {number + 1} of {FOLDS}: {each} pictures in each of {bins} bins")
        numbers = chosen[number * each : (number + 1) * each]
        places = (torch.randperm(each, generator=generator_for(seed, (1 << 36) + number)) + 0.5) / each
        for start in range(0, each, batch_size):
            yield batch(numbers[start : start + batch_size], places[start : start + batch_size])

    parameters = list(subject.unets[entry.name].parameters())
    losses, products = measure(parameters, [fold(number) for number in range(FOLDS)], bins, seed)
    shares = torch.tensor(edges).diff() / (end - first)
    gains = border_gains(products, shares)
    best = int(gains.argmax())
    others = [[other for other in range(FOLDS) if other != left] for left in range(FOLDS)]
    left_out = torch.stack([border_gains(products[some][:, some], shares) for some in others])
    error = ((FOLDS - 1) * left_out[:, best].var(correction=0)).sqrt()  # jackknife (Efron & Stein 1981)
    found = bool(gains[best] > 2 * error)
    places = left_out.argmax(dim=1).tolist()
    return Suggestion(
        expert=entry.name,
        samples=each * FOLDS,
        edges=edges,
        losses=tuple(losses.tolist()),
        gains=tuple(gains.tolist()),
        error=float(error),
        timestep=edges[1 + best] if found else None,
        lowest=edges[1 + min(places)] if found else None,
        highest=edges[1 + max(places)] if found else None,
    )


def measure(parameters: Sequence[nn.Parameter], folds: Sequence[Iterable[Batch]], bins: int, seed: int) -> tuple[Tensor, Tensor]:
    """Loss and gradient of every bin.

    Args:
        parameters: of the network.
        folds: the batches of each.
        bins: how many.
        seed: of the coordinates that are kept of the gradient.

    Returns:
        The losses (bins,), and (folds, folds, bins, bins) products of the gradient of one fold in one bin with that of the other fold in the other
        bin, in the module's units, from about 2^18 of their coordinates; float64.

    Raises:
        ModelError: a loss or gradient is not finite.
    """
    share = min(1.0, _COORDINATES / sum(p.numel() for p in parameters))
    generator = generator_for(seed, 1 << 37)
    kept = [_places(p.numel(), share, generator).to(p.device) for p in parameters]
    scale = torch.cat([torch.full((len(places),), (p.numel() / len(places)) ** 0.5) for p, places in zip(parameters, kept, strict=True)])
    sums = torch.zeros(bins, dtype=torch.float64)
    gradients = torch.zeros(len(folds), bins, len(scale))
    for fold, batches in enumerate(folds):
        for part, loss_in in batches:
            for bin in range(bins):
                loss = loss_in(bin)
                sums[bin] += part * loss.item() / len(folds)
                found = torch.autograd.grad(loss, parameters)
                gradients[fold, bin] += part * torch.cat([g.flatten()[places].float().cpu() for g, places in zip(found, kept, strict=True)])
    if not bool(gradients.isfinite().all()):
        raise ModelError("The loss or its gradient is not finite on these pictures, so there is nothing to compare; check the model and the shards.")
    root = gradients.square().mean(dim=(0, 1)).sqrt()
    vectors = (gradients * scale * torch.where(root > 0, root, 1).rsqrt()).flatten(0, 1).double()
    return sums, (vectors @ vectors.T).unflatten(1, (len(folds), bins)).unflatten(0, (len(folds), bins)).transpose(1, 2)


def _places(count: int, share: float, generator: torch.Generator) -> Tensor:
    """All places of a tensor of `count` elements, or a random share of them, at least one."""
    return torch.arange(count) if share == 1 else torch.randint(count, (max(1, round(count * share)),), generator=generator)


def border_gains(products: Tensor, shares: Tensor) -> Tensor:
    """What each border gains, see the module, as a share of what a network for every bin would gain.

    Args:
        products: (folds, folds, bins, bins) from `measure`, two folds or more.
        shares: (bins,), of the timesteps.

    Returns:
        (bins - 1,) float64; negative values are sampling error. Zeros where no bin differs from the others by more than that.
    """
    share, folds = shares.double(), len(products)
    same = products.diagonal().sum(dim=-1)
    product = (products.sum(dim=(0, 1)) - same) / (folds * (folds - 1))  # (bins, bins): of mean gradients, from different folds only
    below = torch.ones_like(product).tril()[:-1] * share  # (borders, bins)
    low = below.sum(dim=1, keepdim=True)
    apart = below / low - (share - below) / (1 - low)
    between = (low * (1 - low))[:, 0] * ((apart @ product) * apart).sum(dim=1)
    every = (share * product.diagonal()).sum() - share @ product @ share
    return between / every if every > 0 else torch.zeros_like(between)

"""Guidance: how strongly the prompt pulls, and at which noise levels.

Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598) is here in the field's code form, `uncond + s·(cond − uncond)`. The paper writes
(1 + w)·cond − w·uncond, which is the same with s = 1 + w: s = 1 is no guidance and needs no second pass.

Everything acts on x0. For plain guidance that is no choice: epsilon and v are affine in x0 at a given x and sigma, so the combination comes out the
same in each. Rescale and APG measure lengths, so for them the space matters: rescale is measured in the space of the network's own output (as its
paper and diffusers' `guidance_rescale` do), APG in x0 (as its paper does; diffusers' guider applies it to whatever the network puts out).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..contracts import Conditioning, Denoiser
from ..errors import UsageError
from .noise import PREDICTION_TYPES

Scale = float | Tensor | Callable[[float], float]
"""A number, one number a row (batch,), or a function of sigma (`piecewise_scale`, `expert_scale`)."""


@dataclass(frozen=True)
class Apg:
    """Adaptive projected guidance (Sadat et al. 2024, arXiv 2410.02416, section 4).

    Attributes:
        eta: weight of the part of the update that is parallel to cond and only saturates it; 0 is the paper's, 1 keeps it whole.
        norm_cap: r, the greatest Euclidean length of a picture's update, or None for no cap.
        momentum: beta; each update adds beta times the sum before it. Negative values (−0.5) damp repetition; 0 is off.
    """

    eta: float = 0.0
    norm_cap: float | None = 15.0
    momentum: float = -0.5

    def __post_init__(self) -> None:
        if self.norm_cap is not None and not self.norm_cap > 0:
            raise UsageError(f"the APG norm cap is {self.norm_cap}; wanted a number > 0, or none for no cap")
        if not -1 < self.momentum < 1:
            raise UsageError(f"the APG momentum is {self.momentum}; wanted a number between -1 and 1")


@dataclass(frozen=True, eq=False)
class Guidance:
    """A guidance policy.

    Attributes:
        scale: s in `uncond + s·(cond − uncond)`.
        interval: (low, high) in sigma; guided where low < sigma <= high, unguided and without a second pass elsewhere (Kynkäänniemi et al. 2024,
            arXiv 2404.07724).
        rescale: phi in 0..1; share of the prediction that is brought back to cond's standard deviation (Lin et al. 2023, arXiv 2305.08891, eq.
            15-16).
        rescale_space: in which of `noise.PREDICTION_TYPES` the standard deviations are taken; give the network's own.
        apg: use the projected update instead of the plain one.
        threshold: percentile in (0, 1] of |x0| beyond which values are clamped and by which, where it is above 1, all are divided (Saharia et al.
            2022, arXiv 2205.11487, section 2.3), or None. Applied to every prediction, guided or not. Made for pixels in −1..1: it flattens
            unbounded latents.
    """

    scale: Scale = 7.5
    interval: tuple[float, float] = (0.0, math.inf)
    rescale: float = 0.0
    rescale_space: str = "epsilon"
    apg: Apg | None = None
    threshold: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.interval[0] < self.interval[1]:
            raise UsageError(f"the guidance interval is {self.interval}; wanted two sigmas, 0 <= low < high")
        if not 0 <= self.rescale <= 1:
            raise UsageError(f"guidance rescale is {self.rescale}; wanted a number from 0 (off) to 1")
        if self.rescale_space not in PREDICTION_TYPES:
            raise UsageError(f"guidance rescale space {self.rescale_space!r} is not known; wanted one of {', '.join(PREDICTION_TYPES)}")
        if self.threshold is not None and not 0 < self.threshold <= 1:
            raise UsageError(f"the dynamic threshold is {self.threshold}; wanted a percentile above 0 and up to 1, such as 0.995")
        if isinstance(self.scale, (int, float)) and not math.isfinite(self.scale):
            raise UsageError(f"the guidance scale is {self.scale}; wanted a finite number")

    def scale_at(self, sigma: Tensor) -> Tensor:
        """The scale of each row: (batch,) float64 on the CPU; 1 outside the interval.

        Args:
            sigma: (batch,) noise levels.
        """
        levels = sigma.double().cpu()
        if isinstance(self.scale, Tensor):
            scale = self.scale.double().cpu()
            if scale.shape != levels.shape:
                raise UsageError(f"{tuple(scale.shape)} guidance scales were given for a batch of {len(levels)}; give one a row")
        elif callable(self.scale):
            scale = torch.tensor([self.scale(level) for level in levels.tolist()], dtype=torch.float64)
        else:
            scale = torch.full_like(levels, self.scale)
        inside = (levels > self.interval[0]) & (levels <= self.interval[1])
        return torch.where(inside, scale, 1.0)


def piecewise_scale(points: Sequence[tuple[float, float]]) -> Callable[[float], float]:
    """Make a scale that is linear in sigma between (sigma, scale) points and constant beyond the first and last.

    Raises:
        UsageError: no points, or two with the same sigma.
    """
    table = sorted(points)
    if not table or any(a[0] == b[0] for a, b in pairwise(table)):
        raise UsageError(f"the guidance table {list(points)} is empty or gives a sigma twice; wanted (sigma, scale) pairs with different sigmas")

    def scale(sigma: float) -> float:
        for (low, at_low), (high, at_high) in pairwise(table):
            if low <= sigma <= high:
                return at_low + (at_high - at_low) * (sigma - low) / (high - low)
        return table[0][1] if sigma < table[0][0] else table[-1][1]

    return scale


def expert_scale(experts: Sequence[tuple[float, float, float | None]], default: float) -> Callable[[float], float]:
    """Make a scale that each expert sets for itself.

    Args:
        experts: (sigma_min, sigma_max, scale) of each; an expert owns sigma_min <= sigma < sigma_max; scale None takes the default.
        default: also the scale at a sigma that no expert owns.
    """

    def scale(sigma: float) -> float:
        for low, high, own in experts:
            if low <= sigma < high:
                return default if own is None else own
        return default

    return scale


class GuidedDenoiser:
    """A `Denoiser` with guidance around it.

    cond and uncond run as one batch, uncond first. The joined conditioning is made once for each conditioning and kept while that one lives, so
    that a network can cache what it computes from it. One instance serves one expert's part of one run: with APG momentum it holds the sum of that
    part's past updates.
    """

    def __init__(self, denoise: Denoiser, guidance: Guidance, negative: Conditioning) -> None:
        """Wrap a denoiser.

        Args:
            denoise: the network or experts.
            guidance: the policy.
            negative: what to steer away from (the empty prompt, or a negative one): one row, or one for each row of the conditioning.
        """
        self._denoise = denoise
        self._guidance = guidance
        self._negative = negative
        self._joined: WeakKeyDictionary[Conditioning, Conditioning] = WeakKeyDictionary()
        self._momentum: Tensor | None = None

    def __call__(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """Predict guided x0; see `contracts.Denoiser`."""
        scale = self._guidance.scale_at(sigma)
        if bool((scale == 1).all()):
            return self._threshold(self._denoise(x, sigma, conditioning))
        joined = self._joined.get(conditioning)
        if joined is None:
            joined = join_conditionings(self._negative, conditioning)
            self._joined[conditioning] = joined
        uncond, cond = self._denoise(torch.cat([x, x]), torch.cat([sigma, sigma]), joined).chunk(2)
        s = _per_row(scale, x)
        guided = uncond + (cond - uncond) * s if self._guidance.apg is None else self._projected(self._guidance.apg, cond, uncond, s)
        if self._guidance.rescale > 0:
            guided = rescaled(guided, cond, x, sigma, self._guidance.rescale, self._guidance.rescale_space)
        # A row at scale 1 shares its batch with guided rows and must come out as if alone.
        return self._threshold(torch.where(s == 1, cond, guided))

    def _projected(self, apg: Apg, cond: Tensor, uncond: Tensor, scale: Tensor) -> Tensor:
        """cond + (s − 1)·(orthogonal + eta·parallel), in double precision inside (arXiv 2410.02416, eq. 4-8)."""
        direction = cond.double()
        update = direction - uncond.double()
        if apg.momentum != 0:
            update = update if self._momentum is None else update + apg.momentum * self._momentum
            self._momentum = update
        axes = tuple(range(1, cond.ndim))
        if apg.norm_cap is not None:
            length = update.pow(2).sum(axes, keepdim=True).sqrt()
            update = update * (apg.norm_cap / length.clamp(min=apg.norm_cap))
        parallel = direction * ((update * direction).sum(axes, keepdim=True) / direction.pow(2).sum(axes, keepdim=True).clamp(min=1e-24))
        update = update - parallel * (1 - apg.eta)
        return (direction + (scale.double() - 1) * update).to(cond.dtype)

    def _threshold(self, x0: Tensor) -> Tensor:
        if self._guidance.threshold is None:
            return x0
        limit = torch.quantile(x0.abs().flatten(1).float(), self._guidance.threshold, dim=1).clamp(min=1)
        limit = _per_row(limit, x0)
        return torch.minimum(torch.maximum(x0, -limit), limit) / limit


def rescaled(guided: Tensor, cond: Tensor, x: Tensor, sigma: Tensor, phi: float, space: str) -> Tensor:
    """Bring each row of a guided prediction back to cond's standard deviation, by the share phi (arXiv 2305.08891, eq. 15-16).

    A network's output is k·(c·x − x0) with c = 1 for epsilon, 1/(1 + sigma²) for v and 0 for x0; the factor k cancels from the quotient of the two
    deviations. For the space of its own network this equals diffusers' `guidance_rescale`.

    Args:
        guided: (batch, …) guided x0.
        cond: (batch, …) x0 of the conditional pass.
        x: (batch, …) the noisy latents.
        sigma: (batch,) their noise levels.
        phi: 0..1.
        space: one of `noise.PREDICTION_TYPES`.

    Returns:
        (batch, …) x0.
    """
    level = _per_row(sigma, x)
    anchor = {"epsilon": x, "v_prediction": x / (1 + level**2), "sample": torch.zeros_like(x)}[space]
    axes = tuple(range(1, x.ndim))
    output = anchor - guided
    quotient = (anchor - cond).std(axes, keepdim=True) / output.std(axes, keepdim=True)
    return anchor - output * (phi * quotient + (1 - phi))


def join_conditionings(first: Conditioning, second: Conditioning) -> Conditioning:
    """Put what to steer away from before what to steer to.

    Args:
        first: one row (repeated) or as many as second; it sees the pictures that second sees.
        second: (batch, …).

    Returns:
        2·batch rows: first, then second.

    Raises:
        UsageError: as `stack_conditionings`, or their row counts do not fit.
    """
    rows = second.tokens.shape[0]
    if first.tokens.shape[0] not in (1, rows):
        raise UsageError(f"{first.tokens.shape[0]} negative prompts were given for {rows} prompts; give one, or one for each")
    return stack_conditionings([replace(repeated(first, rows), shown=second.shown, hint=second.hint), second])


def stack_conditionings(parts: Sequence[Conditioning]) -> Conditioning:
    """Stack conditionings along the batch; shorter token sequences are padded with zeros that the mask hides.

    Args:
        parts: one or more, of any number of rows.

    Returns:
        The rows of all, in order. mask is None only if none had one and their lengths agree.

    Raises:
        UsageError: only some of them have pooled vectors or size_ids.
    """
    length = max(part.tokens.shape[1] for part in parts)
    masked = any(part.mask is not None or part.tokens.shape[1] != length for part in parts)
    return Conditioning(
        tokens=torch.cat([_padded(part.tokens, length) for part in parts]),
        mask=torch.cat([_padded(_mask_of(part), length) for part in parts]) if masked else None,
        pooled=_stacked([part.pooled for part in parts], "pooled vectors"),
        size_ids=_stacked([part.size_ids for part in parts], "size_ids"),
        shown=_stacked([part.shown for part in parts], "masked pictures"),
        hint=_stacked([part.hint for part in parts], "control pictures"),
    )


def repeated(one: Conditioning, rows: int) -> Conditioning:
    """A conditioning of one row for each of `rows`; one that has as many already stays as it is."""

    def expanded(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.expand(rows, *tensor.shape[1:])

    return Conditioning(one.tokens.expand(rows, -1, -1), *map(expanded, (one.mask, one.pooled, one.size_ids, one.shown, one.hint)))


def _mask_of(conditioning: Conditioning) -> Tensor:
    tokens = conditioning.tokens
    return conditioning.mask if conditioning.mask is not None else torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)


def _padded(sequence: Tensor, length: int) -> Tensor:
    """Append zeros (False) to (batch, tokens, …) up to length tokens."""
    missing = length - sequence.shape[1]
    return torch.cat([sequence, sequence.new_zeros(sequence.shape[0], missing, *sequence.shape[2:])], dim=1) if missing else sequence


def _stacked(parts: Sequence[Tensor | None], what: str) -> Tensor | None:
    there = [part for part in parts if part is not None]
    if not there:
        return None
    if len(there) < len(parts):
        raise UsageError(f"only some of the prompts and negative prompts have {what}; encode all with the same encoders")
    return torch.cat(there)


def _per_row(values: Tensor, like: Tensor) -> Tensor:
    """Shape (batch,) values for broadcasting over like, on its device, in its dtype."""
    return values.to(like).view(-1, *[1] * (like.ndim - 1))

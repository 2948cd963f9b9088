"""The noise schedule a network was trained with: what sigma belongs to which timestep.

Training adds noise in the variance-preserving form x_t = sqrt(ābar_t)·x0 + sqrt(1 − ābar_t)·n (Ho et al. 2020, arXiv 2006.11239, eq. 4). Divided by
sqrt(ābar_t) this is x0 + sigma_t·n with sigma_t = sqrt((1 − ābar_t)/ābar_t), the variance-exploding scale in which every sampler here works
(Karras et al. 2022, arXiv 2206.00364).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import ModelError
from .names import TIMESTEP_SPACINGS

N = TypeVar("N", int, float)

MAX_STEPS = 10_000  # of training; every known model has 1000
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")

# The smallest ābar after the zero-terminal-SNR rescale: fp16's smallest subnormal, so that the last sigma is 4096 instead of infinite.
ZERO_SNR_FLOOR = 2.0**-24


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """The sigmas of a training schedule, and the sampling settings that a model folder recommends.

    Attributes:
        sigmas: (T,) float64, strictly increasing, > 0; sigma of the training timesteps 0..T−1. Their values are the float32 ones: ābar is a
            float32 product in the field's code, and a float64 product would move the smallest sigma by up to 7e-5 of itself.
        prediction_type: what the network's output means: "epsilon", "v_prediction" or "sample" (x0).
        spacing: the spacing the model recommends (see `schedules.SPACINGS`), or None when it recommends none.
        steps_offset: added to every timestep of the "leading" spacing.
        ends_at_sigma_min: families of samplers whose runs end at the smallest training sigma instead of 0: "alpha" (DDIM, by
            set_alpha_to_one=False) and "sigma" (those that read final_sigmas_type="sigma_min").
    """

    sigmas: Tensor
    prediction_type: str = "epsilon"
    spacing: str | None = None
    steps_offset: int = 0
    ends_at_sigma_min: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if self.prediction_type not in PREDICTION_TYPES:
            raise ModelError(f"prediction_type {self.prediction_type!r:.100} is not known; wanted one of {', '.join(PREDICTION_TYPES)}")
        if (
            self.sigmas.ndim != 1
            or len(self.sigmas) < 2
            or not bool((self.sigmas.diff() > 0).all())
            or not 0 < float(self.sigmas[0]) < float(self.sigmas[-1]) < math.inf
        ):
            raise ModelError(
                "the noise schedule does not rise: its sigmas have to be at least two positive, strictly increasing numbers; check its betas"
            )

    @classmethod
    def from_betas(
        cls,
        betas: Tensor,
        *,
        zero_terminal_snr: bool = False,
        prediction_type: str = "epsilon",
        spacing: str | None = None,
        steps_offset: int = 0,
        ends_at_sigma_min: frozenset[str] = frozenset(),
    ) -> "NoiseSchedule":
        """Make a schedule from per-step noise variances.

        Args:
            betas: (T,) float32 in (0, 1).
            zero_terminal_snr: rescale so that the last timestep is pure noise (Lin et al. 2023, arXiv 2305.08891, algorithm 1), then floor its
                ābar at 2^-24. Meant for v-prediction: an epsilon network learns nothing at that timestep.
            prediction_type: see the class.
            spacing: see the class.
            steps_offset: see the class.
            ends_at_sigma_min: see the class.

        Raises:
            ModelError: prediction_type is not known, or the sigmas do not rise.
        """
        alphas_cumprod = torch.cumprod(1.0 - betas, dim=0)
        if zero_terminal_snr:
            root = alphas_cumprod.sqrt()
            rescaled = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
            # Back through the betas, as the field does: this keeps the float32 rounding of published samplers.
            betas = 1.0 - torch.cat([rescaled[:1], rescaled[1:] / rescaled[:-1]])
            alphas_cumprod = torch.cumprod(1.0 - betas, dim=0)
            alphas_cumprod[-1] = ZERO_SNR_FLOOR
        sigmas = ((1.0 - alphas_cumprod) / alphas_cumprod) ** 0.5
        return cls(sigmas.double(), prediction_type, spacing, steps_offset, ends_at_sigma_min)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "NoiseSchedule":
        """Read the fields of a diffusers `scheduler_config.json` that describe noise; a field that is absent has its class's default.

        Read: num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas, rescale_betas_zero_snr, prediction_type, timestep_spacing,
        steps_offset, use_karras_sigmas, use_exponential_sigmas, use_beta_sigmas, set_alpha_to_one, final_sigmas_type. Settings that choose a solver
        (solver_order, algorithm_type, …) are not read, because the sampler is chosen by name. Fields that change the result and that are not
        supported (`_UNSUPPORTED`) are refused.

        Raises:
            ModelError: a class, value or combination that is not supported.
        """
        name = config.get("_class_name", "DDPMScheduler")
        if not isinstance(name, str) or name not in _CLASS_DEFAULTS:
            raise ModelError(f"scheduler class {name!r:.100} is not supported; wanted one with a beta schedule: {', '.join(sorted(_CLASS_DEFAULTS))}")
        for field, plain in _UNSUPPORTED.items():
            if config.get(field) not in (None, plain):
                raise ModelError(f"scheduler setting {field} = {config[field]!r:.100} is not supported; set it to {plain!r} in scheduler_config.json")
        if name in _CLIPPING and config.get("clip_sample"):
            raise ModelError("scheduler setting clip_sample = True is for pixels and would clip latents; set it to False in scheduler_config.json")
        default = _CLASS_DEFAULTS[name]
        return cls.from_betas(
            _betas_of(config, default),
            zero_terminal_snr=bool(config.get("rescale_betas_zero_snr", False)),
            prediction_type=config.get("prediction_type", "epsilon"),
            spacing=_spacing_of(config, default.spacing),
            steps_offset=_within(config, "steps_offset", 0, 0, MAX_STEPS),
            ends_at_sigma_min=_ends(config, name),
        )

    @property
    def sigma_min(self) -> float:
        """Sigma of timestep 0."""
        return float(self.sigmas[0])

    @property
    def sigma_max(self) -> float:
        """Sigma of timestep T − 1."""
        return float(self.sigmas[-1])

    @property
    def alphas_cumprod(self) -> Tensor:
        """(T,) float64; ābar = 1/(1 + sigma²), falling."""
        return 1.0 / (1.0 + self.sigmas**2)

    def sigma_at(self, timestep: Tensor | float) -> Tensor:
        """Sigma at a timestep, linear between two whole ones (as diffusers' Euler does).

        Args:
            timestep: any shape; clamped to 0..T−1.

        Returns:
            float64 of the same shape, on the CPU.
        """
        t = torch.as_tensor(timestep).cpu().double().clamp(0, len(self.sigmas) - 1)
        table = self.sigmas
        low = t.floor().long().clamp(max=len(table) - 2)
        return table[low] + (table[low + 1] - table[low]) * (t - low)

    def timestep_at(self, sigma: Tensor | float) -> Tensor:
        """Fractional timestep whose sigma this is, linear in log sigma between two whole ones (as k-diffusion's `sigma_to_t`).

        Exact inverse of `sigma_at` on whole timesteps; between them the two interpolations differ by less than one hundredth of a timestep
        except in the first few.

        Args:
            sigma: any shape, > 0; sigmas outside the table give 0 or T−1.

        Returns:
            float64 of the same shape, on the CPU.
        """
        table = self.sigmas.log()
        log_sigma = torch.as_tensor(sigma).cpu().double().log()
        low = (torch.searchsorted(table, log_sigma.contiguous(), right=True) - 1).clamp(0, len(table) - 2)
        weight = (log_sigma - table[low]) / (table[low + 1] - table[low])
        return low + weight.clamp(0, 1)


def linear_betas(beta_start: float, beta_end: float, steps: int) -> Tensor:
    """Betas that rise linearly (Ho et al. 2020, section 4); (steps,) float32."""
    return torch.linspace(beta_start, beta_end, steps, dtype=torch.float32)


def scaled_linear_betas(beta_start: float, beta_end: float, steps: int) -> Tensor:
    """Betas whose square root rises linearly (Stable Diffusion's schedule; Rombach et al. 2022, arXiv 2112.10752); (steps,) float32."""
    return torch.linspace(beta_start**0.5, beta_end**0.5, steps, dtype=torch.float32) ** 2


def cosine_betas(steps: int) -> Tensor:
    """Betas of ābar(u) = cos²((u + 0.008)/1.008 · π/2), each at most 0.999 (Nichol & Dhariwal 2021, arXiv 2102.09672, eq. 17); (steps,) float32."""
    abar = [math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(steps + 1)]
    return torch.tensor([min(1 - abar[i + 1] / abar[i], 0.999) for i in range(steps)], dtype=torch.float32)


@dataclass(frozen=True)
class _ClassDefault:
    beta_start: float
    beta_end: float
    beta_schedule: str
    spacing: str | None


_PLAIN_LEADING = _ClassDefault(0.0001, 0.02, "linear", "leading")
_PLAIN_LINSPACE = _ClassDefault(0.0001, 0.02, "linear", "linspace")
_LATENT_LINSPACE = _ClassDefault(0.00085, 0.012, "linear", "linspace")
_LATENT_LEADING = _ClassDefault(0.00085, 0.012, "scaled_linear", "leading")

_CLASS_DEFAULTS = {
    "DDIMScheduler": _PLAIN_LEADING,
    "DDPMScheduler": _PLAIN_LEADING,
    "PNDMScheduler": _PLAIN_LEADING,
    "LMSDiscreteScheduler": _PLAIN_LINSPACE,
    "EulerDiscreteScheduler": _PLAIN_LINSPACE,
    "EulerAncestralDiscreteScheduler": _PLAIN_LINSPACE,
    "DPMSolverMultistepScheduler": _PLAIN_LINSPACE,
    "DPMSolverSinglestepScheduler": _ClassDefault(0.0001, 0.02, "linear", None),
    "DEISMultistepScheduler": _PLAIN_LINSPACE,
    "UniPCMultistepScheduler": _PLAIN_LINSPACE,
    "SASolverScheduler": _PLAIN_LINSPACE,
    "HeunDiscreteScheduler": _LATENT_LINSPACE,
    "KDPM2DiscreteScheduler": _LATENT_LINSPACE,
    "KDPM2AncestralDiscreteScheduler": _LATENT_LINSPACE,
    "DPMSolverSDEScheduler": _LATENT_LINSPACE,
    "LCMScheduler": _LATENT_LEADING,
    "TCDScheduler": _LATENT_LEADING,
}
_CLIPPING = ("DDIMScheduler", "DDPMScheduler", "LCMScheduler", "TCDScheduler", "HeunDiscreteScheduler")
_UNSUPPORTED: dict[str, Any] = {
    "thresholding": False,
    "use_flow_sigmas": False,
    "use_lu_lambdas": False,
    "lambda_min_clipped": -math.inf,
    "interpolation_type": "linear",
    "timestep_type": "discrete",
    "sigma_min": None,
    "sigma_max": None,
}
_BETA_SCHEDULES: dict[str, Callable[[float, float, int], Tensor]] = {
    "linear": linear_betas,
    "scaled_linear": scaled_linear_betas,
    "squaredcos_cap_v2": lambda beta_start, beta_end, steps: cosine_betas(steps),  # noqa: ARG005
}
_SIGMA_SPACINGS = {"use_karras_sigmas": "karras", "use_exponential_sigmas": "exponential", "use_beta_sigmas": "beta"}


def _betas_of(config: Mapping[str, Any], default: _ClassDefault) -> Tensor:
    trained = config.get("trained_betas")
    if trained is not None:
        if not isinstance(trained, list) or not 2 <= len(trained) <= MAX_STEPS or not all(isinstance(beta, int | float) for beta in trained):
            raise ModelError(f"trained_betas is {trained!r:.100}; a list of 2 to {MAX_STEPS} numbers was wanted")
        return torch.tensor(trained, dtype=torch.float32)
    kind = config.get("beta_schedule", default.beta_schedule)
    if not isinstance(kind, str) or kind not in _BETA_SCHEDULES:
        raise ModelError(f"beta_schedule {kind!r:.100} is not known; wanted one of {', '.join(_BETA_SCHEDULES)}, or trained_betas")
    steps = _within(config, "num_train_timesteps", 1000, 2, MAX_STEPS)
    start, end = (_within(config, name, getattr(default, name), 0.0, 1.0) for name in ("beta_start", "beta_end"))
    return _BETA_SCHEDULES[kind](start, end, steps)


def _within(config: Mapping[str, Any], field: str, default: N, low: N, high: N) -> N:
    """A number of a config, a whole one where the default is.

    Raises:
        ModelError: something else, or outside low..high.
    """
    value = config.get(field, default)
    if isinstance(value, int if isinstance(default, int) else int | float) and not isinstance(value, bool) and low <= value <= high:
        return type(default)(value)
    raise ModelError(f"scheduler setting {field} = {value!r:.100} cannot be; a number from {low} to {high} was wanted; repair scheduler_config.json")


def _ends(config: Mapping[str, Any], name: str) -> frozenset[str]:
    final = config.get("final_sigmas_type", "zero")
    if final not in ("zero", "sigma_min"):
        raise ModelError(f"final_sigmas_type {final!r:.100} is not known; wanted zero or sigma_min")
    to_one = config.get("set_alpha_to_one", name != "PNDMScheduler")
    return frozenset(({"sigma"} if final == "sigma_min" else set[str]()) | (set[str]() if to_one else {"alpha"}))


def _spacing_of(config: Mapping[str, Any], default: str | None) -> str | None:
    chosen = [spacing for field, spacing in _SIGMA_SPACINGS.items() if config.get(field)]
    if len(chosen) > 1:
        raise ModelError(f"the scheduler config asks for {' and '.join(chosen)} sigmas at once; keep one of them")
    spacing = config.get("timestep_spacing", default)
    if spacing is not None and spacing not in TIMESTEP_SPACINGS:
        raise ModelError(f"timestep_spacing {spacing!r:.100} is not known; wanted one of {', '.join(TIMESTEP_SPACINGS)}")
    return chosen[0] if chosen else spacing

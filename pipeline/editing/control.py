"""ControlNet (Zhang et al. 2023, arXiv 2302.05543): a second network that reads a picture, such as edges, and adds to the U-Net's features.

The networks are diffusers' own; ours take what they add (`unet/denoiser.py`). Imported and loaded only where a request asks for one.
"""

import importlib.util
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...contracts import Conditioning
from ...errors import ModelError, UnsafeError, UsageError, first_line
from ...model_files import read_headers, read_json
from ...schedulers.schedules import SigmaSchedule
from ...unet.denoiser import Residuals
from ..model.folder import ModelFolder
from .depth import WEIGHTS as DEPTH_WEIGHTS
from .depth import checked_estimator, depth_map
from .inputs import InputPicture, examined, fitted, picture_from, pixels_of
from .networks import Beside, beside, beside_from, check_unchanged, open_beside

KINDS = ("none", "canny", "depth")
WEIGHTS = "diffusion_pytorch_model"
_CANNY = (100, 200)  # thresholds that the published canny ControlNets' examples use
_PUBLISHED = (16, 32, 96, 256)  # widths of the layers that read the picture, where a config names none
_SAME = ("block_out_channels", "down_block_types", "layers_per_block", "cross_attention_dim")  # as the U-Net has them


@dataclass(frozen=True, kw_only=True)
class Control:
    """A picture that steers a drawing, through a ControlNet.

    Attributes:
        image: the picture.
        kind: "none" where it is what the network reads, "canny" to find its edges first, "depth" to estimate its depth.
        model: name of the network's folder.
        sha256: of its files.
        path: where it was; not recorded in pictures.
        scale: factor on what the network adds.
        start: 0..1, share of the steps after which it begins.
        end: 0..1, share of the steps after which it ends.
        estimator: what estimates depth; None where nothing does.
    """

    image: InputPicture
    kind: str
    model: str
    sha256: str
    path: str
    scale: float
    start: float
    end: float
    estimator: Beside | None = None

    @property
    def recorded(self) -> dict[str, Any]:
        """What pictures and keys say of it: all but paths."""
        names = ("kind", "model", "sha256", "scale", "start", "end")
        depth = {} if self.estimator is None else {"estimator": self.estimator.recorded}
        return {"image": self.image.recorded, **{name: getattr(self, name) for name in names}, **depth}


def resolved_control(
    folder: ModelFolder,
    image: Path | None,
    kind: str | None,
    model: Path | None,
    scale: float | None,
    start: float | None,
    end: float | None,
    depth_model: Path | None,
) -> Control | None:
    """Read and check what steers a drawing; no weights are loaded.

    Args:
        folder: the model.
        image: see `Control`; None where there is none.
        kind: None is "none".
        model: folder of the ControlNet.
        scale: None is 1.
        start: None is 0.
        end: None is 1.
        depth_model: folder of what estimates depth, for the kind "depth" alone.

    Raises:
        UsageError: one of image and model is missing, or options without them; a kind that is not computed here; a model that takes no ControlNet.
        DataError: see `inputs.examined`.
        UnsafeError, ModelError: a folder is not safe, not valid, or the ControlNet is made for another U-Net.
    """
    for option, value, other, given in (
        ("control-image", image, "control-model", model),
        ("control-model", model, "control-image", image),
        *((name, value, "control-image", image) for name, value in (("control", kind), ("control-scale", scale))),
        *((name, value, "control-image", image) for name, value in (("control-start", start), ("control-end", end))),
        ("control-depth-model", depth_model, "control depth", "depth" if kind == "depth" else None),
        ("control depth", "depth" if kind == "depth" else None, "control-depth-model", depth_model),
    ):
        if value is not None and given is None:
            raise UsageError(f"--{option} needs --{other}; give it, or leave both out.")
    if image is None or model is None:
        return None
    if kind is not None and kind not in KINDS:
        raise UsageError(f"--control {kind!r:.40} is not computed here, only {', '.join(KINDS)}; give a ready-made map, with --control none.")
    if kind == "canny" and importlib.util.find_spec("cv2") is None:
        raise UsageError("--control canny needs OpenCV; pip install 'tu-diffuse[control]', or give ready-made edges with --control none.")
    if folder.family not in ("sd", "sdxl"):
        raise UsageError(f"ControlNets are made for SD and SDXL, and {folder.name!r} is of another family; leave out --control-image.")
    network = checked_network(folder, model)
    return Control(
        image=examined(image, "control-image"),
        kind="none" if kind is None else kind,
        model=network.name,
        sha256=network.sha256,
        path=network.path,
        scale=1.0 if scale is None else scale,
        start=0.0 if start is None else start,
        end=1.0 if end is None else end,
        estimator=None if depth_model is None else checked_estimator(depth_model),
    )


def checked_network(folder: ModelFolder, path: Path) -> Beside:
    """A ControlNet, once its folder was found to be safe and made for the model's U-Nets; no weights are loaded.

    Raises:
        UsageError: there is no such folder.
        UnsafeError: it brings code or pickles.
        ModelError: it is not a ControlNet's, or one for another U-Net.
    """
    network = open_beside(path, "control-model")
    config = read_json(network / "config.json")
    if config.get("_class_name") != "ControlNetModel":
        raise UnsafeError(f"--control-model {path.name!r} asks for the class {config.get('_class_name')!r:.100}; only ControlNetModel is run here.")
    for entry in folder.experts:
        theirs = folder.configs[entry.subfolder]
        for name in _SAME:
            if name in config and name in theirs and config[name] != theirs[name]:
                raise ModelError(
                    f"--control-model {path.name!r} is made for U-Nets with {name} {config[name]!r:.100}, and {entry.name!r} of {folder.name!r} has "
                    f"{theirs[name]!r:.100}; give the ControlNet of this model's family."
                )
    widths = config.get("conditioning_embedding_out_channels") or _PUBLISHED
    if not isinstance(widths, list | tuple) or len(widths) > 8:
        raise ModelError(f"--control-model {path.name!r} has conditioning_embedding_out_channels {widths!r:.100}; up to 8 widths were wanted.")
    cells = 2 ** (len(widths) - 1)
    if cells != folder.factor:
        raise ModelError(f"--control-model {path.name!r} is made for latents of {cells}×{cells} pixels, and {folder.name!r} has {folder.factor}.")
    return beside(network, WEIGHTS, ["config.json"])


def control_from(stored: Mapping[str, Any]) -> Control:
    """A `Control` from its JSON, with or without paths; errors as of `inputs.picture_from`."""
    scale, start, end = (float(stored[name]) for name in ("scale", "start", "end"))
    kind, model, sha256, path = str(stored["kind"]), str(stored["model"]), str(stored["sha256"]), str(stored.get("path", ""))
    estimator = None if stored.get("estimator") is None else beside_from(stored["estimator"])
    if (kind == "depth") != (estimator is not None):
        raise ValueError("a depth map and what estimates it, one without the other")
    image = picture_from(stored["image"])
    return Control(image=image, kind=kind, model=model, sha256=sha256, path=path, scale=scale, start=start, end=end, estimator=estimator)


def with_networks(control: Control, folder: ModelFolder, path: Path | None, depth_path: Path | None) -> Control:
    """The control with its networks where they are now.

    Args:
        control: as recorded.
        folder: the model.
        path: of the ControlNet; None where it was.
        depth_path: of what estimates depth; likewise.

    Raises:
        UsageError: one is missing, or another one was given; says which one was wanted.
    """
    there = Beside(control.model, control.sha256, control.path)
    network = _found_again(there, path, "ControlNet", "control-model", partial(checked_network, folder))
    if control.estimator is None:
        return replace(control, path=network.path)
    estimator = _found_again(control.estimator, depth_path, "depth model", "control-depth-model", checked_estimator)
    return replace(control, path=network.path, estimator=estimator)


def _found_again(wanted: Beside, named: Path | None, what: str, option: str, check: Callable[[Path], Beside]) -> Beside:
    if named is None and not (wanted.path and Path(wanted.path).is_dir()):
        raise UsageError(f"the {what} {wanted.name!r} (sha256 {wanted.sha256[:10]}…) is missing; name its folder with --{option}.")
    now = check(Path(wanted.path) if named is None else named)
    if now.sha256 != wanted.sha256:
        raise UsageError(
            f"{now.name!r} is not the {what} {wanted.name!r} (sha256 {wanted.sha256[:10]}…) that was used; name that one with --{option}."
        )
    return now


def network_bytes(controls: Collection[Control | None], dtype: torch.dtype) -> int:
    """What the largest ControlNet takes in memory beside the largest depth network, from their headers: one of each is held at a time."""
    networks = {(control.path, WEIGHTS, dtype.itemsize) for control in controls if control is not None}
    networks |= {(one.estimator.path, DEPTH_WEIGHTS, 4) for one in controls if one is not None and one.estimator is not None}
    sizes: dict[str, int] = {WEIGHTS: 0, DEPTH_WEIGHTS: 0}
    for path, stem, width in networks:
        numbers = sum(math.prod(entry["shape"]) for entry in read_headers(Path(path), stem).values())
        sizes[stem] = max(sizes[stem], numbers * width)
    return sum(sizes.values())


def hint_of(control: Control, width: int, height: int, resize: str) -> Tensor:
    """What the network reads of a picture: (1, 3, height, width) float32 in 0..1.

    Raises:
        UsageError: the picture is gone, or is not what it was.
        UnsafeError, ModelError: see `depth.depth_map`.
    """
    if control.estimator is not None:
        return _as_hint(np.repeat(fitted(depth_map(control.estimator, control.image), width, height, resize)[:, :, None], 3, axis=2))
    picture = fitted(pixels_of(control.image), width, height, resize)
    if control.kind == "canny":
        picture = _edges(picture)
    return _as_hint(picture)


def _as_hint(picture: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(picture.astype(np.float32) / 255).permute(2, 0, 1)[None]


def _edges(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Canny's edges, white on black, (height, width, 3)."""
    import cv2

    return np.repeat(np.asarray(cv2.Canny(np.ascontiguousarray(picture), *_CANNY), dtype=np.uint8)[:, :, None], 3, axis=2)


class ControlNets:
    """The ControlNet of a model in memory: the one that was asked for last.

    Attributes:
        loads: how often one was loaded.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        self._held: tuple[str, Any] | None = None
        self.loads = 0

    def residuals(self, control: Control | None, schedule: SigmaSchedule, first: int) -> Residuals | None:
        """What a round's denoisers add; None for nothing. Loads the network where it is another one than before.

        Args:
            control: what steers the drawing.
            schedule: noise levels of the round.
            first: number of the round's first step; the shares `start` and `end` are of the steps from there on, as in diffusers.

        Raises:
            ModelError, UnsafeError: its files are not valid, or not those that were asked for.
        """
        if control is None:
            return None
        kept = kept_steps(control, len(schedule.sigmas) - 1 - first)
        high, low = float(schedule.sigmas[first + kept[0]]), float(schedule.sigmas[first + kept[-1] + 1])
        network = self._network(control)

        def add(x: Tensor, t: Tensor, sigma: Tensor, conditioning: Conditioning) -> tuple[Sequence[Tensor], Tensor] | None:
            if conditioning.hint is None or not low < float(sigma[0]) <= high:
                return None
            return _added(network, x, t, conditioning, control.scale)

        return add

    def _network(self, control: Control) -> Any:
        if self._held is None or self._held[0] != control.sha256:
            from ..model.library import library_control

            folder = check_unchanged(Beside(control.model, control.sha256, control.path), WEIGHTS, ["config.json"])
            self._held = None
            self._held = control.sha256, library_control(folder, self._dtype, self._device)
            self.loads += 1
        return self._held[1]


def kept_steps(control: Control, steps: int) -> list[int]:
    """The steps of a round of `steps` in which the network adds something.

    Raises:
        UsageError: there are none.
    """
    kept = [i for i in range(steps) if i / steps >= control.start and (i + 1) / steps <= control.end]
    if not kept:
        raise UsageError(f"--control-start {control.start:g} and --control-end {control.end:g} leave none of {steps} steps; put them further apart.")
    return kept


def _added(network: Any, x: Tensor, t: Tensor, conditioning: Conditioning, scale: float) -> tuple[Sequence[Tensor], Tensor]:
    """What the network adds to the skips and to the middle. Rows of different prompt length are computed apart, as it takes no mask."""
    rows, tokens, mask = len(x), conditioning.tokens, conditioning.mask
    lengths = [tokens.shape[1]] * rows if mask is None else [int(row.sum()) for row in mask]
    parts: dict[int, tuple[Sequence[Tensor], Tensor]] = {}
    for length in dict.fromkeys(lengths):
        mine = [row for row in range(rows) if lengths[row] == length]
        parts[length] = _run(network, x[mine], t[mine], _rows(conditioning, mine, length), scale)
    if len(parts) == 1:
        return parts[lengths[0]]
    order = torch.tensor([row for length in parts for row in range(rows) if lengths[row] == length]).argsort()
    downs = [torch.cat(same)[order] for same in zip(*(part[0] for part in parts.values()), strict=True)]
    return downs, torch.cat([part[1] for part in parts.values()])[order]


def _rows(conditioning: Conditioning, rows: list[int], length: int) -> Conditioning:
    """Some rows, with their first `length` tokens."""
    rest = (conditioning.pooled, conditioning.size_ids, conditioning.hint)
    pooled, size_ids, hint = (None if one is None else one[rows] for one in rest)
    return Conditioning(conditioning.tokens[rows, :length], None, pooled, size_ids, hint=hint)


def _run(network: Any, x: Tensor, t: Tensor, conditioning: Conditioning, scale: float) -> tuple[Sequence[Tensor], Tensor]:
    assert conditioning.hint is not None
    x = x.to(network.dtype)
    added: dict[str, Any] = {}
    if conditioning.size_ids is not None and conditioning.pooled is not None:
        added["added_cond_kwargs"] = {"text_embeds": conditioning.pooled.to(x), "time_ids": conditioning.size_ids}
    try:
        return network(x, t, conditioning.tokens.to(x), conditioning.hint.to(x), conditioning_scale=scale, return_dict=False, **added)
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError) as error:
        if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
            raise
        raise ModelError(f"diffusers cannot compute this ControlNet ({first_line(error)}); its config.json is not that of its weights.") from error

"""CLIP scores, and the best of several pictures by them.

The score of a picture is 100·cos(picture, prompt) in a CLIP pair's space (CLIPScore, Hessel et al. 2021, arXiv 2104.08718, without its factor of 2.5
and its clamp at 0). Scores of different pairs cannot be compared.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ModelError, UsageError
from ..model_files import read_header, read_json
from ..pipeline.model.fingerprint import fingerprint
from ..pipeline.model.folder import EMBEDDED
from ..pipeline.previews import to_image
from ..text_encoders.clip import CLIPText, CLIPTextConfig
from ..text_encoders.tokenizer import load_tokenizer
from ..weights import check_finite, load_weights
from .drafts import Drawn, Lost

CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"


@dataclass(frozen=True)
class ScoreModel:
    """A CLIP pair: its folder in open_clip's layout (None is the embedded model's pair), and the fingerprint of its files."""

    folder: Path | None
    hash: str


@dataclass(frozen=True)
class Scorer:
    """A CLIP pair in memory.

    Attributes:
        hash: of its files.
        score: pictures, (height, width, 3) uint8, and their prompt to a score each, -100..100.
    """

    hash: str
    score: Callable[[Sequence[Tensor], str], list[float]]


@dataclass(frozen=True)
class _Towers:
    """The two sides of a pair: pictures, (height, width, 3) uint8, to (n, width) float32, and a prompt to (1, width)."""

    see: Callable[[Sequence[Tensor]], Tensor]
    read: Callable[[str], Tensor]


def open_score_model(folder: Path | None) -> ScoreModel:
    """Check a folder of a CLIP pair; reads no weights. None is the pair of the embedded model, which knows that model's world only.

    Raises:
        UsageError: the folder has no `open_clip_config.json` or no `open_clip_model.safetensors`.
        ModelError: a tower or tokenizer would have to be downloaded, or its weights are no safetensors file.
    """
    if folder is None:
        return ScoreModel(None, fingerprint(EMBEDDED, ["text_encoder", "tokenizer", "image_encoder"]))
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise UsageError(f"--score-model {folder.name!r} has no {name}; give a folder in open_clip's layout, in safetensors.")
    config = read_json(folder / CONFIG)
    shape: Any = config.get("model_cfg")
    text = shape.get("text_cfg") if isinstance(shape, dict) else None
    if not isinstance(text, dict):
        raise ModelError(f"{CONFIG} of the score model has no model_cfg with a text_cfg; take the file that came with the weights.")
    for name in ("hf_model_name", "hf_tokenizer_name"):
        if text.get(name):
            raise ModelError(f"{CONFIG} of the score model has {name}, which open_clip downloads; use a pair with open_clip's own text tower.")
    vision = shape.get("vision_cfg")
    if isinstance(vision, dict) and not re.fullmatch(r"[\w.]{1,100}", str(vision.get("timm_model_name") or "none")):
        raise ModelError(f"{CONFIG} of the score model has a timm_model_name that leads elsewhere; use one of timm's own.")
    read_header(folder / WEIGHTS)
    return ScoreModel(folder, fingerprint(folder, ["."]))


def load_scorer(model: ScoreModel, device: torch.device) -> Scorer:
    """Load a CLIP pair in float32: the embedded one, or through open_clip.

    Raises:
        ModelError: open_clip cannot make it.
    """
    towers = _embedded_towers(device) if model.folder is None else _open_clip_towers(model.folder, device)

    @torch.no_grad()
    def score(pictures: Sequence[Tensor], prompt: str) -> list[float]:
        seen, said = (F.normalize(side, dim=-1) for side in (towers.see(pictures), towers.read(prompt)))
        return [round(100 * value, 4) for value in (seen @ said.T)[:, 0].tolist()]

    return Scorer(model.hash, score)


def _embedded_towers(device: torch.device) -> _Towers:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    shape = CLIPTextConfig.from_dict(read_json(EMBEDDED / "text_encoder" / "config.json"))
    text = load_weights(CLIPText(shape, projection=True), EMBEDDED / "text_encoder", "model", torch.float32, device)
    tokenizer = load_tokenizer(EMBEDDED / "tokenizer")
    config = CLIPVisionConfig(**read_json(EMBEDDED / "image_encoder" / "config.json"))
    image = load_weights(CLIPVisionModelWithProjection(config), EMBEDDED / "image_encoder", "model", torch.float32, device)

    def see(pictures: Sequence[Tensor]) -> Tensor:
        pixels = torch.stack(list(pictures)).permute(0, 3, 1, 2).to(device, torch.float32) / 127.5 - 1
        seen: Tensor = image(F.interpolate(pixels, size=config.image_size, mode="bilinear", antialias=True)).image_embeds
        return seen

    def read(prompt: str) -> Tensor:
        projected = text(tokenizer.encode([prompt]).ids.to(device)).projected
        assert projected is not None
        return projected

    return _Towers(see, read)


def _open_clip_towers(folder: Path, device: torch.device) -> _Towers:
    import open_clip

    try:
        name = f"local-dir:{folder.absolute()}"
        pair: Any = open_clip.create_model_from_pretrained(name, device=device)  # its annotations are not those of what it returns
        tokenize = open_clip.get_tokenizer(name)
    except Exception as error:  # whatever open_clip says of a wrong config or wrong weights
        raise ModelError(f"open_clip cannot load the score model {folder.name!r} ({error!s:.300}); give another --score-model.") from None
    clip, transform = pair
    clip.eval()
    for part, tensor in clip.named_parameters():
        check_finite(part, tensor, folder)

    def see(pictures: Sequence[Tensor]) -> Tensor:
        seen: Tensor = clip.encode_image(torch.stack([transform(to_image(picture)) for picture in pictures]).to(device))
        return seen.float()

    def read(prompt: str) -> Tensor:
        said: Tensor = clip.encode_text(tokenize([prompt]).to(device))
        return said.float()

    return _Towers(see, read)


def keep_best(results: Iterable[Drawn | Lost], scorer: Scorer) -> Iterator[Drawn | Lost]:
    """From the results of candidates (`Item.candidates`) to one of each item: the picture with the highest score, the earliest candidate of equals.

    The picture carries all scores by seed, as `best_of`; a candidate that was lost has None. An item is lost with the last of its candidates.
    """
    waiting: defaultdict[str, list[Drawn | Lost]] = defaultdict(list)
    for result in results:
        group = waiting[result.item.asked]
        group.append(result)
        if len(group) == result.item.best_of:
            yield _best(waiting.pop(result.item.asked), scorer) if len(group) > 1 else result


def _best(group: Sequence[Drawn | Lost], scorer: Scorer) -> Drawn | Lost:
    drawn = [result for result in group if isinstance(result, Drawn)]
    if not drawn:
        lost = group[0]
        assert isinstance(lost, Lost)
        return Lost(replace(lost.item, key=lost.item.asked), lost.error)
    scores: dict[int, float] = dict(
        zip((d.item.seed for d in drawn), scorer.score([d.pixels for d in drawn], drawn[0].item.request.words), strict=True)
    )
    best = max(drawn, key=lambda one: scores[one.item.seed])
    told = {str(result.item.seed): scores.get(result.item.seed) for result in group}
    item = replace(best.item, key=best.item.asked)
    return Drawn(item, best.pixels, best.settings | {"item": item.key, "best_of": {"score_model": scorer.hash, "scores": told}})

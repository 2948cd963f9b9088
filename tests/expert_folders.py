"""What tests of experts do with model folders: draw, train a little, compare."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from tu_diffuse.pipeline.model.folder import ModelFolder, open_folder
from tu_diffuse.pipeline.model.loading import load_model
from tu_diffuse.pipeline.resolve import resolve
from tu_diffuse.pipeline.text_to_image import Picture, text_to_image
from tu_diffuse.training.expert_files import Kept, state_of
from tu_diffuse.training.forking import put_weights
from tu_diffuse.training.intervals import expert_of, sigma_of
from tu_diffuse.unet.residency import load_expert

WHOLE = "diffusion_pytorch_model.safetensors"


def draw(folder: Path, dtype: str = "float32", sampler: str = "dpmpp_2m") -> tuple[Tensor, list[str]]:
    """One picture of 12 steps, and the experts that drew it."""
    model = load_model(open_folder(folder), dtype=dtype, device="cpu")
    request = resolve(model.folder, "a red apple", [5], steps=12, sampler=sampler, guidance=3.0)
    picture = next(event for event in text_to_image(model, request) if isinstance(event, Picture))
    return picture.pixels, [expert["name"] for expert in picture.settings["experts"]]


def at(model: ModelFolder, *timesteps: float) -> list[float]:
    return [sigma_of(model.noise, timestep) for timestep in timesteps]


def weights_of(folder: Path, name: str) -> dict[str, Tensor]:
    model = open_folder(folder)
    entry = expert_of(model, name)
    assert entry.sha256 is not None
    return load_expert(folder / entry.subfolder, "epsilon", lambda s: s, sha256=entry.sha256).unet.state_dict()


def trained(folder: Path, name: str, out: Path, change: Callable[[str, Tensor], Tensor]) -> ModelFolder:
    """The folder with an expert's weights changed, as training would."""
    state = {
        tensor: change(tensor, value.clone()) for tensor, value in state_of(Kept(folder / expert_of(open_folder(folder), name).subfolder)).items()
    }
    put_weights(open_folder(folder), name, out, tensors=state)
    return open_folder(out)


def assert_equal(came: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert came.keys() == wanted.keys()
    assert [name for name in wanted if came[name].dtype != wanted[name].dtype or not torch.equal(came[name], wanted[name])] == []


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def size(folder: Path) -> int:
    return sum(len(data) for data in files(folder).values())

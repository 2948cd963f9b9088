"""The model that ships: an ordinary folder of at most 40 MB with CLIP, T5 and at least two experts, which draws what it is asked for."""

from pathlib import Path

import pytest
from recognition import find_objects
from tu_diffuse.pipeline.model.folder import EMBEDDED, open_folder
from tu_diffuse.pipeline.model.loading import Model, load_model
from tu_diffuse.pipeline.resolve import resolve
from tu_diffuse.pipeline.text_to_image import Picture, Progress, text_to_image

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "black")


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model(open_folder(None))


def test_it_is_complete_and_small() -> None:
    folder = open_folder(None)
    assert folder.family == "clip-t5"
    assert len(folder.experts) >= 2
    assert all(expert.sha256 is not None for expert in folder.experts)
    assert sum(path.stat().st_size for path in EMBEDDED.rglob("*.safetensors")) <= 40_000_000
    assert not [path for path in EMBEDDED.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")]
    assert (Path(EMBEDDED).parent / "README.md").is_file()


def test_every_expert_takes_part(model: Model) -> None:
    steps = [event for event in text_to_image(model, resolve(model.folder, "a red circle", [1])) if isinstance(event, Progress)]
    assert {step.expert for step in steps} == {expert.name for expert in model.folder.experts}
    assert len(steps) == model.folder.defaults.steps


def test_colours_and_backgrounds_follow_the_prompt(model: Model) -> None:
    """One object of each colour on the background asked for; the oracle looks at pixels only."""
    right_colours = right_backgrounds = 0
    for seed, colour in enumerate(COLOURS):
        request = resolve(model.folder, f"a big {colour} circle on a white background", [seed])
        [picture] = [event for event in text_to_image(model, request) if isinstance(event, Picture)]
        background, found = find_objects(picture.pixels.numpy(), ())
        right_colours += any(thing.colour == colour for thing in found)
        right_backgrounds += background == "white"
    assert right_colours >= 7
    assert right_backgrounds >= 7

"""Tiny models that whole runs are tested on, made once a session; importing the libraries that write them costs seconds, so only when asked for."""

from collections.abc import Callable
from pathlib import Path

import pytest


def _made(tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[Path], Path]) -> Path:
    return make(tmp_path_factory.mktemp("models") / name)


@pytest.fixture(scope="session")
def sd1_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny_models import sd_folder

    return _made(tmp_path_factory, "tiny-sd1", sd_folder)


@pytest.fixture(scope="session")
def sd2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny_models import sd_folder

    return _made(tmp_path_factory, "tiny-sd2", lambda folder: sd_folder(folder, "v_prediction"))


@pytest.fixture(scope="session")
def inpainting_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny_models import inpainting_folder

    return _made(tmp_path_factory, "tiny-inpainting", inpainting_folder)


@pytest.fixture(scope="session")
def sdxl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny_models import sdxl_folder

    return _made(tmp_path_factory, "tiny-sdxl", sdxl_folder)


@pytest.fixture(scope="session")
def refiner_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny_models import refiner_folder

    return _made(tmp_path_factory, "tiny-refiner", refiner_folder)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """Family -> a model in its real layout, as the folder that diffusers wrote and as the single file that `convert` made of it."""
    made: dict[str, tuple[Path, Path]] = {}

    def get(family: str) -> tuple[Path, Path]:
        if family not in made:
            from real_layouts import FAMILIES
            from tu_diffuse.pipeline.model.convert import convert
            from tu_diffuse.pipeline.model.folder import open_folder

            folder = _made(tmp_path_factory, family, FAMILIES[family])
            convert(open_folder(folder), folder.with_suffix(".safetensors"))
            made[family] = folder, folder.with_suffix(".safetensors")
        return made[family]

    return get


@pytest.fixture(scope="session")
def ensemble_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny_models import ensemble_folder

    return _made(tmp_path_factory, "tiny-ensemble", ensemble_folder)

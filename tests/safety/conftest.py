"""One scene of good files, made once, linked into a folder of each case."""

from pathlib import Path

import pytest
from safety_scenes import Scene, make_scene


@pytest.fixture(scope="session")
def whole(ensemble_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return make_scene(tmp_path_factory.mktemp("whole"), ensemble_folder)

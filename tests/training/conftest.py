"""Model folders that several tests of training begin with."""

from pathlib import Path

import pytest
from tu_diffuse.pipeline.folder import ModelFolder, open_folder


@pytest.fixture
def plain(sd1_folder: Path) -> ModelFolder:
    return open_folder(sd1_folder)


@pytest.fixture
def ensemble(ensemble_folder: Path) -> ModelFolder:
    return open_folder(ensemble_folder)

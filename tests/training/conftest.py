"""Model folders that several tests of training begin with."""

from pathlib import Path

import pytest
from encoded_sets import write_set
from tu_diffuse.pipeline.model.folder import ModelFolder, open_folder
from tu_diffuse.shards.index import ShardIndex


@pytest.fixture
def plain(sd1_folder: Path) -> ModelFolder:
    return open_folder(sd1_folder)


@pytest.fixture
def ensemble(ensemble_folder: Path) -> ModelFolder:
    return open_folder(ensemble_folder)


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    return write_set(tmp_path_factory.mktemp("raw") / "set")

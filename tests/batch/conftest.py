"""A tiny ensemble as a studio, and items for it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tu_diffuse.batch.items import Item, make_items
from tu_diffuse.batch.lines import Line
from tu_diffuse.batch.studio import Studio
from tu_diffuse.pipeline.model.folder import ModelFolder, open_folder
from tu_diffuse.pipeline.model.place import choose_place

MakeItems = Callable[..., list[Item]]
MakeStudio = Callable[..., Studio]


@pytest.fixture(scope="session")
def ensemble(ensemble_folder: Path) -> ModelFolder:
    return open_folder(ensemble_folder)


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny_models import clip_pair_folder

    return clip_pair_folder(tmp_path_factory.mktemp("models") / "tiny-clip")


@pytest.fixture
def studio(ensemble: ModelFolder) -> MakeStudio:
    return lambda roomy=True: Studio(ensemble, choose_place(device="cpu"), roomy=roomy)


@pytest.fixture
def items(ensemble: ModelFolder) -> MakeItems:
    """Items of prompts or of lines' values, which must all be good."""

    def make(*lines: str | dict[str, Any], sweep: dict[str, list[Any]] | None = None, best_of: int = 1, **defaults: Any) -> list[Item]:
        values = [{"prompt": line} if isinstance(line, str) else line for line in lines]
        made, problems = make_items(
            ensemble,
            [Line(number, one, dict.fromkeys(one, 1)) for number, one in enumerate(values, 1)],
            defaults=defaults,
            sweep=sweep or {},
            circumstances={},
            best_of=best_of,
        )
        assert not problems
        return made

    return make

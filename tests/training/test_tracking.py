"""Trackers: what TensorBoard's own reader finds in the files."""

from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image
from tu_diffuse.errors import UsageError
from tu_diffuse.training.loop import Logged
from tu_diffuse.training.tracking import Validated, check_trackers, trackers


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="extra")
def test_tensorboard_reads_each_step_once_after_a_resume(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    Image.new("RGB", (8, 8), "red").save(tmp_path / "picture.png")
    with trackers(["tensorboard"], tmp_path, {"lr": 1e-4}) as tell:
        for step in (20, 40, 60):
            tell(Logged(step, 100, {"loss": 1 / step, "loss/t0-99": 0.5}, 0.1))
        tell("a note")
    with trackers(["tensorboard"], tmp_path, {"lr": 1e-4}) as tell:  # as from a checkpoint of step 30
        for step in (40, 60, 80):
            tell(Logged(step, 100, {"loss": 2 / step, "loss/t0-99": 0.5}, 0.1))
        tell(Validated(80, {"t100": 0.25}, {"a star": tmp_path / "picture.png"}))
    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert [event.step for event in found.Scalars("loss")] == [20, 40, 60, 80]
    assert [event.value for event in found.Scalars("loss")] == pytest.approx([1 / 20, 2 / 40, 2 / 60, 2 / 80])
    assert [(event.step, event.value) for event in found.Scalars("validation/t100")] == [(80, 0.25)]
    [tag] = found.Tags()["images"]
    assert "a star" in tag.replace("_", " ")
    assert "loss/t0-99" in found.Tags()["scalars"]


def test_nothing_is_opened_without_an_event(tmp_path: Path) -> None:
    with trackers(["tensorboard"], tmp_path, {}) as tell:
        tell("a note")
    assert not list(tmp_path.iterdir())


def test_unknown_and_missing_trackers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import accelerate.tracking

    check_trackers([])
    with pytest.raises(UsageError, match=r"'tensorbord' is not known; use one of .*tensorboard"):
        check_trackers(["tensorbord"])
    monkeypatch.setattr(accelerate.tracking, "get_available_trackers", list)
    with pytest.raises(UsageError, match=r"tu-diffuse\[track\]"):
        check_trackers(["tensorboard"])

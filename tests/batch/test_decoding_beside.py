"""Decoding a batch while the next one is drawn: the same pictures, whatever runs out of memory."""

from collections.abc import Callable
from pathlib import Path
from threading import Event, current_thread
from typing import Any

import pytest
import torch
from PIL import Image
from tu_diffuse.batch import drafts
from tu_diffuse.batch.drafts import Draft
from tu_diffuse.batch.journal import Entry
from tu_diffuse.batch.plan import Plan, extend
from tu_diffuse.batch.run import draw_missing
from tu_diffuse.batch.studio import Studio
from tu_diffuse.errors import ModelError
from tu_diffuse.pipeline.model.folder import ModelFolder
from tu_diffuse.vae.codec import LatentCodec

SOON = 60  # seconds that a thread waits for another before the test fails


def pixels_in(folder: Path) -> dict[str, bytes]:
    return {path.name: Image.open(path).tobytes() for path in folder.glob("0*.png")}


@pytest.fixture
def plan(items, ensemble: ModelFolder) -> Plan:
    return extend(Plan(ensemble.fingerprint), items(*"abcdefg", sampler="euler_a"), 2)


@pytest.fixture
def draw(plan: Plan, studio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Entry]]:
    def drawn(folder: str, *, beside: bool) -> list[Entry]:
        (tmp_path / folder).mkdir()
        monkeypatch.setattr(Studio, "decodes_beside", beside)
        entries: list[Entry] = []
        draw_missing(studio(), plan, {}, tmp_path / folder, part=(1, 1), window_bytes=0, tell=lambda _: None, kept=entries.append)
        return entries

    return drawn


@pytest.fixture
def whole(draw, tmp_path: Path) -> dict[str, bytes]:
    """The pictures, drawn by one thread."""
    assert len(draw("whole", beside=False)) == 7
    return pixels_in(tmp_path / "whole")


class Drawing:
    """Watches stages of batches: `second` is set while one of the second batch is drawn for the first time, `now` while any is."""

    def __init__(self, patch: pytest.MonkeyPatch, in_second: Callable[[], None] = lambda: None) -> None:
        self.second, self.now, seen = Event(), Event(), list[str]()
        advanced = drafts._advanced

        def watched(studio: Studio, draft: Draft, tell: Any) -> Draft:
            def paused(event: Any) -> None:
                self.now.clear()
                tell(event)
                self.now.set()

            first = draft.items[0].key
            self.now.set()
            if first not in seen:
                seen.append(first)
                if len(seen) == 2:
                    self.second.set()
                    in_second()
            result = advanced(studio, draft, paused)
            self.now.clear()
            return result

        patch.setattr(drafts, "_advanced", watched)


def decoded_by(patch: pytest.MonkeyPatch, before: Callable[[int], None]) -> list[str]:
    """The threads that decode pictures; `before` is called with the number of each call."""
    threads: list[str] = []
    decode = LatentCodec.decode

    def watched(self: LatentCodec, latents: torch.Tensor) -> Any:
        threads.append(current_thread().name.partition("_")[0])
        before(len(threads))
        return decode(self, latents)

    patch.setattr(LatentCodec, "decode", watched)
    return threads


def test_a_batch_is_decoded_while_the_next_is_drawn(draw, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    drawing = Drawing(monkeypatch)
    met: list[bool] = []
    threads = decoded_by(monkeypatch, lambda call: met.append(call != 1 or drawing.second.wait(SOON)))
    entries = draw("beside", beside=True)
    assert met == [True] * 7
    assert threads == ["decoder"] * 7
    assert pixels_in(tmp_path / "beside") == whole
    assert [entry.status for entry in entries] == ["done"] * 7


def test_what_has_no_room_beside_is_decoded_when_drawing_pauses(draw, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    drawing = Drawing(monkeypatch)
    alone: list[bool] = []

    def before(call: int) -> None:
        if call == 1:
            drawing.second.wait(SOON)
            raise torch.OutOfMemoryError("full")
        if call == 2:
            alone.append(not drawing.now.is_set())

    threads = decoded_by(monkeypatch, before)
    entries = draw("beside", beside=True)
    assert alone == [True]
    assert threads == ["decoder"] * 8
    assert pixels_in(tmp_path / "beside") == whole
    assert [(entry.status, entry.fallbacks) for entry in entries] == [("done", ())] * 7


def test_what_has_no_room_beside_is_drawn_when_decoding_is_done(draw, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    full = Event()

    def out_of_memory() -> None:
        full.set()
        raise torch.OutOfMemoryError("full")

    Drawing(monkeypatch, out_of_memory)
    threads = decoded_by(monkeypatch, lambda call: None if call != 1 or full.wait(SOON) else pytest.fail("nothing was drawn beside"))
    entries = draw("beside", beside=True)
    assert full.is_set()
    assert threads == ["decoder"] * 7
    assert pixels_in(tmp_path / "beside") == whole
    assert [(entry.status, entry.fallbacks) for entry in entries] == [("done", ())] * 7


def test_drawing_that_ends_in_an_error_leaves_the_batch_before_it(draw, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Decoding waits for a pause then that never comes."""
    drawing = Drawing(monkeypatch, lambda: (_ for _ in ()).throw(ModelError("gone")))

    def before(call: int) -> None:
        if call == 1:
            drawing.second.wait(SOON)
            raise torch.OutOfMemoryError("full")

    decoded_by(monkeypatch, before)
    with pytest.raises(ModelError, match="gone"):
        draw("beside", beside=True)
    there = pixels_in(tmp_path / "beside")
    assert len(there) == 2
    assert there.items() <= whole.items()


@pytest.mark.parametrize(("threads", "cores", "beside"), [(1, 2, True), (2, 2, False), (4, 8, True), (5, 8, False)])
def test_a_cpu_decodes_beside_when_it_has_cores_to_spare(studio, monkeypatch: pytest.MonkeyPatch, threads: int, cores: int, beside: bool):
    monkeypatch.setattr("psutil.cpu_count", lambda logical: cores)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert studio().decodes_beside is beside
    assert not studio(roomy=False).decodes_beside

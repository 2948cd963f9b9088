"""Drawing batches: the same pixels as generate's, in any order of work, whatever fails on the way."""

import gc
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from tu_diffuse.batch import drafts
from tu_diffuse.batch.drafts import Drawn, Lost, Stepped
from tu_diffuse.batch.engine import render
from tu_diffuse.batch.items import Item
from tu_diffuse.batch.parking import forget
from tu_diffuse.batch.studio import Studio, memory_budget, model_bytes
from tu_diffuse.errors import UsageError
from tu_diffuse.pipeline.model.folder import ModelFolder
from tu_diffuse.pipeline.model.loading import load_model
from tu_diffuse.pipeline.model.place import choose_place
from tu_diffuse.pipeline.text_to_image import Picture, text_to_image
from tu_diffuse.schedulers.registry import SAMPLERS
from tu_diffuse.unet.denoiser import UNetDenoiser
from tu_diffuse.vae.codec import LatentCodec

WIDE = 1 << 40


def ignore(event: Stepped) -> None:
    """Nothing is told."""


def drawn(studio: Studio, batches: Sequence[Sequence[Item]], folder: Path, window: int = WIDE, tell: Any = ignore) -> dict[str, Drawn | Lost]:
    results = {result.item.key: result for result in render(studio, batches, window, folder, tell)}
    for batch in batches:
        forget(batch, folder)
    return results


def pixels(results: dict[str, Drawn | Lost]) -> dict[str, torch.Tensor]:
    assert all(isinstance(result, Drawn) for result in results.values()), results
    return {key: result.pixels for key, result in results.items() if isinstance(result, Drawn)}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.fixture
def mixed(items) -> list[Item]:
    return items("a", {"prompt": "bcd", "guidance": 1.0}, {"prompt": "e", "negative": "fg", "guidance": 5.0}, {"prompt": "a", "seed": 3})


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_batch_draws_what_generate_draws(items, studio, ensemble: ModelFolder, tmp_path: Path, sampler: str):
    """Prompts, negative prompts, seeds and guidance differ within the batch; the noise is bit-identical, so pixels differ by rounding only."""
    batch = items(
        {"prompt": "a", "sampler": sampler},
        {"prompt": "bcdefg", "guidance": 1.0, "sampler": sampler},
        {"prompt": "e", "negative": "fg", "guidance": 5.0, "sampler": sampler},
    )
    together = pixels(drawn(studio(), [batch], tmp_path))
    model = load_model(ensemble, device="cpu")
    for item in batch:
        alone = next(event for event in text_to_image(model, item.request) if isinstance(event, Picture))
        assert (together[item.key].int() - alone.pixels.int()).abs().max() <= 2
        assert alone.pixels.float().std() > 5
    assert not torch.equal(*(together[item.key] for item in batch[:2]))


def test_settings_say_what_was_applied(mixed, studio, ensemble: ModelFolder, tmp_path: Path):
    results = drawn(studio(), [mixed], tmp_path)
    model = load_model(ensemble, device="cpu")
    for item in mixed:
        result = results[item.key]
        assert isinstance(result, Drawn)
        alone = next(event for event in text_to_image(model, item.request) if isinstance(event, Picture))
        assert result.settings == alone.settings | {"item": item.key, "company": 3}


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "euler_a", "unipc", "heun"])
def test_expert_by_expert_gives_the_same_pixels(items, studio, tmp_path: Path, sampler: str):
    made = items("a", "b", "c", "d", "e", sampler=sampler, apg=sampler == "unipc")
    batches = [made[:2], made[2:4], made[4:]]
    straight = pixels(drawn(studio(), batches, tmp_path))
    loads: list[dict[str, int]] = []
    for window in (WIDE, 1):
        turns = studio(roomy=False)
        assert same(pixels(drawn(turns, batches, tmp_path, window)), straight)
        loads.append(turns.loads)
    assert loads[0] == {"text encoders": 1, "high": 1, "low": 1, "codec": 1}
    assert loads[1] == {"text encoders": 3, "high": 3, "low": 3, "codec": 3}
    assert not list(tmp_path.iterdir())


def test_each_text_is_read_once(items, studio, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    read: Counter[str] = Counter()
    from tu_diffuse.batch import studio as module

    def counted(readers: Any, text: Any, original: Any = module._read) -> Any:
        read[text.prompt] += 1
        return original(readers, text)

    monkeypatch.setattr(module, "_read", counted)
    made = items({"prompt": "a", "count": 3}, "b", sweep={"guidance": [1.0, 2.0]})
    drawn(studio(roomy=False), [made[:4], made[4:]], tmp_path)
    assert read == {"a": 1, "b": 1}


class StoppedError(Exception):
    """The process ends here."""


def after(steps: int) -> Any:
    """Stops at a step."""
    count = iter(range(steps))

    def tell(event: Stepped) -> None:
        if next(count, None) is None:
            raise StoppedError

    return tell


@pytest.mark.parametrize("steps", [0, 1, 2, 4, 5, 7])
def test_a_window_is_taken_up_where_it_was_left(items, studio, tmp_path: Path, steps: int):
    made = items("a", "b", "c", sampler="euler_a")
    batches = [made[:2], made[2:]]
    straight = pixels(drawn(studio(), batches, tmp_path))
    with pytest.raises(StoppedError):
        drawn(studio(roomy=False), batches, tmp_path, tell=after(steps))
    told: list[Stepped] = []
    assert same(pixels(drawn(studio(roomy=False), batches, tmp_path, tell=told.append)), straight)
    assert len(told) <= 8 - steps + 4  # what was repeated is at most one stage of one batch
    assert not list(tmp_path.iterdir())


def test_a_damaged_parked_draft_is_drawn_anew(items, studio, tmp_path: Path):
    made = items("a", "b", sampler="euler_a")
    straight = pixels(drawn(studio(), [made], tmp_path))
    for damage in (b"", b"\xff" * 100):
        with pytest.raises(StoppedError):
            drawn(studio(roomy=False), [made], tmp_path, tell=after(3))
        parked = list(tmp_path.glob(".parked-*"))
        assert len(parked) == 1
        parked[0].write_bytes(damage)
        assert same(pixels(drawn(studio(roomy=False), [made], tmp_path)), straight)


def failing(monkeypatch: pytest.MonkeyPatch, fits: int, error: Exception) -> list[int]:
    """Networks that take at most `fits` rows; returns the sizes that they were asked for."""
    asked: list[int] = []
    original = UNetDenoiser.__call__

    def call(self: UNetDenoiser, x: torch.Tensor, sigma: torch.Tensor, conditioning: Any) -> torch.Tensor:
        asked.append(len(x))
        if len(x) > fits:
            raise error
        return original(self, x, sigma, conditioning)

    monkeypatch.setattr(UNetDenoiser, "__call__", call)
    return asked


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
@pytest.mark.parametrize("sampler", ["dpmpp_2m", "euler_a"])
def test_out_of_memory_halves_the_batch(items, studio, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception, sampler: str):
    made = items("a", "b", "c", "d", "e", sampler=sampler)
    whole = pixels(drawn(studio(), [made], tmp_path))
    asked = failing(monkeypatch, fits=4, error=error)  # two pictures, guided
    results = drawn(studio(), [made], tmp_path)
    assert max(asked) == 10
    for key, picture in pixels(results).items():
        assert (picture.int() - whole[key].int()).abs().max() <= 2
    assert all("batch-halved" in result.settings["fallbacks"] for result in results.values() if isinstance(result, Drawn))


def test_what_does_not_fit_alone_is_lost(items, studio, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    made = items("a", {"prompt": "b", "guidance": 1.0}, "c")
    failing(monkeypatch, fits=1, error=MemoryError())  # only an unguided picture
    for roomy in (True, False):
        results = drawn(studio(roomy=roomy), [made], tmp_path)
        assert [type(results[item.key]) for item in made] == [Lost, Drawn, Lost]
        assert "cpu ran out of memory at one picture of 32×32" in str(results[made[0].key])


CALLS = {"text": (Studio, "read", 3), "step": (UNetDenoiser, "__call__", 4), "codec": (LatentCodec, "decode", 3)}  # of three pictures, four steps


@pytest.mark.parametrize("roomy", [True, False])
@pytest.mark.parametrize("where", CALLS)
def test_memory_runs_out_once_at_every_call(items, studio, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, where: str, roomy: bool):
    """A step is tried again with half of the batch; a text or a decoding costs its picture. What the failed call held is let go."""
    made = items("a", "b", "c")
    whole = pixels(drawn(studio(), [made], tmp_path))
    owner, name, calls = CALLS[where]
    original = getattr(owner, name)
    for failing in range(1, calls + 1):
        number, held = count(1), list[Any]()

        def call(self: Any, given: Any, *rest: Any, number: Any = number, failing: int = failing, held: list[Any] = held) -> Any:
            if next(number) == failing:
                held.append(weakref.ref(given))
                raise torch.OutOfMemoryError("full")
            return original(self, given, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, call)
            results = drawn(studio(roomy=roomy), [made], tmp_path)
        lost = [item for item in made if isinstance(results[item.key], Lost)]
        assert lost == ([] if where == "step" else [made[failing - 1]])
        for item in made:
            result = results[item.key]
            if isinstance(result, Drawn):
                assert (result.pixels.int() - whole[item.key].int()).abs().max() <= (0 if where == "codec" else 2)
                assert ("batch-halved" in result.settings["fallbacks"]) == (where == "step")
        gc.collect()
        assert len(held) == 1
        assert where == "text" or held[0]() is None  # a text's request is the test's own


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "euler_a"])
def test_a_step_that_is_not_finite_costs_its_row(items, studio, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, sampler: str):
    made = items("a", "b", "c", sampler=sampler, guidance=1.0)
    whole = pixels(drawn(studio(), [made], tmp_path))
    original = UNetDenoiser.__call__
    for step in range(1, 5):
        for row in range(3):
            number = count(1)

            def broken(self: UNetDenoiser, *arguments: Any, number: Any = number, step: int = step, row: int = row) -> torch.Tensor:
                x0 = original(self, *arguments)
                if next(number) == step:
                    x0[row, 0, 3, 3] = float("nan") if step % 2 else float("inf")
                return x0

            with monkeypatch.context() as patch:
                patch.setattr(UNetDenoiser, "__call__", broken)
                results = drawn(studio(), [made], tmp_path)
            assert isinstance(results.pop(made[row].key), Lost)
            others = {item.key: whole[item.key] for item in made if item != made[row]}
            assert same(pixels(results), others)


def test_other_errors_are_not_hidden(items, studio, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    failing(monkeypatch, fits=0, error=RuntimeError("shapes"))
    with pytest.raises(RuntimeError, match="shapes"):
        drawn(studio(), [items("a")], tmp_path)


@pytest.mark.parametrize("where", ["text", "step", "codec"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_costs_one_picture(items, studio, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, where: str, value: float):
    made = items("a", "bad", "c", sampler="euler_a", guidance=1.0)
    whole = pixels(drawn(studio(), [made], tmp_path))
    bad = made[1]
    if where == "text":
        original = Studio.read

        def read(self: Studio, request: Any, part: Any) -> Any:
            said = original(self, request, part)
            if request.prompt == "bad":
                for one in said.values():
                    one.prompt.tokens[:] = value
            return said

        monkeypatch.setattr(Studio, "read", read)
    elif where == "step":
        call = UNetDenoiser.__call__

        def broken(self: UNetDenoiser, x: torch.Tensor, sigma: torch.Tensor, conditioning: Any) -> torch.Tensor:
            x0 = call(self, x, sigma, conditioning)
            x0[1] = value
            return x0

        monkeypatch.setattr(UNetDenoiser, "__call__", broken)
    else:
        draft = drafts.advance

        def spoiled(*arguments: Any) -> Any:
            done = draft(*arguments)
            done.latents[1] = value
            return done

        monkeypatch.setattr("tu_diffuse.batch.engine.advance", spoiled)
    results = drawn(studio(), [made], tmp_path)
    assert isinstance(results[bad.key], Lost)
    for item in (made[0], made[2]):
        result = results[item.key]
        assert isinstance(result, Drawn)
        assert torch.equal(result.pixels, whole[item.key])


def test_words_beyond_the_limit_cost_a_strict_line_only(items, studio, tmp_path: Path):
    long = "word " * 30
    made = items({"prompt": long, "strict": True}, {"prompt": long}, "a")
    results = drawn(studio(), [made], tmp_path)
    assert isinstance(results[made[0].key], Lost)
    told = results[made[1].key]
    assert isinstance(told, Drawn)
    assert told.settings["truncated"]
    assert isinstance(results[made[2].key], Drawn)
    assert all(isinstance(result, Lost) for result in drawn(studio(), [made[:1]], tmp_path).values())


def test_memory(ensemble: ModelFolder):
    place = choose_place(device="cpu")
    size = sum(part["parameters"] for part in _parts(ensemble))
    assert model_bytes(ensemble, place) == 4 * size > 10_000
    assert memory_budget(0.5, place) == 2**29
    assert 2**20 < memory_budget(None, place) < 2**50
    for wrong in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(UsageError):
            memory_budget(wrong, place)


def _parts(folder: ModelFolder) -> Iterator[dict[str, Any]]:
    from tu_diffuse.pipeline.model.describe import describe

    facts = describe(folder)
    yield from facts["parts"]
    yield from facts["experts"]

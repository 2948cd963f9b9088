"""From lines to items to a plan: seeds, keys, names, and what a changed file keeps."""

import json
import unicodedata
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tu_diffuse.batch.items import Item, make_items
from tu_diffuse.batch.lines import Line
from tu_diffuse.batch.plan import Plan, extend, load_plan, save_plan
from tu_diffuse.errors import DataError
from tu_diffuse.pipeline.model.folder import ModelFolder
from tu_diffuse.pipeline.output import MAX_NAME_BYTES
from tu_diffuse.pipeline.request import DRAWING, GUIDING, READING, Request

MODEL = "m" * 64


def keys(plan: Plan) -> list[list[str]]:
    return [[planned.item.key for planned in batch] for batch in plan.batches]


def test_seeds_come_from_the_line(items):
    made = items("a", "b", "a", {"prompt": "a", "seed": 7, "count": 2}, {"prompt": "a", "seeds": (5, 3)})
    first, second, third, *named = made
    assert [item.seed for item in named] == [7, 8, 5, 3]
    assert len({first.seed, second.seed, third.seed}) == 3
    # A line keeps its seed wherever it stands, whatever its other settings are; equal lines are told apart by their order.
    moved = items("b", "new", {"prompt": "a", "steps": 3}, {"prompt": "a", "guidance": 1.0})
    assert [item.seed for item in moved[2:]] == [first.seed, third.seed]
    assert moved[0].seed == second.seed
    assert len({item.key for item in made}) == len(made)


def test_equal_lines_are_two_pictures(items):
    one, other = items({"prompt": "a", "seed": 1}, {"prompt": "a", "seed": 1})
    assert one.request == other.request
    assert one.key != other.key


def test_a_sweep_multiplies_and_keeps_the_seed(items):
    made = items({"prompt": "a", "count": 2, "guidance": 9.0}, sweep={"guidance": [1.0, 3.0], "steps": [2, 3]})
    assert [(i.request.guidance, i.request.steps) for i in made[::2]] == [(1.0, 2), (1.0, 3), (3.0, 2), (3.0, 3)]
    assert len({item.seed for item in made}) == 2


def test_what_decides_a_picture_is_in_its_key(items, ensemble: ModelFolder):
    base = items({"prompt": "a", "seed": 1})[0].key
    others = [{"steps": 3}, {"guidance": 2.0}, {"negative": "b"}, {"seed": 2}, {"name": "x{number}"}, {"format": "webp"}, {"width": 48}]
    assert len({base, *(items({"prompt": "a", "seed": 1, **other})[0].key for other in others)}) == len(others) + 1
    line = Line(1, {"prompt": "a", "seed": 1}, {})
    made, _ = make_items(ensemble, [line], defaults={}, sweep={}, circumstances={"dtype": "bfloat16"})
    assert made[0].key != base
    made, _ = make_items(replace(ensemble, fingerprint=MODEL), [line], defaults={}, sweep={}, circumstances={})
    assert made[0].key != base


def test_what_the_model_cannot_do_is_a_problem_of_its_line(ensemble: ModelFolder):
    lines = [Line(2, {"prompt": "a", "width": 33}, {"prompt": 1, "width": 12}), Line(3, {"prompt": "b"}, {"prompt": 1})]
    made, problems = make_items(ensemble, lines, defaults={}, sweep={}, circumstances={})
    assert [item.line for item in made] == [3]
    assert [(p.line, p.column) for p in problems] == [(2, 12)]
    assert "--width 33" in problems[0].message


def test_batches_hold_what_can_be_computed_together(items):
    mixed = items("a", {"prompt": "b", "guidance": 1.0}, {"prompt": "c", "steps": 3}, {"prompt": "d", "negative": "e"}, {"prompt": "f", "width": 48})
    a, b, c, d, f = (item.key for item in mixed)
    assert keys(extend(Plan(MODEL), mixed, None)) == [[a, b, d], [c], [f]]
    assert keys(extend(Plan(MODEL), mixed, 2)) == [[a, b], [d], [c], [f]]


def test_a_changed_file_keeps_what_is_unchanged(items):
    old = extend(Plan(MODEL), items("a", "b", "c", "d"), 2)
    new = extend(old, items("new", "a", "c", {"prompt": "d", "steps": 3}), 2)
    by_key = {planned.item.key: planned for batch in old.batches for planned in batch}
    # c and d were computed together and stay so, though only c is asked for; the new items come last, under new numbers.
    assert keys(new)[:2] == keys(old)
    assert [[p.wanted for p in batch] for batch in new.batches] == [[True, False], [True, False], [True], [True]]
    assert all(by_key[p.item.key].name == p.name for batch in new.batches[:2] for p in batch)
    assert [batch[0].name[:5] for batch in new.batches[2:]] == ["00005", "00006"]
    assert [planned.item.line for planned in new.wanted] == [2, 3, 1, 4]
    # When nothing of a batch is asked for it goes; asking again for what has gone plans it anew.
    shorter = extend(new, items("a"), 2)
    assert keys(shorter) == keys(old)[:1]
    assert extend(shorter, items("a", "c"), 2).wanted[1].name.startswith("00007")


def test_the_plan_is_stored_whole(items, tmp_path: Path):
    made = items({"prompt": "ü", "sigmas": (8.0, 2.0)}, {"prompt": "b", "guidance_interval": (0.1, 5.0), "eta": 0.5, "sampler": "ddim"})
    plan = extend(Plan(MODEL), made, None)
    save_plan(plan, tmp_path)
    assert load_plan(tmp_path, MODEL) == plan
    assert load_plan(tmp_path, "other") == Plan("other", numbered=2)
    assert load_plan(tmp_path / "nothing", MODEL) == Plan(MODEL)
    for broken in ("{", "[]", json.dumps({"version": 1}), json.dumps({"version": 9, "model": MODEL})):
        (tmp_path / "plan.json").write_text(broken)
        with pytest.raises(DataError) as raised:
            load_plan(tmp_path, MODEL)
        assert "\n" not in str(raised.value)


def test_names_are_unique_on_systems_that_ignore_case(items):
    made = items(*({"prompt": prompt, "seed": 1, "name": "{prompt}"} for prompt in ("Straße", "STRASSE", "strasse", "é", "é", "CON")))
    names = [planned.name for planned in extend(Plan(MODEL), made, None).wanted]
    assert len({unicodedata.normalize("NFC", name).casefold() for name in names}) == 6
    assert names[-1] == "con_.png"


@settings(max_examples=300, deadline=None)
@given(st.lists(st.text(min_size=1, max_size=300).filter(str.strip), min_size=1, max_size=40))
def test_any_prompt_gives_a_usable_name(prompts: list[str]):
    plan = extend(Plan(MODEL), [bare_item(prompt, i) for i, prompt in enumerate(prompts)], None)
    names = [planned.name for planned in plan.wanted]
    assert len({unicodedata.normalize("NFC", name).casefold() for name in names}) == len(prompts)
    for name in names:
        assert len(name.encode()) <= MAX_NAME_BYTES
        assert Path(name).name == name
        assert name[5] == "-"
        assert name.isprintable()


def bare_item(prompt: str, i: int) -> Item:
    """An item without a model."""
    given: dict[str, Any] = dict.fromkeys(Request.__dataclass_fields__)
    request = Request(**{**given, "prompt": prompt, "seeds": (i,), "width": 32, "height": 32})
    return Item(f"{i:032x}", i + 1, request, "{number}-{prompt}-{seed}", "png")


def test_a_new_setting_is_put_on_a_list_or_treated_by_itself():
    """By plans, replay and galleries: what stands on no list is named in each of them."""
    alone = {"prompt", "negative", "seeds", "guidance", "expert_guidance", "strict", "loras", "embeddings", "template"}
    pictures = {"edit", "upscale", "tile", "control"}
    assert sorted([*DRAWING, *GUIDING, *READING, *alone, *pictures]) == sorted(field.name for field in fields(Request))

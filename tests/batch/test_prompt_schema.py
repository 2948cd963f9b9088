"""Prompt files: the schema and the documentation say what the reader does, and every format comes back as it was written."""

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from prompt_reading import read, values
from tu_diffuse.batch.options import BY_NAME, OPTIONS, Option, schema, table
from tu_diffuse.batch.prompt_file import Kind

VALIDATOR = Draft202012Validator(schema())
DOCS = Path(__file__).parents[2] / "docs" / "prompt-files.md"

# Round trips

TEXT = st.text(st.characters(exclude_categories=["Cc", "Cs"], exclude_characters="\ufffd"), min_size=1, max_size=40).filter(lambda text: text.strip())


def _values_of(option: Option) -> st.SearchStrategy[Any]:
    if option.name == "name":
        return st.lists(st.sampled_from(["{prompt}", "{seed}", "{number}", "a", "b c", "-1"]), min_size=1).map(lambda parts: "x" + "".join(parts))
    if option.name in ("lora", "embedding"):
        return st.lists(st.sampled_from(["style.safetensors", "a b.safetensors:-0.8", "x@high", "C:\\y:1@low"]), min_size=1, max_size=3).map(tuple)
    if option.kind == "text":
        return TEXT
    if option.kind == "flag":
        return st.booleans()
    if option.choices:
        return st.sampled_from(option.choices)
    high = option.high
    number = st.integers(int(option.low or 0), int(high or 0)) if option.kind == "integer" else st.floats(option.low, high, allow_infinity=False)
    if option.items is None:
        return number
    if option.name == "guidance_interval":
        return st.lists(number, min_size=2, max_size=2, unique=True).map(lambda pair: tuple(sorted(pair)))
    lists = st.lists(number, min_size=option.items[0], max_size=5, unique=True)
    return (
        lists.map(tuple)
        if option.name == "seeds"
        else lists.map(lambda levels: tuple(sorted(levels, reverse=True))).filter(lambda levels: levels[0] > 0)
    )


def _one_way_of_seeding(line: dict[str, Any]) -> dict[str, Any]:
    if "seeds" in line or line.get("seed", 0) + line.get("count", 1) > 2**32:
        return {name: value for name, value in line.items() if name not in ("seed", "count")}
    return line


LINES = st.lists(
    st.fixed_dictionaries({"prompt": TEXT}, optional={option.name: _values_of(option) for option in OPTIONS[1:]}).map(_one_way_of_seeding), max_size=2
)


def _as_text(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(part if isinstance(part, str) else repr(part) for part in value)
    return value if isinstance(value, str) else repr(value)


@given(lines=LINES)
def test_jsonl_round_trip_and_schema(lines: list[dict[str, Any]]):
    assert values("\n".join(map(json.dumps, lines)), "jsonl") == lines
    for line in lines:
        VALIDATOR.validate(json.loads(json.dumps(line)))


@given(
    lines=LINES,
    kind=st.sampled_from(["csv", "tsv"]),
    newline=st.sampled_from(["\n", "\r\n", "\r"]),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
)
def test_table_round_trip(lines: list[dict[str, Any]], kind: Kind, newline: str, quoting: int):
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(BY_NAME), delimiter="," if kind == "csv" else "\t", lineterminator=newline, quoting=quoting)
    writer.writeheader()
    lines = [{name: value for name, value in line.items() if not isinstance(value, str) or value.strip()} for line in lines]
    quoted = [{name: _as_text(value) for name, value in line.items()} for line in lines]
    writer.writerows(quoted)
    assert values(out.getvalue(), kind) == lines


@given(lines=LINES, short=st.booleans())
def test_text_round_trip(lines: list[dict[str, Any]], short: bool):
    def escaped(text: str) -> str:
        return re.sub(r"(?<!\S)(?=\\*--)|^(?=\\*#)", r"\\", text)

    lines = [{name: value.strip() if isinstance(value, str) else value for name, value in line.items()} for line in lines]
    written: list[str] = []
    for line in lines:
        parts = [escaped(line["prompt"])]
        for name, value in line.items():
            if name != "prompt":
                flag = BY_NAME[name].flags[0] if short and BY_NAME[name].flags and name != "seeds" else name.replace("_", "-")
                parts.append(f"--{flag} {escaped(_as_text(value))}")
        written.append(" ".join(parts))
    assert values("\n".join(written), "txt") == lines


# Schema, documentation, house

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5)
    | st.sampled_from(["heun", "png", 0, 1, 0.5]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@given(name=st.sampled_from([*BY_NAME, "promt"]), value=JSON)
def test_the_schema_takes_what_the_reader_takes(name: str, value: Any):
    line = {"prompt": "a cat", name: value}
    taken = read(json.dumps(line), "jsonl").problems == ()
    valid = VALIDATOR.is_valid(line)
    if name in BY_NAME and BY_NAME[name].check is not None:
        assert valid or not taken
    else:
        assert valid == taken


@pytest.mark.parametrize(
    ("line", "valid"),
    [
        ({"seed": 1}, False),
        ({"prompt": "a", "seeds": [1], "seed": 1}, False),
        ({"prompt": "a", "seeds": [1], "count": 1}, False),
        ({"prompt": "a", "seeds": [1, 1]}, False),
        ({"prompt": " "}, False),
        ({"prompt": "a" * 4001}, False),
        ({"prompt": "a", "sigmas": []}, False),
        ({"prompt": "a", "seeds": [1], "seed": None}, True),
        ({"prompt": "a", "seeds": None, "seed": 1, "count": 2}, True),
        ({"prompt": "a", "sampler": None, "negative": ""}, True),
    ],
)
def test_the_schema_and_the_reader_agree(line: dict[str, Any], valid: bool):
    Draft202012Validator.check_schema(schema())
    assert VALIDATOR.is_valid(line) == valid
    assert (read(json.dumps(line), "jsonl").problems == ()) == valid


def test_every_property_is_described():
    properties = schema()["properties"]
    assert list(properties) == list(BY_NAME)
    assert all(properties[name]["description"] == option.help for name, option in BY_NAME.items())


def test_the_documentation_has_the_table_and_its_examples_are_right():
    text = DOCS.read_text(encoding="utf-8")
    assert f"\n{table()}\n" in text
    kinds: dict[str, Kind] = {"text": "txt", "json": "jsonl", "csv": "csv"}
    examples = re.findall(r"```(\w+)\n(.*?)```", text, re.DOTALL)
    assert {language for language, _ in examples} == set(kinds)
    read_lines = [line for language, example in examples for line in values(example, kinds[language])]
    assert len(read_lines) == 11
    assert {"prompt": "#1 dad on a mug"} in read_lines
    assert {"prompt": "a poster that says --force, on a wall"} in read_lines
    assert {"prompt": 'the word "hi" on\ntwo lines', "seed": 9} in read_lines

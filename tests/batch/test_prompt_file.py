"""Prompt files: every format, every kind of damage, and that the documentation and the schema say what the reader does."""

import csv
import io
import json
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from tu_diffuse.batch.options import BY_NAME, OPTIONS, Option, from_json, from_text, schema, table
from tu_diffuse.batch.prompt_file import KINDS, Kind, PromptFile, kind_of, read_prompts, sniff
from tu_diffuse.errors import UsageError

VALIDATOR = Draft202012Validator(schema())
DOCS = Path(__file__).parents[2] / "docs" / "prompt-files.md"


def read(text: str | bytes, kind: Kind) -> PromptFile:
    return read_prompts(text.encode() if isinstance(text, str) else text, kind)


def values(text: str | bytes, kind: Kind) -> list[dict[str, Any]]:
    file = read(text, kind)
    assert file.problems == ()
    return [dict(line.values) for line in file.lines]


def the_problem(text: str | bytes, kind: Kind) -> tuple[int, int, str]:
    file = read(text, kind)
    assert len(file.problems) == 1, file.problems
    (problem,) = file.problems
    return problem.line, problem.column, problem.message


# Text


def test_flags_short_and_long():
    long = "--negative blurry, grey --width 64 --height 96 --steps 5 --seed 7 --guidance 5.5 --sampler heun"
    short = "--n blurry, grey --W 64 --h 96 --s 5 --d 7 --l 5.5 --ss heun"
    wanted = {
        "prompt": "a red apple",
        "negative": "blurry, grey",
        "width": 64,
        "height": 96,
        "steps": 5,
        "seed": 7,
        "guidance": 5.5,
        "sampler": "heun",
    }
    assert values(f"a red apple {long}\n  a red apple\t{short}  \n", "txt") == [wanted, wanted]


def test_lines_are_numbered_as_in_the_file_and_values_have_columns():
    file = read("# comment\n\n  a cat  --d 1,2 --guidance-rescale 0.7 --apg\n   # another --nonsense\n--steps 4 --prompt a dog", "txt")
    first, second = file.lines
    assert (first.number, second.number) == (3, 5)
    assert first.values == {"prompt": "a cat", "seeds": (1, 2), "guidance_rescale": 0.7, "apg": True}
    assert first.columns == {"prompt": 3, "seeds": 14, "guidance_rescale": 37, "apg": 41}
    assert second.values == {"steps": 4, "prompt": "a dog"}


@pytest.mark.parametrize(
    ("line", "prompt"),
    [
        ("a well--known -- thing --5", "a well--known -- thing --5"),
        (r"a \--flag and \\--two \x", r"a --flag and \--two \x"),
        (r"\#1 of \#2", r"#1 of \#2"),
        (r"\\#1", r"\#1"),
        ('"quoted" --steps 4', '"quoted"'),
        ("　全角の空白　--steps 4", "全角の空白"),
    ],
)
def test_text_that_looks_like_flags(line: str, prompt: str):
    assert values(line, "txt")[0]["prompt"] == prompt


@pytest.mark.parametrize(
    ("line", "column", "part"),
    [
        ("a cat --promt x", 7, "--promt is not known; did you mean prompt?"),
        ("a cat --seed=7", 7, "--seed=7 is not known; did you mean seed?"),
        ("a cat --xyzzy 7", 7, "use one of prompt, negative"),
        ("a cat --steps", 7, "steps has no value; give a whole number from 1 to 1000"),
        ("a cat --steps --seed 3", 7, "steps has no value"),
        ("a cat --n --seed 3", 7, "negative has no value"),
        ("a cat --steps 5 --s 6", 17, "--s comes a second time"),
        ("a cat --seed 4 --d 1,2", 14, "seed and seeds contradict"),
        ("--seed 4", 1, "no prompt"),
        ("a cat --steps 5.5", 15, "'5.5' cannot be used; give a whole number from 1 to 1000"),
        ("a cat --steps 1001", 15, "1001 is out of range"),
        ("a cat --w ５１２", 11, "cannot be used"),
        ("a cat --seed 1_000", 14, "cannot be used"),
        ("a cat --l nan", 11, "cannot be used"),
        ("a cat --l 1e999", 11, "inf is out of range"),
        ("a cat --sampler plms", 17, "use one of euler, euler_a"),
        ("a cat --apg maybe", 13, "true or false"),
        ("a cat --sigmas 1,2", 16, "do not fall"),
        ("a cat --sigmas 1,,0.5", 16, "'' cannot be used"),
        ("a cat --guidance-interval 5,1", 27, "lower one first"),
        ("a cat --guidance-interval 5", 27, "1 items; give 2 numbers"),
        ("a cat --seeds 1,2,1", 15, "1 twice"),
        ("a cat --seed 4294967295 --count 2", 33, "passes the last seed"),
        ("a cat --name ../x", 14, "no file name"),
        ("a cat --name {steps}", 14, "not known"),
        ("a c\x00at", 1, "U+0000 at position 3"),
        ("a" * 4001, 1, "4001 characters"),
    ],
)
def test_problems_of_text_lines(line: str, column: int, part: str):
    number, at, message = the_problem(f"a dog\n{line}\na cow\n", "txt")
    assert (number, at) == (2, column)
    assert part in message
    assert message.endswith((".", "?"))


def test_all_problems_of_a_line_come_at_once():
    file = read("a cat --steps x --foo 1 --width 0", "txt")
    assert [problem.column for problem in file.problems] == [15, 17, 33]
    assert file.bad_lines == (1,)
    assert file.lines == ()


# JSON Lines


@pytest.mark.parametrize(
    ("line", "column", "part"),
    [
        ('{"prompt": "a", "promt": 1}', 17, "'promt' is not known; did you mean prompt?"),
        ('{"prompt": "a", "guidance-rescale": 1}', 17, "did you mean guidance_rescale?"),
        ('{"prompt": "a", "seed": true}', 25, "seed is true; give a whole number from 0 to 4294967295"),
        ('{"prompt": "a", "seed": "7"}', 25, "seed is the text '7'"),
        ('{"prompt": "a", "seed": 7.5}', 25, "7.5 is not a whole number"),
        ('{"prompt": "a", "seed": -1}', 25, "-1 is out of range"),
        ('{"prompt": "a", "seed": ' + "9" * 5000 + "}", 25, "inf is out of range"),
        ('{"prompt": "a", "seed": ' + "9" * 399 + "}", 25, "1e+300 is out of range"),
        ('{"prompt": "a", "guidance": NaN}', 29, "nan is out of range"),
        ('{"prompt": "a", "guidance": -Infinity}', 29, "-inf is out of range"),
        ('{"prompt": "a", "guidance": 1e999}', 29, "inf is out of range"),
        ('{"prompt": "a", "seeds": 3}', 26, "seeds is the number 3; give 1 to 10000 whole numbers"),
        ('{"prompt": "a", "seeds": []}', 26, "0 items"),
        ('{"prompt": "a", "seeds": [1, null]}', 26, "holds null"),
        ('{"prompt": "a", "apg": 1}', 24, "give true or false"),
        ('{"prompt": 7}', 12, "prompt is the number 7; give text"),
        ('{"prompt": {"a": [1]}}', 12, "an object"),
        ('{"prompt": "a", "prompt": "b"}', 17, "'prompt' comes a second time"),
        ('{"prompt": null}', 1, "no prompt"),
        ("{}", 1, "no prompt"),
        ('{"prompt": "  "}', 12, "empty"),
        (r'{"prompt": "a \ud83d b"}', 12, "U+D83D"),
        (r'{"prompt": "a\u0000"}', 12, "U+0000"),
        (r'{"prompt": "a", "name": "\ud83d"}', 25, "U+D83D"),
        ('{"prompt": "a", "seeds": ' + "[" * 100_000, 26, "nested too deeply"),
        ('["a"]', 1, "not a JSON object"),
        ("a cat", 1, "not a JSON object"),
        ('{"prompt": "a"', 15, "comma or the closing brace"),
        ('{"prompt": "a",}', 16, "a key in double quotes"),
        ("{'prompt': 'a'}", 2, "a key in double quotes"),
        ('{"prompt" "a"}', 11, "colon"),
        ('{"prompt": a}', 12, "not valid JSON"),
        ('{"prompt": ', 12, "not valid JSON"),
        ('{"prompt": "a}', 12, "not valid JSON"),
        ('{"prompt": "a\tb"}', 14, "not valid JSON"),
        ('{"prompt": "a"} {"prompt": "b"}', 17, "one object a line"),
    ],
)
def test_problems_of_json_lines(line: str, column: int, part: str):
    number, at, message = the_problem('{"prompt": "a dog"}\n' + line + '\n{"prompt": "a cow"}', "jsonl")
    assert (number, at) == (2, column)
    assert part in message


def test_json_values():
    (line,) = read(
        '\n  {"prompt": "a\\n\\ud83d\\ude00", "seed": 7.0, "count": null, "guidance": 3, "sigmas": [3, 1.5, 0], "apg": false, "negative": ""} ',
        "jsonl",
    ).lines
    assert line.number == 2
    assert line.values == {"prompt": "a\n😀", "seed": 7, "guidance": 3.0, "sigmas": (3.0, 1.5, 0.0), "apg": False, "negative": ""}
    assert [type(line.values[name]) for name in ("seed", "guidance")] == [int, float]
    assert line.columns["seed"] == 41


# Tables


def test_records_with_newlines_and_quotes():
    text = '\n prompt ,guidance-rescale,count,apg\r\n"a ""b""\nc, d",0.5,,TRUE\r\n\r\n,,,\r\n5" nail, ,2,0\r\n'
    file = read(text, "csv")
    assert file.problems == ()
    first, second = file.lines
    assert first.values == {"prompt": 'a "b"\nc, d', "guidance_rescale": 0.5, "apg": True}
    assert second.values == {"prompt": '5" nail', "count": 2, "apg": False}
    assert (first.number, second.number) == (3, 7)
    assert first.columns == {"prompt": 1, "guidance_rescale": 16, "apg": 21}


@pytest.mark.parametrize(
    ("header", "column", "part"),
    [
        ("prompt,sed", 8, "the column 'sed' is not known; did you mean seed?"),
        ("prompt,seed,seed", 13, "seed comes a second time"),
        ("guidance-rescale,prompt,guidance_rescale", 25, "guidance_rescale comes a second time"),
        ("seed", 1, "no column prompt"),
        ("prompt,", 8, "the column '' is not known"),
        ('prompt,"seed', 8, "never ends"),
    ],
)
def test_a_wrong_header_spoils_the_file(header: str, column: int, part: str):
    file = read(f"{header}\na cat,1\na dog,2\n", "csv")
    assert file.lines == ()
    (problem,) = file.problems
    assert (problem.line, problem.column) == (1, column)
    assert part in problem.message


@pytest.mark.parametrize("text", ["", "\n \n", "\ufeff"])
def test_a_table_without_header(text: str):
    assert "no header" in the_problem(text, "tsv")[2]


@pytest.mark.parametrize(
    ("line", "column", "part"),
    [
        ("a cat", 1, "1 fields and the header 2"),
        ("a cat,1,2", 9, "3 fields and the header 2"),
        ("a cat,x", 7, "'x' cannot be used"),
        (",3", 1, "no prompt"),
        ('"a cat,3', 1, "never ends"),
        ('"a" cat,3', 1, "goes on after its closing quote"),
        ('a cat, "3"', 7, "a space stands before"),
    ],
)
def test_problems_of_records(line: str, column: int, part: str):
    text = f"prompt,seed\na dog,1\n{line}\na cow,2\n"
    number, at, message = the_problem(text, "csv")
    assert (number, at) == (3, column)
    assert part in message
    assert [good.number for good in read(text, "csv").lines] == [2, 4]


def test_a_stray_quote_costs_one_line_only():
    file = read('prompt\n"a cat\na dog\n"a ""cow""\nand more"\na hen\n', "csv")
    assert file.bad_lines == (2,)
    assert [(line.number, line.values["prompt"]) for line in file.lines] == [(3, "a dog"), (4, 'a "cow"\nand more'), (6, "a hen")]


# Encodings


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_encodings_and_newlines(encoding: str, newline: str):
    mark = "\ufeff" if encoding.endswith(("le", "be")) else ""
    lines = {
        "txt": ["ein grüner Apfel 😀 --seed 7", "", "two\u2028three\x85".rstrip("\x85") + " --steps 4"],
        "jsonl": ['{"prompt": "ein grüner Apfel 😀", "seed": 7}', "", '{"prompt": "two\u2028three", "steps": 4}'],
        "csv": ["prompt,seed,steps", "ein grüner Apfel 😀,7,", "", "two\u2028three,,4"],
        "tsv": ["prompt\tseed\tsteps", "ein grüner Apfel 😀\t7\t", "", "two\u2028three\t\t4"],
    }
    for kind in KINDS:
        file = read((mark + newline.join(lines[kind])).encode(encoding), kind)
        assert file.problems == ()
        assert [dict(line.values) for line in file.lines] == [{"prompt": "ein grüner Apfel 😀", "seed": 7}, {"prompt": "two\u2028three", "steps": 4}]
        assert [line.number for line in file.lines] == ([2, 4] if kind in ("csv", "tsv") else [1, 3])


@pytest.mark.parametrize(
    ("bad", "column", "part"),
    [
        (b"\xc3\xa9 caf\xe9 x", 6, "the byte 0xE9"),
        (b"a \xed\xa0\x80", 3, "the byte 0xED"),
        (b"a \xc0\x80", 3, "the byte 0xC0"),
        ("a \ufffd".encode(), 3, "U+FFFD"),
    ],
)
def test_bad_bytes_spoil_their_own_line(bad: bytes, column: int, part: str):
    for kind, good, prefix, header in (
        ("txt", b"a dog", b"", b""),
        ("jsonl", b'{"prompt": "a dog"}', b'{"prompt": "', b""),
        ("csv", b"a dog", b"", b"prompt\n"),
    ):
        data = header + good + b"\n" + prefix + bad + (b'"}' if prefix else b"") + b"\n" + good
        first = 2 if header else 1
        number, at, message = the_problem(data, kind)
        assert (number, at) == (first + 1, column + len(prefix))
        assert part in message
        assert [line.number for line in read(data, kind).lines] == [first, first + 2]


def test_broken_utf_16_and_utf_32():
    lone = "a cat\n".encode("utf-16") + b"\x3d\xd8" + " b\na dog\n".encode("utf-16-le")
    assert the_problem(lone, "txt")[:2] == (2, 1)
    assert the_problem("a cat\na dog".encode("utf-16") + b"x", "txt")[:2] == (2, 6)
    assert len(read(lone, "txt").lines) == 2
    assert "UTF-32" in the_problem("a cat".encode("utf-32"), "txt")[2]
    assert read("a cat\n# caf\xe9\n".encode("latin-1"), "txt").problems == ()


# All together

BAD: dict[Kind, list[str | bytes]] = {
    "txt": ["a --sed 1", "a --steps", "a --d 1 --d 2", "--l 3", "a \x07", b"a \xff", "a --w 0", "b" * 5000, "a --name a/b", "a --sigmas 1,2"],
    "jsonl": [
        '{"prompt": "a"',
        "[]",
        '{"prompt": true}',
        '{"p": 1, "prompt": "a"}',
        b'{"prompt": "\xff"}',
        '{"prompt": "a", "prompt": "a"}',
        "x",
        "{}",
    ],
    "csv": ['"a,1,2', '"a"b,1,2', "a,1", "a,1,2,3", ",1,2", "a,b,2", "a,1,-1", b"a\xff,1,2", "a\x00,1,2", ' "a",1,2'],
    "tsv": ['"a\t1\t2', "a\t1", "a\t1\t2\t3", "\t1\t2", "a\tb\t2", "a\t1\t1e9", b"\xff\t1\t2"],
}
GOOD: dict[Kind, str] = {
    "txt": "a cat {i} --seed {i} --l 2.5",
    "jsonl": '{{"prompt": "a cat {i}", "seed": {i}, "guidance": 2.5}}',
    "csv": "a cat {i},{i},2.5",
    "tsv": "a cat {i}\t{i}\t2.5",
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_thousand_lines_with_fifty_bad_ones(kind: Kind, seed: int):
    bad = set(random.Random(seed).sample(range(1000), 50))
    sorts = iter([*BAD[kind]] * 50)
    lines = [next(sorts) if i in bad else GOOD[kind].format(i=i) for i in range(1000)]
    header = {"csv": ["prompt,seed,guidance"], "tsv": ["prompt\tseed\tguidance"]}.get(kind, [])
    first = 1 + len(header)
    file = read(b"\r\n".join(line if isinstance(line, bytes) else line.encode() for line in [*header, *lines]), kind)
    assert [problem.line for problem in file.problems] == [i + first for i in sorted(bad)]
    good = [i for i in range(1000) if i not in bad]
    assert [(line.number, dict(line.values)) for line in file.lines] == [
        (i + first, {"prompt": f"a cat {i}", "seed": i, "guidance": 2.5}) for i in good
    ]


FRAGMENTS = st.sampled_from(
    b'a cat| --|--seed| 7|"|""|,|{|}|{"prompt": "|"}|: |[|1e9|prompt|#|\\|null|NaN|\\ud800|\t|\n|\r|\r\n|\x00|'
    b"seed,prompt\n|prompt\tseed\n|\xc3\xa9|\xff|\xef\xbb\xbf|\xff\xfe".split(b"|")
)


@given(data=st.one_of(st.binary(max_size=200), st.lists(FRAGMENTS, max_size=40).map(b"".join)), kind=st.sampled_from(KINDS))
def test_no_content_raises_an_error(data: bytes, kind: Kind):
    file = read_prompts(data, kind)
    assert sniff(data) in KINDS
    last = 1 + data.count(b"\n") + data.count(b"\r")
    numbers = [line.number for line in file.lines]
    assert numbers == sorted(set(numbers))
    assert not set(numbers) & set(file.bad_lines)
    for number in (*numbers, *file.bad_lines):
        assert 1 <= number <= last
    for problem in file.problems:
        assert 1 <= problem.column <= len(data) + 1
        assert len(problem.message) < 700
    for line in file.lines:
        assert line.values["prompt"].strip()
        assert set(line.columns) == set(line.values) <= set(BY_NAME)


@given(rubbish=st.lists(FRAGMENTS, max_size=20).map(b"".join), place=st.integers(0, 3), kind=st.sampled_from(["txt", "jsonl"]))
def test_good_lines_survive_any_neighbour(rubbish: bytes, place: int, kind: Kind):
    good = [GOOD[kind].format(i=i).encode() for i in range(4)]
    file = read_prompts(b"\n".join([*good[:place], rubbish.replace(b"\xff\xfe", b""), *good[place:]]), kind)
    kept = [dict(line.values) for line in file.lines]
    for i in range(4):
        assert {"prompt": f"a cat {i}", "seed": i, "guidance": 2.5} in kept


@pytest.mark.parametrize("kind", KINDS)
def test_enormous_lines_are_refused_briefly(kind: Kind):
    big = 1_000_000
    lines: dict[Kind, list[str]] = {
        "txt": [
            "a" * big,
            f"a --{'b' * big}",
            f"a --seed {'9' * big}",
            f"a --seeds {'1,' * big}1",
            "a --l \\" + "\\" * big + "--",
            "a" + " --s" * 10_000,
        ],
        "jsonl": [
            json.dumps({"prompt": "a" * big}),
            json.dumps({"prompt": "a", "b" * big: 1}),
            '{"prompt": "a", "seed": ' + "9" * big + "}",
            '{"prompt": "a", "seeds": [' + "1," * big + "1]}",
            '{"prompt": ' + '{"a":' * big,
            "[" * big,
        ],
        "csv": ["a" * big, '"' + "a" * big, '"' * (big + 1), "a" + "," * 100_000, "a,1" + "0" * big],
        "tsv": ["a" * big, '"' * big + "x", "\t" * 100_000 + "a"],
    }
    header = {"csv": "prompt,seed\n", "tsv": "prompt\tseed\n"}.get(kind, "")
    for line in lines[kind]:
        file = read(f"{header}{line}", kind)
        assert file.lines == ()
        assert file.bad_lines == ((2,) if header else (1,))
        assert max(len(problem.message) for problem in file.problems) < 700


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


def test_kinds():
    assert [kind_of(name) for name in ("a.txt", "b/c.JSONL", "d.ndjson", "e.csv", "f.tsv")] == ["txt", "jsonl", "jsonl", "csv", "tsv"]
    for name in ("a.json", "a", ".txt"):
        with pytest.raises(UsageError, match=r"use a file that ends in \.txt, \.jsonl"):
            kind_of(name)


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b'\xef\xbb\xbf\n {"prompt": "a"}', "jsonl"),
        (b"{}", "jsonl"),
        (b"{curly} braces", "txt"),
        (b"prompt\na cat", "csv"),
        (b"seed,prompt\n1,a cat", "csv"),
        ("\n\nprompt\tguidance-rescale\n".encode("utf-16"), "tsv"),
        (b"seed,steps\n", "txt"),
        (b"prompt, and more\n", "txt"),
        (b"a cat, a dog", "txt"),
        (b"", "txt"),
    ],
)
def test_sniffing(data: bytes, kind: Kind):
    assert sniff(data) == kind


def test_values_are_converted_alike_wherever_they_come_from():
    for name, text, value in (("seeds", "1, 2.0", [1, 2.0]), ("sigmas", "3,.5,0", [3, 0.5, 0]), ("steps", "+7", 7), ("apg", "FALSE", False)):
        assert from_text(BY_NAME[name], text) == from_json(BY_NAME[name], value)
    with pytest.raises(UsageError, match=r"10001 items; give 1 to 10000 whole numbers from 0 to 4294967295\."):
        from_text(BY_NAME["seeds"], "1," * 10_000 + "1")


def test_no_heavy_library_is_imported():
    code = (
        "import sys; from tu_diffuse.batch.prompt_file import read_prompts; from tu_diffuse.batch.options import schema\n"
        "assert len(read_prompts(b'a cat', 'txt').lines) == 1 and schema()\n"
        "assert not {'torch', 'numpy', 'PIL'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

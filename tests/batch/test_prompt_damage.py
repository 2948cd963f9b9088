"""Damaged prompt files: every problem is named at its place, and costs nothing but itself."""

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prompt_reading import read, the_problem
from tu_diffuse.batch.options import BY_NAME
from tu_diffuse.batch.prompt_file import KINDS, Kind, read_prompts, sniff

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

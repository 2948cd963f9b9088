"""Prompt files: what each format may hold, and what of it is refused."""

import subprocess
import sys

import pytest
from prompt_reading import read, the_problem, values
from tu_diffuse.batch.options import BY_NAME, from_json, from_text
from tu_diffuse.batch.prompt_file import Kind, kind_of, sniff
from tu_diffuse.errors import UsageError

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

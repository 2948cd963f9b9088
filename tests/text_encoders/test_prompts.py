"""Weights, chunks and choices in prompts: what each spelling means, what is refused, and what ordinary text stays."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tu_diffuse.errors import UsageError
from tu_diffuse.text_encoders.prompts import Part, choose, joined, looks_weighted, parse

UP, DOWN = 1.1, 1 / 1.1


def spelled(text: str) -> list[list[tuple[str, float]]]:
    """Each part as runs of equal weight."""
    parts: list[list[tuple[str, float]]] = []
    for part in parse(text):
        runs: list[tuple[str, float]] = []
        for character, weight in zip(part.text, part.weights or [1.0] * len(part.text), strict=True):
            if runs and runs[-1][1] == pytest.approx(weight):
                runs[-1] = (runs[-1][0] + character, runs[-1][1])
            else:
                runs.append((character, weight))
        parts.append([(run, pytest.approx(weight)) for run, weight in runs])
    return parts


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a red apple", [[("a red apple", 1)]]),
        ("a (red:1.3) apple", [[("a ", 1), ("red", 1.3), (" apple", 1)]]),
        ("(red: .5 )", [[("red", 0.5)]]),
        ("(a:0) b", [[("a", 0), (" b", 1)]]),
        ("(a:-1.5)", [[("a", -1.5)]]),
        ("(a) [b] c", [[("a", UP), (" ", 1), ("b", DOWN), (" c", 1)]]),
        ("((a) b)", [[("a", UP * UP), (" b", UP)]]),
        ("((a:1.5) b:0.5)", [[("a", 0.75), (" b", 0.5)]]),
        ("([a])", [[("a", 1)]]),
        ("[[a]]", [[("a", DOWN * DOWN)]]),
        ("(a:b)", [[("a:b", UP)]]),
        ("(12:30:1.2)", [[("12:30", 1.2)]]),
        (r"\(a\) \[b\]", [[("(a) [b]", 1)]]),
        (r"(\(:\):1.5)", [[("(:)", 1.5)]]),
        (r"\{a\|b\} \\ \n", [[("{a|b} \\ \\n", 1)]]),
        ("a BREAK b", [[("a", 1)], [("b", 1)]]),
        ("(a BREAK b:2) c", [[("a", 2)], [("b", 2), (" c", 1)]]),
        ("BREAK a\nBREAK\nBREAK b", [[("a", 1)], [("b", 1)]]),
        ("BREAKFAST, a coffee break", [[("BREAKFAST, a coffee break", 1)]]),
        ("", [[]]),
        ("()", [[]]),
    ],
)
def test_spellings(text: str, wanted: list[list[tuple[str, float]]]) -> None:
    assert spelled(text) == wanted


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a (red", r"\( at position 2 that is never closed"),
        ("a) b", r"\) at position 1 that closes nothing"),
        ("(a]", r"\] at position 2 that closes nothing"),
        ("[(a]", r"\] at position 3"),
        ("(a:11)", "weight 11"),
        ("((a:5):5)", "weight 25"),
        ("(" * 400 + "a:9" + ":9)" * 400, "weight 81"),
        ("[red:blue:0.5]", r"\[\.\.\.:0\.5\]"),
    ],
)
def test_what_is_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse(text)


@given(st.text(st.characters(codec="utf-8", exclude_characters="()[]{}|\\", exclude_categories=["Cc"]), min_size=1, max_size=20))
@settings(max_examples=50, deadline=None)
def test_text_without_syntax_is_itself(text: str) -> None:
    if "BREAK" not in text and text.strip():
        assert parse(text) == (Part(text),)
        assert choose(text, 5, "prompt") == text


def test_parts_become_one_text_for_an_encoder_without_chunks() -> None:
    whole = joined(parse("a (red:2) BREAK [b]"))
    assert whole.text == "a red b"
    assert whole.weights == pytest.approx((1, 1, 2, 2, 2, 1, DOWN))
    assert joined(parse("a BREAK b")) == Part("a b")


def test_choices_follow_the_seed() -> None:
    text = "a {red|green|blue} {star|{big|small} apple}"
    drawn = [choose(text, seed, "prompt") for seed in range(300)]
    assert drawn == [choose(text, seed, "prompt") for seed in range(300)]
    colours, things = Counter(one.split()[1] for one in drawn), Counter(" ".join(one.split()[2:]) for one in drawn)
    assert set(colours) == {"red", "green", "blue"}
    assert set(things) == {"star", "big apple", "small apple"}
    assert min(colours.values()) > 70
    assert 110 < things["star"] < 190
    assert min(things.values()) > 45
    assert len({(one.split()[1], one.split()[2]) for one in drawn}) == 9
    assert [choose("{a|b}", seed, "prompt") for seed in range(60)] != [choose("{a|b}", seed, "negative") for seed in range(60)]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("{a}", "a"),
        ("{}b", "b"),
        (r"\{a|b\}", r"\{a|b\}"),
        (r"{a\|b}", r"a\|b"),
        (r"{(a\}:1.2)}", r"(a\}:1.2)"),
        ("a|b", "a|b"),
    ],
)
def test_choices_of_one_and_escapes(text: str, wanted: str) -> None:
    assert choose(text, 1, "prompt") == wanted


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a {b|c", r"\{ at position 2 that is never closed"),
        ("{a|{b}", r"\{ at position 0"),
        ("a}", r"\} at position 1 that closes nothing"),
        ("{" * 1900 + "}" * 1900, "21 deep"),
    ],
)
def test_choices_that_are_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        choose(text, 1, "prompt")


def test_only_an_explicit_weight_in_plain_text_is_worth_a_word() -> None:
    assert all(map(looks_weighted, ["a (red:1.3) apple", "(a:.5)", "(16:9)"]))
    assert not any(map(looks_weighted, ["a (red) apple", "see: (this)", "[a:b:0.5]", "(a:b)", "at 12:30"]))


def test_another_spelling_keeps_the_weights_around_it() -> None:
    [part] = parse("a (Cat:2), cat (b:0.5)")
    spelled_out = part.with_spelling("cat", "cat cat_1")
    assert spelled_out.text == "a cat cat_1, cat cat_1 b"
    assert spelled_out.weights == (1, 1, *[2] * 9, 1, 1, *[1] * 9, 1, 0.5)
    assert Part("a Cat").with_spelling("cat", "x y") == Part("a x y")
    assert Part("a dog").with_spelling("cat", "x y") == Part("a dog")

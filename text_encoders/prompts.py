"""The customary spelling of weights, chunks and choices in prompts: `(word:1.3)`, `[word]`, `BREAK`, `{red|green}`.

In plain syntax a prompt is what it says. In weighted syntax

    (word:1.3)   weighs 1.3                      (word)   weighs 1.1               [word]   weighs 1/1.1
    BREAK        starts a new chunk of tokens    {a|b}    is one of its options    \\( \\) \\[ \\] \\{ \\} \\| \\\\   are the characters themselves

Brackets nest and their weights multiply; choices nest and may hold brackets. docs/prompts.md is for users.
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count
from typing import Self

from ..errors import UsageError

SYNTAXES = ("plain", "weighted")
UP, DOWN = 1.1, 1 / 1.1
LARGEST = 10.0  # weight
DEEPEST = 20  # choices inside choices
_TOKENS = re.compile(
    r"\\(?P<escaped>[()\[\]{}|\\]) | (?P<break>\s*\bBREAK\b\s*) | (?P<opening>[(\[]) | (?P<closing>[)\]]) | (?P<letter>.)", re.VERBOSE | re.DOTALL
)
_NUMBER = r":\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*"
_WEIGHT = re.compile(_NUMBER + "$")
_EXPLICIT = re.compile(rf"\([^()]*{_NUMBER}\)")
_PAIRS = {")": "(", "]": "["}
_MARK = "\0"  # of a BREAK; prompts hold no control characters

Letter = tuple[str, float]
"""A character and its weight."""


@dataclass(frozen=True)
class Part:
    """Text that is encoded from the beginning of a chunk.

    Attributes:
        text: as the tokenizers read it.
        weights: of each of its characters; None where all are 1.
    """

    text: str
    weights: tuple[float, ...] | None = None

    def with_spelling(self, pattern: str, text: str) -> Self:
        """Another text wherever a regular expression fits in any case; it weighs what the first character there weighs."""
        pieces, weights, end = list[str](), list[float](), 0
        old = self.weights or (1.0,) * len(self.text)
        for found in re.finditer(pattern, self.text, re.IGNORECASE):
            pieces += [self.text[end : found.start()], text]
            weights += [*old[end : found.start()], *[old[found.start()]] * len(text)]
            end = found.end()
        return replace(self, text="".join(pieces) + self.text[end:], weights=None if self.weights is None else (*weights, *old[end:]))


@dataclass(frozen=True)
class Reading:
    """How prompts are read; the defaults are how captions are read in training.

    Attributes:
        weighted: whether they are of weighted syntax.
        split: whether CLIP reads on in further chunks where a prompt is longer than one.
        clip_weight: how much CLIP's tokens count beside the others, see `Conditioner`; for the join of CLIP and T5.
        t5_weight: the same of T5, which is not run at all at 0.
    """

    weighted: bool = False
    split: bool = False
    clip_weight: float = 1.0
    t5_weight: float = 1.0

    def parts(self, text: str) -> tuple[Part, ...]:
        """A prompt as the tokenizers take it."""
        return parse(text) if self.weighted else (Part(text),)


@dataclass(frozen=True)
class Text:
    """All that the text encoders are told of a picture: prompt, negative prompt, its size in pixels, and how they read."""

    prompt: str
    negative: str
    width: int
    height: int
    reading: Reading


def joined(parts: tuple[Part, ...]) -> Part:
    """The parts as one text, for an encoder that knows no chunks."""
    weights = [weight for part in parts for weight in (*(part.weights or (1.0,) * len(part.text)), 1.0)]  # the last is the space's
    return Part(" ".join(part.text for part in parts), None if set(weights) == {1.0} else tuple(weights[:-1]))


def parse(text: str) -> tuple[Part, ...]:
    """Read the weights and BREAKs of a prompt of weighted syntax whose choices were made (`choose`).

    Returns:
        One part or more; blank ones between two BREAKs are left out.

    Raises:
        UsageError: a bracket that is not closed or closes nothing, a weight beyond ±10, or `[from:to:0.5]`, a change while drawing.
    """
    letters: list[Letter] = []
    opened: list[tuple[str, int, int]] = []  # bracket, its position in the text, letters before it
    for token in _TOKENS.finditer(text):
        kind, position = str(token.lastgroup), token.start()
        if kind == "opening":
            opened.append((token["opening"], position, len(letters)))
        elif kind == "closing":
            if not opened or opened[-1][0] != _PAIRS[token["closing"]]:
                raise UsageError(
                    f"the prompt has a {token['closing']} at position {position} that closes nothing; write \\{token['closing']} for it."
                )
            bracket, _, first = opened.pop()
            letters[first:] = _weighted(letters[first:], bracket)
        else:
            letters.append((_MARK if kind == "break" else token[kind], 1.0))
    if opened:
        bracket, position, _ = opened[-1]
        raise UsageError(f"the prompt has a {bracket} at position {position} that is never closed; close it, or write \\{bracket} for it.")
    parts: list[list[Letter]] = [[]]
    for letter in letters:
        if letter[0] == _MARK:
            parts.append([])
        else:
            parts[-1].append(letter)
    return tuple(_part(part) for part in parts if any(not character.isspace() for character, _ in part)) or (Part(""),)


def _weighted(letters: list[Letter], bracket: str) -> list[Letter]:
    """What a pair of brackets makes of the letters inside: without the number at their end, and weighing more or less."""
    number = _WEIGHT.search("".join(character for character, _ in letters))
    if number is not None and bracket == "[":
        raise UsageError(f"the prompt has [...{number[0]}], which changes it while drawing in other programs and is not done here; write (word:0.9).")
    weight = float(number[1]) if number is not None else UP if bracket == "(" else DOWN
    weighted = [(character, inner * weight) for character, inner in letters[: None if number is None else number.start()]]
    beyond = next((weight for _, weight in weighted if not abs(weight) <= LARGEST), None)
    if beyond is not None:
        raise UsageError(f"the prompt gives the weight {beyond:g}; stay from {-LARGEST:g} to {LARGEST:g}, or write \\( and \\) for brackets.")
    return weighted


def _part(letters: list[Letter]) -> Part:
    weights = tuple(weight for _, weight in letters)
    return Part("".join(character for character, _ in letters), None if set(weights) == {1.0} else weights)


def looks_weighted(text: str) -> bool:
    """Whether a text has an explicit `(word:1.3)`, which somebody may have meant as a weight."""
    return _EXPLICIT.search(text) is not None


def choose(text: str, seed: int, what: str) -> str:
    """Make the choices `{a|b}` of a prompt of weighted syntax, the outer ones before those inside of what they chose.

    The n-th choice that is met, from 0, takes option h mod k of its k options, where h is the first 64 bits of SHA-256 over "<what> <seed> <n>":
    equal seeds choose alike on every machine, neighbouring ones independently.

    Args:
        text: the prompt.
        seed: of the picture.
        what: "prompt" or "negative", which choose independently.

    Returns:
        The text without choices; its escapes stay, for `parse`.

    Raises:
        UsageError: a brace that is not closed or closes nothing, or choices more than 20 deep.
    """
    return _chosen(text, (int.from_bytes(hashlib.sha256(f"{what} {seed} {n}".encode()).digest()[:8], "big") for n in count()), 0)


def _chosen(text: str, numbers: Iterator[int], depth: int) -> str:
    if depth > DEEPEST:
        raise UsageError(f"the prompt has choices inside choices {depth} deep; at most {DEEPEST} are taken; write \\{{ for a brace.")
    result, position = list[str](), 0
    while position < len(text):
        if text[position] == "{":
            options, position = _options(text, position)
            result.append(_chosen(options[next(numbers) % len(options)], numbers, depth + 1))
            continue
        if text[position] == "}":
            raise UsageError(f"the prompt has a }} at position {position} that closes nothing; write \\}} for it.")
        letter = text[position : position + (2 if text[position] == "\\" else 1)]
        result.append(letter)
        position += len(letter)
    return "".join(result)


def _options(text: str, opening: int) -> tuple[list[str], int]:
    """The options of the brace that opens there, with the choices that they hold, and the position after it."""
    depth, first, position, options = 1, opening + 1, opening + 1, list[str]()
    while position < len(text):
        character = text[position]
        depth += (character == "{") - (character == "}")
        if depth == 0 or (depth == 1 and character == "|"):
            options.append(text[first:position])
            first = position + 1
        if depth == 0:
            return options, first
        position += 2 if character == "\\" else 1
    raise UsageError(f"the prompt has a {{ at position {opening} that is never closed; close it, or write \\{{ for it.")

"""Every option of a line of a prompt file, in one table: what it is called, what it takes, and what it means.

The conversions from text (flags and cells) and from JSON, the JSON Schema and the table in docs/prompt-files.md are all read off `OPTIONS`.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Literal

from ..errors import UsageError
from ..pipeline.limits import CHOICES, MAX_PROMPT, MAX_SEED, RANGES, checked_text
from ..pipeline.output import checked_template

_MOST_SEEDS = int(RANGES["count"][1])
_MOST_ADAPTERS = 16
_MOST_SIGMAS = int(RANGES["steps"][1]) + 1
_NAMES = {"text": "text", "choice": "one of the names", "integer": "whole number", "number": "number", "flag": "true or false"}
_JSON_TYPES = {"text": "string", "choice": "string", "integer": "integer", "number": "number", "flag": "boolean"}
_SHOWN = 60
_HUGE = 10**300  # beyond every range here, and within float's


@dataclass(frozen=True, kw_only=True)
class Option:
    """One option.

    Attributes:
        name: the key in JSON and the column in CSV; as a flag, dashes stand for underscores.
        kind: of the value, or of each item of a list.
        help: one line.
        flags: short flags in text files.
        items: fewest and most items of a list; None for a single value.
        low: smallest number, allowed itself; None for no bound.
        high: largest number, likewise.
        choices: all values of a "choice".
        check: raises UsageError for what kind, range and choices cannot express.
    """

    name: str
    kind: Literal["text", "choice", "integer", "number", "flag"]
    help: str
    flags: tuple[str, ...] = ()
    items: tuple[int, int] | None = None
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    check: Callable[[Any], object] | None = None


def _negative(text: str) -> None:
    if text:
        checked_text("the negative prompt", text)


def _template(text: str) -> None:
    checked_template("name", checked_text("name", text))


def _file(name: str) -> None:
    if any(ord(character) < 32 or 0xD800 <= ord(character) < 0xE000 for character in name):
        raise UsageError("the file name holds a control character or a lone surrogate; rename the file.")


def _falling(sigmas: Sequence[float]) -> None:
    levels = sigmas[:-1] if sigmas[-1] == 0 else sigmas
    if not levels or min(levels) <= 0 or any(after >= before for before, after in pairwise(levels)):
        raise UsageError("sigmas do not fall; give numbers above 0, each smaller than the one before, with or without a final 0.")


def _distinct(seeds: Sequence[int]) -> None:
    seed, times = Counter(seeds).most_common(1)[0]
    if times > 1:
        raise UsageError(f"seeds has {seed} twice; give each seed once.")


def _interval(pair: Sequence[float]) -> None:
    if pair[0] >= pair[1]:
        raise UsageError(f"guidance_interval {pair[0]:g},{pair[1]:g} is empty; give two sigmas, the lower one first.")


def _named(option: str, texts: Sequence[str]) -> None:
    for text in texts:
        checked_text(option, text)


def _number(name: str, kind: Literal["integer", "number"], help: str, flags: tuple[str, ...] = ()) -> Option:
    low, high = RANGES[name]
    return Option(name=name, kind=kind, help=help, flags=flags, low=low, high=high)


def _choice(name: str, help: str, flags: tuple[str, ...] = ()) -> Option:
    return Option(name=name, kind="choice", help=help, flags=flags, choices=CHOICES[name])


OPTIONS = (
    Option(name="prompt", kind="text", help="What the picture should show.", check=partial(checked_text, "the prompt")),
    Option(name="negative", kind="text", help="What it should not show.", flags=("n",), check=_negative),
    _number("seed", "integer", "Seed of the line's first picture.", ("d",)),
    Option(
        name="seeds",
        kind="integer",
        help="One picture for each of these seeds; in place of seed and count.",
        flags=("d",),
        items=(1, _MOST_SEEDS),
        low=0,
        high=MAX_SEED,
        check=_distinct,
    ),
    _number("count", "integer", "Pictures of this line, with the seeds seed, seed + 1, ..."),
    _number("width", "integer", "Pixels; models take multiples of 8 or more.", ("w",)),
    _number("height", "integer", "Pixels; likewise.", ("h",)),
    _number("steps", "integer", "Denoising steps.", ("s",)),
    _choice("sampler", "How each step is computed.", ("ss",)),
    _choice("schedule", "How the noise levels are spaced; custom goes with sigmas."),
    Option(
        name="sigmas",
        kind="number",
        help="Custom noise levels, falling, in place of steps and schedule.",
        items=(1, _MOST_SIGMAS),
        low=0,
        check=_falling,
    ),
    _number("eta", "number", "Share of fresh noise in a step, for samplers that take it."),
    _number("guidance", "number", "Scale s of uncond + s*(cond - uncond); 1 is none.", ("l",)),
    _number("guidance_rescale", "number", "Pull the guided prediction back to the spread of the unguided one."),
    Option(
        name="guidance_interval",
        kind="number",
        help="Guide only between these two noise levels (sigma), the lower one first.",
        items=(2, 2),
        low=0,
        check=_interval,
    ),
    Option(name="apg", kind="flag", help="Adaptive projected guidance."),
    _number("dynamic_threshold", "number", "Clamp each prediction at this percentile of its absolute values."),
    Option(
        name="lora",
        kind="text",
        help="LoRA files, each FILE:WEIGHT or FILE:WEIGHT@EXPERT; the weight is 1 when left out.",
        items=(1, _MOST_ADAPTERS),
        check=partial(_named, "lora"),
    ),
    Option(
        name="embedding",
        kind="text",
        help="Textual-inversion files, each FILE or FILE=WORD; used where their word stands in the prompt.",
        items=(1, _MOST_ADAPTERS),
        check=partial(_named, "embedding"),
    ),
    Option(name="init_image", kind="text", help="Picture to begin with; its path from the prompt file's folder.", check=_file),
    _number("strength", "number", "How much of it is drawn anew: the share of the steps that are taken."),
    _choice("resize", "How it is brought to width and height: cover and crop, or stretch."),
    Option(name="mask", kind="text", help="Picture of its size: white is repainted, black is kept.", check=_file),
    _number("mask_blur", "number", "Pixels over which the repainted part fades out inside the mask."),
    _number("upscale", "number", "Draw, enlarge by this factor, and draw on."),
    _choice("upscale_mode", "What is enlarged."),
    _number("upscale_steps", "integer", "Steps of the second round."),
    _number("upscale_strength", "number", "Share of them that are taken."),
    _choice("tile", "Along which axes the picture meets itself when laid side by side."),
    Option(name="control", kind="text", help="How a ControlNet's picture is made of control_image: none (it is one), canny or depth.", check=_file),
    Option(name="control_image", kind="text", help="Picture that steers the drawing, through control_model.", check=_file),
    Option(name="control_model", kind="text", help="Folder of a ControlNet.", check=_file),
    _number("control_scale", "number", "How strongly it steers."),
    _number("control_start", "number", "Share of the steps after which it begins."),
    _number("control_end", "number", "Share of the steps after which it ends."),
    Option(name="control_depth_model", kind="text", help="Folder of what estimates depth, for control depth.", check=_file),
    Option(name="strict", kind="flag", help="Refuse a prompt with words beyond the text encoders' limits."),
    _choice("syntax", "weighted reads (word:1.3), [word], BREAK and choices in prompts; plain does not."),
    _choice("long_prompts", "chunk lets CLIP read prompts past its length in chunks; truncate drops the rest."),
    Option(name="no_t5", kind="flag", help="Leave T5 out, for models with CLIP and T5."),
    _number("clip_weight", "number", "How much CLIP's tokens count beside T5's; 1 is as trained."),
    _number("t5_weight", "number", "How much T5's tokens count beside CLIP's; 0 is no_t5."),
    Option(name="name", kind="text", help="File name without suffix; may hold {prompt}, {seed} and {number}.", check=_template),
    _choice("format", "Picture format."),
)
BY_NAME: Mapping[str, Option] = {option.name: option for option in OPTIONS}


def shown(value: object) -> str:
    """A value from a prompt file as a message may show it: printable and at most 60 characters long."""
    text = ascii(value[: _SHOWN + 1] if isinstance(value, str) else value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def from_text(option: Option, text: str) -> Any:
    """Read a value from a flag or cell; items of a list are separated by commas.

    Returns:
        str, int, float or bool; a tuple of them for a list.

    Raises:
        UsageError: the text is not such a value, or out of range.
    """
    if not text.strip():
        raise UsageError(f"{option.name} has no value; give {_wanted(option)}.")
    if option.kind == "text" and option.items is None:
        return _checked(option, text)
    if option.items is None:
        return _checked(option, _item(option, text))
    _check_length(option, text.count(",") + 1)
    return _checked(option, tuple(_item(option, part) for part in text.split(",")))


def from_json(option: Option, value: object) -> Any:
    """Read a value from decoded JSON; a whole number may be written 7.0, as in JSON Schema, and true is none.

    Returns:
        As `from_text`.

    Raises:
        UsageError: the value has another type, or is out of range.
    """
    if option.items is None:
        return _checked(option, _json_item(option, value))
    if not isinstance(value, list):
        raise UsageError(f"{option.name} is {_json_name(value)}; give {_wanted(option)}.")
    _check_length(option, len(value))
    return _checked(option, tuple(_json_item(option, item) for item in value))


def schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of one line of a .jsonl file.

    It says all but what JSON Schema cannot: that sigmas fall, that an interval is not empty, which characters texts and names may hold.
    """
    lists_seeds = {"required": ["seeds"], "properties": {"seeds": {"type": "array"}}}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "One line of a prompt file of tu-diffuse batch",
        "description": "A key that is left out or null takes the command line's value, or else the model's.",
        "type": "object",
        "properties": {option.name: _property(option) for option in OPTIONS},
        "required": ["prompt"],
        "additionalProperties": False,
        "if": lists_seeds,
        "then": {"properties": {"seed": {"type": "null"}, "count": {"type": "null"}}},
    }


def table() -> str:
    """The options as a table in Markdown."""
    rows = ["| option | flags | value | meaning |", "|---|---|---|---|"]
    for option in OPTIONS:
        flags = ", ".join(f"`--{flag}`" for flag in (option.name.replace("_", "-"), *option.flags))
        rows.append(f"| `{option.name}` | {flags} | {_value_column(option)} | {option.help} |")
    return "\n".join(rows) + "\n"


def _checked(option: Option, value: Any) -> Any:
    items: tuple[Any, ...] = (value,) if option.items is None else value
    for item in items:
        if option.choices and item not in option.choices:
            raise UsageError(f"{option.name} {shown(item)} is not known; use one of {', '.join(option.choices)}.")
        if option.kind in ("integer", "number") and not _in_range(option, item):
            raise UsageError(f"{option.name} {item:.12g} is out of range; give {_wanted(option)}.")
    if option.check is not None:
        option.check(value)
    return value


def _check_length(option: Option, length: int) -> None:
    if option.items is not None and not option.items[0] <= length <= option.items[1]:
        raise UsageError(f"{option.name} has {length} items; give {_wanted(option)}.")


def _in_range(option: Option, number: float) -> bool:
    low, high = -math.inf if option.low is None else option.low, math.inf if option.high is None else option.high
    return math.isfinite(number) and low <= number <= high


def _item(option: Option, text: str) -> Any:
    text = text.strip()
    if option.kind == "flag" and text.lower() in ("true", "false", "1", "0"):
        return text.lower() in ("true", "1")
    if option.kind == "integer" and len(text) <= _SHOWN and re.fullmatch(r"[+-]?[0-9]+(\.0*)?", text):
        return int(text.partition(".")[0])
    if option.kind == "number" and len(text) <= _SHOWN and re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?", text):
        return float(text)
    if option.kind in ("choice", "text"):
        return text
    raise UsageError(f"{option.name} {shown(text)} cannot be used; give {_wanted(option)}.")


def _json_item(option: Option, value: object) -> Any:
    if option.kind in ("text", "choice") and isinstance(value, str):
        return value
    if option.kind == "flag" and isinstance(value, bool):
        return value
    if option.kind in ("integer", "number") and isinstance(value, int | float) and not isinstance(value, bool):
        number = float(max(min(value, _HUGE), -_HUGE)) if isinstance(value, int) else value
        if option.kind == "number" or not math.isfinite(number):
            return number
        if number.is_integer():
            return int(number)
        raise UsageError(f"{option.name} {number:g} is not a whole number; give {_wanted(option)}.")
    raise UsageError(f"{option.name} {'holds' if option.items else 'is'} {_json_name(value)}; give {_wanted(option)}.")


def _json_name(value: object) -> str:
    if isinstance(value, list):
        return "a list"
    if isinstance(value, dict):
        return "an object"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"the text {shown(value)}" if isinstance(value, str) else f"the number {value:.12g}"


def _wanted(option: Option) -> str:
    if option.kind == "text":
        return "text" if option.items is None else f"{option.items[0]} to {option.items[1]} texts"
    if option.kind == "choice":
        return f"one of {', '.join(option.choices)}"
    if option.kind == "flag":
        return "true or false"
    name, bounds = _NAMES[option.kind], _bounds(option)
    if option.items is None:
        return f"a {name} {bounds}"
    fewest, most = option.items
    return f"{fewest if fewest == most else f'{fewest} to {most}'} {name}s {bounds}"


def _bounds(option: Option) -> str:
    return f"from {option.low:.12g} up" if option.high is None else f"from {option.low:.12g} to {option.high:.12g}"


def _value_column(option: Option) -> str:
    if option.choices:
        return ", ".join(option.choices)
    if option.kind == "flag" or (option.kind == "text" and option.items is None):
        return _NAMES[option.kind]
    return _wanted(option).removeprefix("a ")


def _property(option: Option) -> dict[str, Any]:
    single: dict[str, Any] = {"type": _JSON_TYPES[option.kind]}
    if option.choices:
        single = {"enum": list(option.choices)}
    if option.low is not None:
        single["minimum"] = option.low
    if option.high is not None:
        single["maximum"] = option.high
    if option.name == "prompt":
        return {"description": option.help, **single, "minLength": 1, "maxLength": MAX_PROMPT, "pattern": r"\S"}
    if option.kind == "text":
        single["maxLength"] = MAX_PROMPT
    if option.items is not None:
        single = {"type": "array", "items": single, "minItems": option.items[0], "maxItems": option.items[1]}
        if option.check is _distinct:
            single["uniqueItems"] = True
    if "type" in single:
        single["type"] = [single["type"], "null"]
    else:
        single["enum"] = [*single["enum"], None]
    return {"description": option.help, **single}

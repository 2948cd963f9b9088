"""How a `config.json` becomes a frozen config: each field checked for its type, absent ones left at the field's default."""

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any, get_type_hints

from ..errors import ModelError

MAX_SIZE = 2**20
MAX_LAYERS = 256


def config_values(kind: type[Any], data: Mapping[str, object], what: str) -> dict[str, Any]:
    """Pick from a parsed `config.json` the values of a dataclass's fields.

    Args:
        kind: a dataclass whose fields are int, float, str or bool; an int is taken where a float is wanted.
        data: the parsed file; names that the dataclass does not have are left alone, null counts as absent.
        what: the component, for the message.

    Returns:
        Field name to value, ready for `kind(**values)`.

    Raises:
        ModelError: a value of another type, or a field without default that is absent.
    """
    hints = get_type_hints(kind)
    values: dict[str, Any] = {}
    for field in fields(kind):
        value = data.get(field.name)
        wanted = hints[field.name]
        if value is None:
            if field.default is MISSING:
                raise ModelError(f"the {what} config has no `{field.name}`; a value of type {wanted.__name__} was wanted; repair its config.json")
        elif type(value) is wanted or (wanted is float and type(value) is int):
            values[field.name] = value
        else:
            raise ModelError(
                f"the {what} config has {field.name} = {value!r:.100}; a value of type {wanted.__name__} was wanted; repair its config.json"
            )
    return values


def require_positive(what: str, **sizes: int) -> None:
    """Raise ModelError unless every size is from 1 to 2^20, far beyond any network that exists."""
    for name, size in sizes.items():
        if not 1 <= size <= MAX_SIZE:
            raise ModelError(f"the {what} config has {name} = {size}; a number above 0, at most {MAX_SIZE}, was wanted; repair its config.json")


def require_layers(what: str, name: str, number: int, fewest: int = 1) -> None:
    """Raise ModelError unless a number of layers is from `fewest` to 256."""
    if not fewest <= number <= MAX_LAYERS:
        raise ModelError(f"the {what} config has {name} = {number}; {fewest} to {MAX_LAYERS} layers were wanted; repair its config.json")


def require_epsilon(what: str, epsilon: float) -> None:
    """Raise ModelError unless a norm's epsilon is from 0 to 1."""
    if not 0 <= epsilon <= 1:
        raise ModelError(f"the {what} config has an epsilon of {epsilon}; a number from 0 to 1 was wanted; repair its config.json")


def require_heads(what: str, width: int, heads: int) -> None:
    """Raise ModelError unless the attention heads divide the width."""
    if width % heads:
        raise ModelError(f"the {what} config splits width {width} among {heads} heads; a divisor of the width was wanted; repair its config.json")

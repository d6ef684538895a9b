"""Options of a dataclass: their types and ranges, reading of values, and words for what was expected.

steps: int = option(5000, "training steps", at_least=1)     # a field; its annotation gives the type
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import operator
import types
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from support.files import UserError

# The limits of int64 and float32 tensors (below the smallest float, a value becomes 0).
LARGEST_INT, LARGEST_FLOAT, SMALLEST_FLOAT = 2**63 - 1, (2 - 2**-23) * 2.0**127, 2.0**-126

BOOLS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}  # on the command line

# The scope of a key tells what a different value changes:
EXPERIMENT = "experiment"  # the result: in the hash, must match when a run is resumed
SCHEDULE = "schedule"  # the length of the run and its evaluations: in the hash, may change on resume
MACHINE = "machine"  # where and how the run is made: not in the hash
SCOPES = (EXPERIMENT, SCHEDULE, MACHINE)


class ConfigError(UserError):
    """An invalid configuration; `problems` has one line for each problem."""

    def __init__(self, problems: Iterable[str]):
        super().__init__(*problems)
        self.problems = str(self).splitlines()


@dataclass(frozen=True)
class Option:
    """One key. kinds: the types it may have, bool, int, float, str, or a Literal of strings."""

    name: str
    kinds: tuple
    default: Any
    help: str
    group: str = "Options"
    scope: str = MACHINE
    at_least: float | None = None
    at_most: float | None = None
    below: float | None = None
    is_path: bool = False  # `parse` expands a ~ in front


def option(default: Any, help: str, **about: Any) -> Any:
    """A dataclass field that `parse` understands; its annotation gives the type, and the choices as a Literal.

    about: group, scope, at_least, at_most, below and is_path, as in `Option`.
    """
    return dataclasses.field(default=default, metadata={"help": help, **about})


@functools.cache
def options_of(cls: type) -> dict[str, Option]:
    """The options of a dataclass by name, in the order in which it declares them."""
    hints = typing.get_type_hints(cls)
    unions = (typing.Union, types.UnionType)  # bool | Literal["auto"] has two kinds, int has one
    kinds = {
        name: typing.get_args(hint) if typing.get_origin(hint) in unions else (hint,) for name, hint in hints.items()
    }
    fields = dataclasses.fields(cls)
    return {field.name: Option(field.name, kinds[field.name], field.default, **field.metadata) for field in fields}


def choices_of(option: Option) -> list[str]:
    """The strings among which an option's Literal types choose; none for other types."""
    return [choice for kind in option.kinds if typing.get_origin(kind) is Literal for choice in typing.get_args(kind)]


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word most similar to `word` in lower case, or with these initials (lr: learning_rate); or None."""
    known, word = list(known), word.lower()
    by_initials = [other for other in known if "_" in other and word == "".join(part[:1] for part in other.split("_"))]
    matches = by_initials or difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return matches[0] if matches else None


# ---------------------------------------------------------------------------------------------------------------------
# Values: one rule for each type, whether from a file or from the command line


def accept_value(kind: Any, value: Any) -> Any:
    """`value` as a value of `kind`: an integer is accepted as a float, a bool is no number, text is neither.

    Raises ValueError if it is none, OverflowError for a number that no tensor can hold.
    """
    if typing.get_origin(kind) is Literal:
        if type(value) is str and value in typing.get_args(kind):
            return value
    elif kind is float and type(value) in (int, float):
        if value and math.isfinite(value) and not SMALLEST_FLOAT <= abs(value) <= LARGEST_FLOAT:
            raise OverflowError("one that 32 bits can hold")
        if math.isfinite(value):
            return float(value)
    elif kind is int and (type(value) is int or (type(value) is float and value.is_integer())):  # max_iters = 1e5
        if abs(value) > LARGEST_INT:
            raise OverflowError("one that 64 bits can hold")
        return int(value)
    elif kind is str and type(value) is str:
        if "\0" not in value:  # no file name can have it
            return value
    elif type(value) is kind:
        return value
    raise ValueError


def accept_text(kind: Any, text: str) -> Any:
    """The value of `kind` that `text` on the command line stands for. Raises as `accept_value` does."""
    readers = {bool: lambda word: BOOLS.get(word.lower()), int: int_from_text, float: float}
    return accept_value(kind, readers.get(kind, unquoted)(text))


def int_from_text(text: str) -> int | float:
    """5, 1_000 and 1e5 as numbers; `accept_value` refuses a float that is no integer."""
    try:
        return int(text)
    except ValueError:
        return float(text)


def unquoted(text: str) -> str:
    """The text without enclosing quotes, which are still there where no shell removed them."""
    quoted = len(text) >= 2 and text[0] in "'\"" and text[-1] == text[0] and text[0] not in text[1:-1]
    return text[1:-1] if quoted else text


def fitted(option: Option, raw: Any, accept: Callable[[Any, Any], Any]) -> Any:
    """`raw` as the first of the option's kinds that accepts it within the option's range.

    Raises ValueError if none does, OverflowError if the number is only too large or too small for a tensor.
    """
    problem = ValueError()
    for kind in option.kinds:
        try:
            value = accept(kind, raw)
        except OverflowError as error:
            problem = error
        except ValueError:
            continue
        else:
            if in_range(option, value):
                return value
    raise problem


def in_range(option: Option, value: Any) -> bool:
    if isinstance(value, (bool, str)):
        return True
    limits = ((option.at_least, operator.ge), (option.at_most, operator.le), (option.below, operator.lt))
    return all(limit is None or holds(value, limit) for limit, holds in limits)


def expectation(option: Option) -> str:
    """The values that the option accepts, in words."""
    limits = {"from": option.at_least, "up to": option.at_most, "below": option.below}
    limits = ", ".join(f"{words} {limit}" for words, limit in limits.items() if limit is not None)
    names = {bool: "True or False", int: f"an integer {limits}", float: f"a number {limits}", str: "text without NUL"}
    words = [names[kind].strip() for kind in option.kinds if kind in names]
    words += [repr(choice) for choice in choices_of(option)]
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)

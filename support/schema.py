"""Whether a value read from JSON has the shape that it should have.

    SCHEMA = {"title": TEXT, "losses": [NUMBER], "test": ({"nats": NUMBER}, None), "processes?": POSITIVE}
    list(mismatches({"title": 5}, SCHEMA))    # ["title is 5; expected text …", "missing field 'losses' …", …]

In a schema, a dict is an object with at least these fields ("name?" may be missing), [kind] is a list of that kind,
(kind, None) is that kind or null, {"a", "b"} is one of these texts, and a text is one of the kinds of values below.
Fields that a schema does not name are not looked at.
"""

import re
import sys
from collections.abc import Iterator

from support.files import is_utf8, shown

# Each kind of value is named by the words in which a message asks for it.
TEXT, FLAG, OBJECT, LIST = "text that UTF-8 can encode", "true or false", "an object", "a list"
LINE, NAME = "a line of text", "a name of lower-case letters, digits, - and _"  # a NAME can name a file
COUNT, POSITIVE = "an integer from 0", "an integer from 1"
NUMBER, ABOVE_ZERO, SIGNED = "a finite number from 0", "a finite number above 0", "a finite number"
SHARE, LOSS_NUMBER = "a number from 0 to 1", "a loss from 0 and below 10,000"  # tables have room for no larger loss
SHA256, COMMIT = "64 hexadecimal digits", "40 to 64 hexadecimal digits"


def _is_number(value, low, high=sys.float_info.max):
    return type(value) in (int, float) and low <= value <= high  # type(), because True is an int as well; NaN fails


def _is_count(value, low):
    return type(value) is int and low <= value < 2**63


def _is_match(value, pattern):
    return type(value) is str and re.fullmatch(pattern, value)


FITS = {
    TEXT: lambda value: type(value) is str and is_utf8(value),
    LINE: lambda value: type(value) is str and value.isprintable() and value.strip(),
    NAME: lambda value: _is_match(value, "[a-z0-9][a-z0-9_-]{0,39}"),
    FLAG: lambda value: type(value) is bool,
    OBJECT: lambda value: type(value) is dict,
    LIST: lambda value: type(value) is list,
    COUNT: lambda value: _is_count(value, 0),
    POSITIVE: lambda value: _is_count(value, 1),
    NUMBER: lambda value: _is_number(value, 0),
    ABOVE_ZERO: lambda value: _is_number(value, 0) and value > 0,
    SIGNED: lambda value: _is_number(value, -sys.float_info.max),
    SHARE: lambda value: _is_number(value, 0, 1),
    LOSS_NUMBER: lambda value: _is_number(value, 0) and value < 1e4,
    SHA256: lambda value: _is_match(value, "[0-9a-f]{64}"),
    COMMIT: lambda value: _is_match(value, "[0-9a-f]{40,64}"),
}


def mismatches(value, schema, where="") -> Iterator[str]:
    """Each place where `value` is not as `schema` asks, a line each; where: its own place, as clean.best.nats."""
    if isinstance(schema, tuple):
        if value is None:
            return
        schema = schema[0]
    if isinstance(schema, dict) and isinstance(value, dict):
        for field, inner in schema.items():
            name = field.removesuffix("?")
            if name in value:
                yield from mismatches(value[name], inner, f"{where}.{name}" if where else name)
            elif name == field:
                yield f"missing field {name!r} in {where or 'the record'}"
    elif isinstance(schema, list) and isinstance(value, list):
        for i, inner in enumerate(value):
            yield from mismatches(inner, schema[0], f"{where}[{i}]")
    elif isinstance(schema, set):
        if not (isinstance(value, str) and value in schema):
            yield f"{where} is {shown(value)}; expected {' or '.join(map(repr, sorted(schema)))}"
    else:
        expected = OBJECT if isinstance(schema, dict) else LIST if isinstance(schema, list) else schema
        if not FITS[expected](value):
            yield f"{where or 'the record'} is {shown(value)}; expected {expected}"

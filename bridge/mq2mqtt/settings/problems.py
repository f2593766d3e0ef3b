"""What pydantic finds wrong, in words for an operator."""

import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pydantic_core import ErrorDetails

__all__ = ["describe", "unknown_field"]

_EXPECTED: Mapping[str, str] = {
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "dict_type": "a mapping (`name: value` lines)",
    "float_parsing": "a number",
    "float_type": "a number",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "list_type": "a list (lines that begin with `- `)",
    "model_attributes_type": "a mapping (`name: value` lines)",
    "model_type": "a mapping (`name: value` lines)",
    "path_type": "a path",
    "string_type": "text",
    "tuple_type": "a list (lines that begin with `- `)",
}
_WITH_CONTEXT: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "finite_number": lambda _: "must be a finite number",
    "greater_than": lambda context: f"must be more than {context['gt']:g}",
    "greater_than_equal": lambda context: f"must be {context['ge']} or more",
    "less_than_equal": lambda context: f"must be {context['le']:g} or less",
    "literal_error": lambda context: f"must be {context['expected']}",
    "missing": lambda _: "is missing",
    "string_too_short": lambda _: "is empty; give it a value or leave it out",
    "too_short": lambda _: "is empty; give it a value or leave it out",
    "union_tag_invalid": lambda context: f"must be one of {context['expected_tags']}, not {context['tag']!r}",
    "union_tag_not_found": lambda _: "is missing: 'outbound', 'inbound' or 'status'",
    "value_error": lambda context: str(context["error"]),
}


def describe(error: ErrorDetails, *, secret: bool) -> str:
    """Return what is wrong, to follow the field's name; `secret` keeps the value out of it."""
    kind = error["type"]
    if (words := _WITH_CONTEXT.get(kind)) is not None:
        return words(error.get("ctx", {}))
    if (expected := _EXPECTED.get(kind)) is None:
        return error["msg"]
    value = error["input"]
    if isinstance(value, Mapping):
        found = "a mapping"
    elif isinstance(value, list | tuple):
        found = "a list"
    elif value is None:
        found = "nothing"
    else:
        found = "this" if secret else repr(value)
        if expected == "text":
            # YAML reads 007 and yes as a number and a truth value: only its writer knows what was meant.
            return f"must be text, not {found}: write it in quotes"
    return f"must be {expected}, not {found}"


def unknown_field(name: str, known: Iterable[str]) -> str:
    """Return the message for a field that does not exist, with the likely one or all."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.75)
    return f"unknown field; did you mean {close[0]!r}?" if close else f"unknown field; there are {', '.join(names)}"

"""A commented example and a reference page, made from the JSON schema of the settings."""

import json
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import yaml

__all__ = ["example", "markdown"]

_Schema: TypeAlias = Mapping[str, Any]
_WIDTH = 100
_KINDS = {
    "array": "list",
    "boolean": "`true`, `false`",
    "integer": "number",
    "null": "`null`",
    "number": "number",
    "object": "mapping",
    "password": "secret",
    "string": "text",
}


def example(schema: _Schema, *, header: str) -> str:
    """Return YAML with every field of `schema`, each below its description.

    A field shows its first example where it has one, else its default.
    """
    lines = list(_comment(header, ""))
    for name, field in schema["properties"].items():
        lines.append("")
        section = _section(schema, field)
        lines.extend(_comment(_description(field, section), ""))
        if section is not None:
            lines.append(f"{name}:")
            for inner_name, inner in section["properties"].items():
                lines.extend(_comment(inner["description"], "  "))
                lines.append(f"  {inner_name}: {_yaml(_value(inner))}")
        elif field.get("type") == "array":
            lines.append(f"{name}:")
            # The JSON schema has an example's keys in alphabetical order.
            order = list(_parts(schema, field)[0][1]["properties"])
            items = ({key: item[key] for key in sorted(item, key=order.index)} for item in _value(field))
            lines.extend(f"  - {_yaml(item)}" for item in items)
        else:
            lines.append(f"{name}: {_yaml(_value(field))}")
    return "\n".join(lines) + "\n"


def markdown(schema: _Schema, *, header: str) -> str:
    """Return a reference page: a table for the top level, for each section, and for each kind of list item."""
    properties = schema["properties"]
    plain = {name: field for name, field in properties.items() if not _parts(schema, field)}
    parts = [header.strip(), "## Top level", _table(plain)]
    for name, field in properties.items():
        for title, section in _parts(schema, field):
            heading = f"## `{name}`" + (f": {title}" if title else "")
            text = section["description"] if title else _description(field, section)
            parts += [heading, text, _table(section["properties"])]
            for inner_name, inner in section["properties"].items():
                for _, mapping in _parts(schema, inner):
                    parts += [f"### `{name}.{inner_name}`", mapping["description"], _table(mapping["properties"])]
    return "\n\n".join(parts) + "\n"


def _section(schema: _Schema, field: _Schema) -> _Schema | None:
    return _resolve(schema, field["$ref"]) if "$ref" in field else None


def _description(field: _Schema, section: _Schema | None) -> str:
    # Pydantic leaves a field's description out when it is the same as its section's.
    return str(field["description"] if section is None or "description" in field else section["description"])


def _parts(schema: _Schema, field: _Schema) -> list[tuple[str, _Schema]]:
    """Return the tables that `field` needs: its own fields, or those of each kind of item in its list."""
    section = _section(schema, field)
    if section is not None:
        return [("", section)]
    if "oneOf" in field:
        return [("", _resolve(schema, choice["$ref"])) for choice in field["oneOf"] if "$ref" in choice]
    if field.get("type") == "array":
        items = [_resolve(schema, choice["$ref"]) for choice in field["items"]["oneOf"]]
        return [(item["properties"]["type"]["const"], item) for item in items]
    return []


def _resolve(schema: _Schema, reference: str) -> _Schema:
    section: _Schema = schema["$defs"][reference.rpartition("/")[2]]
    return section


def _comment(text: str, indent: str) -> Iterator[str]:
    for paragraph in text.strip().split("\n"):
        yield from textwrap.wrap(
            paragraph, _WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ", break_on_hyphens=False
        )


def _value(field: _Schema) -> Any:  # noqa: ANN401 - whatever the field holds
    return field["examples"][0] if "examples" in field else field["default"]


def _yaml(value: object) -> str:
    # A lone scalar is followed by the document's end mark, on a line of its own.
    return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10_000).split("\n", 1)[0]


def _table(fields: Mapping[str, _Schema]) -> str:
    rows = ["| Field | Value | Default | Meaning |", "|---|---|---|---|"]
    for name, field in fields.items():
        default = f"`{_yaml(field['default'])}`" if "default" in field else "required"
        rows.append(f"| `{name}` | {_kind(field)} | {default} | {_meaning(field)} |".replace("||", "\\|\\|"))
    return "\n".join(rows)


def _kind(field: _Schema) -> str:
    if choices := field.get("anyOf") or field.get("oneOf"):
        return " or ".join(_kind(choice) for choice in choices)
    if "$ref" in field:
        return "mapping"
    if "const" in field:
        return f"`{field['const']}`"
    if "enum" in field:
        return ", ".join(f"`{choice}`" for choice in field["enum"])
    kind = field.get("format") or field["type"]
    return str(_KINDS.get(kind, kind))


def _meaning(field: _Schema) -> str:
    shown = [f"`{item}`" if isinstance(item, str) else f"`{json.dumps(item)}`" for item in field.get("examples", ())]
    text = str(field["description"])
    return f"{text} Example: {', '.join(shown)}." if shown else text

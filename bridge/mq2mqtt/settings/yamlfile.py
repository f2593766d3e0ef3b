"""A YAML file, read strictly: every mistake is a `ConfigError` that names file, line and column."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from mq2mqtt.errors import ConfigError

__all__ = ["Location", "YamlFile", "read_yaml"]

Location: TypeAlias = tuple[str | int, ...]
"""Where a value is: keys and list indexes from the top."""


@dataclass(frozen=True, slots=True)
class YamlFile:
    """The mapping in a file, and the line (from 1) of each value in it."""

    data: dict[str, Any]
    lines: dict[Location, int] = field(default_factory=dict)

    def line(self, location: Location) -> int | None:
        """Return the line of `location`, or of the nearest that encloses it."""
        for length in range(len(location), 0, -1):
            if (line := self.lines.get(location[:length])) is not None:
                return line
        return None


def read_yaml(path: Path) -> YamlFile:
    """Read `path`, which must hold one mapping with text keys, none of them twice.

    Raises:
        ConfigError: it does not, or cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 at byte {error.start}; save it as UTF-8") from error
    try:
        root = yaml.compose(text, yaml.SafeLoader)
        if root is None:
            raise ConfigError(f"{path}: is empty; `mq2mqtt config example` prints a configuration to start from")
        if not isinstance(root, yaml.MappingNode):
            raise ConfigError(f"{path}: must hold `name: value` lines; `mq2mqtt config example` prints some")
        lines: dict[Location, int] = {}
        problems: list[str] = []
        _walk(root, (), lines, problems, set())
        if problems:
            raise ConfigError("\n".join(f"{path}:{problem}" for problem in problems))
        return YamlFile(yaml.safe_load(text), lines)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise ConfigError(f"{path}{where}: no valid YAML: {error.problem or error.context}") from error
    except yaml.reader.ReaderError as error:
        raise ConfigError(f"{path}: no valid YAML: character #x{error.character:04x} is not allowed") from error
    except ValueError as error:
        # A value in the form of a date that is none, for one.
        raise ConfigError(f"{path}: no valid YAML: {error}") from error


def _walk(node: yaml.Node, here: Location, lines: dict[Location, int], problems: list[str], above: set[int]) -> None:
    """Note where values are, and what PyYAML lets pass: keys twice (the last one wins), keys that are no text."""
    if id(node) in above:
        problems.append(f"{_place(node)}: an alias refers to what it is part of")
        return
    above = above | {id(node)}
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            lines[(*here, index)] = item.start_mark.line + 1
            _walk(item, (*here, index), lines, problems, above)
    elif isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            if key.tag != "tag:yaml.org,2002:str":
                problems.append(f"{_place(key)}: the key {_shown(key)} is no text; write it in quotes")
                continue
            if key.value in seen:
                problems.append(f"{_place(key)}: the key {key.value!r} is there twice; remove one")
            seen.add(key.value)
            lines[(*here, key.value)] = key.start_mark.line + 1
            _walk(value, (*here, key.value), lines, problems, above)


def _place(node: yaml.Node) -> str:
    return f"{node.start_mark.line + 1}:{node.start_mark.column + 1}"


def _shown(key: yaml.Node) -> str:
    return repr(key.value) if isinstance(key, yaml.ScalarNode) else "here"

"""A YAML file, read strictly: every mistake is a `ConfigError` that names file, line and column."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeAlias

import yaml

from mq2mqtt.errors import ConfigError

__all__ = ["Location", "YamlFile", "read_yaml"]

_MAX_VALUES: Final = 100_000
"""In a file: some ten thousand rules. Whoever needs more knows why."""

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
    with _naming(path):
        root = yaml.compose(text, yaml.SafeLoader)
        if root is None:
            raise ConfigError(f"{path}: is empty; `mq2mqtt config example` prints a configuration to start from")
        if not isinstance(root, yaml.MappingNode):
            raise ConfigError(f"{path}: must hold `name: value` lines; `mq2mqtt config example` prints some")
        walk = _Walk()
        walk.over(root, (), set())
        if walk.problems:
            raise ConfigError("\n".join(f"{path}:{problem}" for problem in walk.problems))
        return YamlFile(yaml.safe_load(text), walk.lines)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turn whatever PyYAML raises into a `ConfigError` that names the place."""
    try:
        yield
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise ConfigError(f"{path}{where}: no valid YAML: {error.problem or error.context}") from error
    except yaml.reader.ReaderError as error:
        raise ConfigError(f"{path}: no valid YAML: character #x{error.character:04x} is not allowed") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: no valid YAML: nested too deep") from error
    except ValueError as error:
        # A value in the form of a date that is none, for one.
        raise ConfigError(f"{path}: no valid YAML: {error}") from error
    except (LookupError, AttributeError, ArithmeticError, TypeError) as error:
        # PyYAML believes tags, and stumbles.
        raise ConfigError(f"{path}: no valid YAML: a value is not what its tag says") from error


class _Walk:
    """Notes where values are, and what PyYAML lets pass: keys twice (the last one wins), keys that are no text."""

    def __init__(self) -> None:
        self.lines: dict[Location, int] = {}
        self.problems: list[str] = []
        self._left = _MAX_VALUES

    def over(self, node: yaml.Node, here: Location, above: set[int]) -> None:
        """Walk over `node` and what is in it; `above` are the nodes that it is in."""
        if id(node) in above:
            self.problems.append(f"{_place(node)}: an alias refers to what it is part of")
            return
        # Each use of an alias counts: a dozen lines can stand for billions of values.
        self._left -= 1
        if self._left < 0:
            raise ValueError(f"more than {_MAX_VALUES} values")
        above = above | {id(node)}
        if isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                self.lines[*here, index] = item.start_mark.line + 1
                self.over(item, (*here, index), above)
        elif isinstance(node, yaml.MappingNode):
            self._over_mapping(node, here, above)

    def _over_mapping(self, node: yaml.MappingNode, here: Location, above: set[int]) -> None:
        seen: set[str] = set()
        for key, value in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                self.over(value, (*here, key.value), above)
                continue
            if key.tag != "tag:yaml.org,2002:str":
                self.problems.append(f"{_place(key)}: the key {_shown(key)} is no text; write it in quotes")
                continue
            if key.value in seen:
                self.problems.append(f"{_place(key)}: the key {key.value!r} is there twice; remove one")
            seen.add(key.value)
            self.lines[*here, key.value] = key.start_mark.line + 1
            self.over(value, (*here, key.value), above)


def _place(node: yaml.Node) -> str:
    return f"{node.start_mark.line + 1}:{node.start_mark.column + 1}"


def _shown(key: yaml.Node) -> str:
    return repr(key.value) if isinstance(key, yaml.ScalarNode) else "here"

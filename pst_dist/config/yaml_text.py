"""YAML from people and programs that we do not know: unique keys, bounded size, one error line with file and line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from pst_dist.errors import ConfigError
from pst_dist.storage.regular_files import read_regular_text

_MAX_YAML_NODES = 100_000
"""Maximum number of values in a YAML file after expanding aliases. Ours have a few hundred."""
_MAX_YAML_DEPTH = 64
_MOST_NUMBER = 10**18
"""Whole numbers are smaller: the largest that we have are bytes and seeds."""
_UNREADABLE = (ValueError, TypeError, LookupError, AttributeError)
"""What PyYAML raises for a tag that does not fit its value: `!!int x`, `!!int ''`, `!!bool x`, `!!timestamp x`."""


class _UniqueKeyLoader(yaml.SafeLoader):
    """A YAML loader that refuses duplicate keys, of which the standard loader silently keeps the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = key_node.value
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, "a key is not a plain word", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key!r}", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[tuple[str, ...], int]]:
    """The mapping in a YAML file, and the line number of each key, counted from 1."""
    try:
        text = read_regular_text(path, remedy="name a YAML file")
        root = yaml.compose(text, yaml.SafeLoader)
        _bound_yaml(root, path)
        loaded = _bound_numbers(yaml.load(text, _UniqueKeyLoader))
    except RecursionError as error:
        raise ConfigError(f"nested deeper than {_MAX_YAML_DEPTH}", "fix the YAML", path=path) from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or "not YAML"
        raise ConfigError(str(problem), "fix the YAML", path=path, line=mark and mark.line + 1) from error
    except _UNREADABLE as error:
        raise ConfigError(f"a value cannot be read: {str(error)[:80]}", "fix the YAML", path=path) from error
    if loaded is None:
        return {}, {}
    if not isinstance(loaded, dict):
        raise ConfigError("not a mapping of keys to values", "see `pst config demo` for an example", path=path, line=1)
    lines: dict[tuple[str, ...], int] = {}

    def visit(node: yaml.Node | None, keys: tuple[str, ...]) -> None:
        if isinstance(node, yaml.MappingNode):
            for key_node, value_node in node.value:
                place = (*keys, str(key_node.value))
                lines[place] = key_node.start_mark.line + 1
                visit(value_node, place)

    visit(root, ())
    return loaded, lines


def _bound_yaml(root: yaml.Node | None, path: Path | None) -> None:
    """Raise ConfigError for a file whose aliases expand to too many values or refer to themselves."""
    stack, seen = [(root, 1)], 0
    while stack:
        node, depth = stack.pop()
        seen += 1
        if depth > _MAX_YAML_DEPTH or seen > _MAX_YAML_NODES:
            deep = f"nested deeper than {_MAX_YAML_DEPTH}, or an alias refers to itself"
            what = deep if depth > _MAX_YAML_DEPTH else f"more than {_MAX_YAML_NODES:,} values after expanding aliases"
            raise ConfigError(what, "fix the YAML", path=path)
        if isinstance(node, yaml.MappingNode):
            stack.extend((part, depth + 1) for pair in node.value for part in pair)
        elif isinstance(node, yaml.SequenceNode):
            stack.extend((part, depth + 1) for part in node.value)


def _bound_numbers(value: Any) -> Any:
    """The value itself; raises ValueError for a number of many digits, which hexadecimal can hide until it is shown."""
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, int) and abs(item) >= _MOST_NUMBER:
            raise ValueError("a number of more than 18 digits")
        stack.extend((*item, *item.values()) if isinstance(item, dict) else item if isinstance(item, list) else ())
    return value


def parse_value(text: str, key: str) -> Any:
    """A value of the command line as YAML; text that is no YAML is taken as it is. Raises ConfigError naming `key`."""
    try:
        _bound_yaml(yaml.compose(text, yaml.SafeLoader), None)
        return _bound_numbers(yaml.load(text, _UniqueKeyLoader))
    except yaml.constructor.ConstructorError as error:  # YAML, but of a key twice or a type that does not exist here
        raise ConfigError(f"{key[:80]}: {str(error.problem)[:160]}", "fix the value, or quote it") from error
    except yaml.YAMLError:
        return text
    except RecursionError as error:
        raise ConfigError(f"{key[:80]}: nested deeper than {_MAX_YAML_DEPTH}", "fix the value") from error
    except _UNREADABLE as error:
        raise ConfigError(f"{key[:80]}: cannot be read: {str(error)[:80]}", "fix the value, or quote it") from error

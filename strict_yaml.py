"""YAML for recipes and policies: YAML 1.2 scalars, no duplicate keys, errors with line and column."""

from __future__ import annotations

import re
from typing import Any

import yaml

from errors import UsageError


class RecipeLoader(yaml.SafeLoader):
    """YAML 1.2 scalars: 3e-4 is a number, only true/false are booleans, 1:30 is a string. No duplicate keys."""

    yaml_implicit_resolvers = {
        first: [pair for pair in pairs if pair[0].rpartition(":")[2] not in {"bool", "int", "float", "timestamp"}]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is not a string", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key!r}", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


for _tag, _pattern, _first in (
    ("bool", r"true|false", "tf"),
    ("int", r"[-+]?[0-9][0-9_]*", "-+0123456789"),
    ("float", r"[-+]?(\d[\d_]*(\.[\d_]*)?[eE][-+]?\d+|\d[\d_]*\.[\d_]*|\.\d+([eE][-+]?\d+)?)", "-+.0123456789"),
):
    RecipeLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^({_pattern})$"), list(_first))
# YAML 1.1 would read a leading zero as octal.
RecipeLoader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value.replace("_", "")))


def load_yaml(text: str, source: str) -> Any:
    """Parse strict YAML; a syntax error becomes a UsageError naming source, line and column."""
    try:
        return yaml.load(text, RecipeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{source}, line {mark.line + 1}, column {mark.column + 1}" if mark else source
        raise UsageError(f"{where}: {getattr(error, 'problem', error)}") from None


def merge(base: dict[str, Any], delta: dict[str, Any]) -> dict[str, Any]:
    """`delta` over `base`: maps key by key, everything else replaced."""
    merged = dict(base)
    for key, value in delta.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def override(tree: dict[str, Any], assignment: str) -> dict[str, Any]:
    """`tree` with one `a.b=c` (or `--a.b=c`) applied; c is strict YAML."""
    path, equals, value = assignment.removeprefix("--").partition("=")
    if not equals or not path:
        raise UsageError(f"{assignment!r} is not an override; write section.key=value")
    delta: Any = load_yaml(value, f"override {assignment}")
    for key in reversed(path.split(".")):
        delta = {key: delta}
    return merge(tree, delta)

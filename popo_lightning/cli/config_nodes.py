"""Finds YAML that settings do not allow: duplicate or non-text names, cycles, and numbers that YAML misreads."""

from __future__ import annotations

import re

import yaml

from popo_lightning.core.errors import SettingError

STANDARD = "tag:yaml.org,2002:"
TAGS = {
    STANDARD + name
    for name in ("bool", "float", "int", "map", "merge", "null", "seq", "set", "str", "timestamp", "value")
}
NAMED = 2  # levels whose names are names of settings, so never numbers
MAX_SETTINGS = 10**6  # settings per file; those that aliases repeat count each time
ODD = re.compile(r"[-+]?0[0-7_]+|[-+]?[1-9][0-9_]*(:[0-5]?[0-9])+")  # octal and base-60 numbers in YAML 1.1


def check_nodes(file: str, root: yaml.Node) -> None:
    """Raises SettingError for the first node of a config file that settings do not allow.

    Args:
        file: File name as given to --config.
        root: Root node of its YAML.
    """
    _Nodes(file).count(root, "", (), 0)


class _Nodes:
    """Checks each node once, however often aliases repeat it.

    Args:
        file: File name for error messages.
    """

    def __init__(self, file: str) -> None:
        self.file = file
        self.sizes: dict[int, int] = {}

    def count(self, node: yaml.Node, path: str, above: tuple[int, ...], level: int) -> int:
        """Checks a node and returns the number of scalars and containers in it."""
        if id(node) in above:
            raise self._wrong(node, f"gives {path} itself as a part of it", "take the alias out")
        if id(node) not in self.sizes:
            self.sizes[id(node)] = self._size(node, path, (*above, id(node)), level)
        if self.sizes[id(node)] > MAX_SETTINGS:
            raise self._wrong(node, f"repeats aliases to more than {MAX_SETTINGS} settings", "take some out")
        return self.sizes[id(node)]

    def _size(self, node: yaml.Node, path: str, above: tuple[int, ...], level: int) -> int:
        if node.tag not in TAGS:
            tag = node.tag.replace(STANDARD, "!!")
            raise self._wrong(node, f"has the tag {tag}, which settings do not take", "write the value without it")
        if isinstance(node, yaml.SequenceNode):
            return 1 + sum(self.count(part, path, above, NAMED) for part in node.value)
        if isinstance(node, yaml.MappingNode):
            return 1 + self._mapping(node, path, above, level)
        if node.tag == f"{STANDARD}int" and ODD.fullmatch(node.value):
            meant = yaml.SafeLoader("").construct_yaml_int(node)
            raise self._wrong(
                node,
                f"gives {path} {node.value}, which YAML reads as {meant}",
                f"write {meant}, or '{node.value}' in quotes for text",
            )
        return 1

    def _mapping(self, node: yaml.MappingNode, path: str, above: tuple[int, ...], level: int) -> int:
        seen: dict[str, int] = {}
        size = 0
        for key, value in node.value:
            name = self._name(key, level)
            inner = f"{path}.{name}".lstrip(".")
            if name in seen and not key.tag.endswith(":merge"):
                raise self._wrong(key, f"sets {inner} although line {seen[name]} has", "keep one of them")
            seen[name] = key.start_mark.line + 1
            self._check_class(name, value, inner)
            size += self.count(value, inner, above, level + 1)
        return size

    def _name(self, key: yaml.Node, level: int) -> str:
        if not isinstance(key, yaml.ScalarNode):
            raise self._wrong(key, "has a name that is no text", "write each setting as 'name: value'")
        if level < NAMED and key.tag not in (f"{STANDARD}str", f"{STANDARD}merge"):
            said = f"has the name {key.value}, which YAML reads as no text"
            raise self._wrong(key, said, "correct it, or write it in quotes")
        return str(key.value)

    def _check_class(self, name: str, value: yaml.Node, path: str) -> None:
        if name == "class_path" and not value.tag.endswith((":str", ":merge")):
            raise self._wrong(
                value, f"gives {path} no text", "write the import path of a class, as package.module.Class"
            )
        if name == "init_args" and not isinstance(value, yaml.MappingNode):
            raise self._wrong(value, f"gives {path} no names", "write each below it as 'name: value', or leave it out")

    def _wrong(self, node: yaml.Node, what: str, remedy: str) -> SettingError:
        return SettingError(f"--config is '{self.file}', whose line {node.start_mark.line + 1} {what}; {remedy}")

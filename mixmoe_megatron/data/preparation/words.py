"""YAML whose words are what the user typed: `no` is Norwegian, not false, and 2020-01-01 a name, not a date.

Words become numbers, or yes and no, only where a field of ours wants one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import yaml

from mixmoe_megatron.errors import MixMoEError

_KIND_NAMES = {int: "a whole number", float: "a number", bool: "true or false"}
_KEPT_TAGS = ("tag:yaml.org,2002:merge", "tag:yaml.org,2002:null")


class _WordLoader(yaml.SafeLoader):
    """PyYAML's safe loader without the words that it takes for something else, but for an empty value."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - as PyYAML has it
        first: [(tag, pattern) for tag, pattern in resolvers if tag in _KEPT_TAGS]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuse a key that comes twice: PyYAML would take the last and pass over the others.

        Raises:
            yaml.constructor.ConstructorError: One does.
        """
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        names = [key.value for key in keys]
        if twice := [name for name in names if names.count(name) > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice[0]!r} comes twice", node.start_mark)
        for key in keys:
            key.tag = self.DEFAULT_SCALAR_TAG
        return super().construct_mapping(node, deep)


def load_words(text: str) -> Any:
    """Read YAML: mappings, lists and words; an empty value is None.

    Raises:
        yaml.YAMLError: It is not YAML, or a key comes twice.
    """
    return yaml.load(text, _WordLoader)


def from_words[Options](cls: type[Options], value: Mapping[str, Any], where: str) -> Options:
    """Make a dataclass of a mapping: what has a number, or yes or no, for its default wants a word that is one.

    Args:
        cls: The dataclass.
        value: Name of a field -> word, or what the caller has made of it.
        where: Their place, for messages.

    Raises:
        MixMoEError: There is no such field, or a word is no such thing.
    """
    defaults = defaults_of(cls, value, where)
    return cls(**{name: _typed(word, type(defaults[name]), name, where) for name, word in value.items()})


def defaults_of(cls: type, value: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the defaults of a dataclass's fields.

    Args:
        cls: The dataclass.
        value: Its keys must be names of fields.
        where: Their place, for messages.

    Raises:
        MixMoEError: There is no such field.
    """
    defaults = {field.name: field.default for field in fields(cls)}
    if unknown := sorted(set(value) - set(defaults)):
        kind = cls.__name__.lower()
        raise MixMoEError(f"{where}: unknown key {unknown[0]!r}; a {kind} has {', '.join(defaults)}.")
    return defaults


def _typed(word: Any, kind: type, name: str, where: str) -> Any:
    if kind not in _KIND_NAMES:
        return word
    try:
        found = yaml.safe_load(str(word))
    except yaml.YAMLError:
        found = None
    if kind is float and type(found) is int:
        found = float(found)
    if type(found) is not kind:
        raise MixMoEError(f"{where}: {name} is {_KIND_NAMES[kind]}, not {word!r}.")
    return found

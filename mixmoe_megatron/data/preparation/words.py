"""YAML whose words are what the user typed: `no` is Norwegian, not false, and 2020-01-01 a name, not a date.

Words become numbers, or yes and no, only where a field of ours wants one.
"""

from __future__ import annotations

from collections.abc import Mapping
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


def typed_fields(value: Mapping[str, Any], kinds: Mapping[str, type], where: str) -> dict[str, Any]:
    """Turn the words of fields that want a number, or yes or no, into one.

    Args:
        value: Name -> word.
        kinds: Name -> int, float or bool, of the fields to turn.
        where: Their place, for messages.

    Raises:
        MixMoEError: A word is no such thing.
    """
    result = dict(value)
    for name in kinds.keys() & value.keys():
        try:
            found = yaml.safe_load(str(value[name]))
        except yaml.YAMLError:
            found = None
        if isinstance(found, int) and not isinstance(found, bool) and kinds[name] is float:
            found = float(found)
        if type(found) is not kinds[name]:
            raise MixMoEError(f"{where}: {name} is {_KIND_NAMES[kinds[name]]}, not {value[name]!r}.")
        result[name] = found
    return result

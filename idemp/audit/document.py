"""YAML, and so JSON too, as `Node`s."""

from __future__ import annotations

from typing import Any

from idemp.audit.nodes import Node
from idemp.errors import ConfigError, MissingExtra

try:
    import yaml
except ImportError:
    raise MissingExtra("idemp audit", "audit") from None


def read(text: str, source: str) -> Node:
    """The one document in ``text``.  source: how a fault names it.  Raises `ConfigError`."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        return _Reader(source).node(root) if root is not None else Node(1, "")
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{source}: line {line}: this is no YAML: {error.problem}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{source}: this is no YAML: {str(error).splitlines()[0]}") from None


class _Reader:
    """Each node of YAML becomes one of ours, however often it is referred to."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._made: dict[int, Node] = {}
        self._open: set[int] = set()
        self._constructor = yaml.constructor.SafeConstructor()

    def node(self, node: Any) -> Node:
        """``node`` and what is in it."""
        if id(node) in self._open:
            line = node.start_mark.line + 1
            raise ConfigError(f"{self._source}: line {line}: what stands here contains itself")
        if id(node) not in self._made:
            self._open.add(id(node))
            self._made[id(node)] = self._converted(node)
            self._open.remove(id(node))
        return self._made[id(node)]

    def _converted(self, node: Any) -> Node:
        line = node.start_mark.line + 1
        match node:
            case yaml.SequenceNode():
                return Node(line, items=[self.node(each) for each in node.value])
            case yaml.MappingNode():
                return self._table(node, line)
        nothing = node.tag == "tag:yaml.org,2002:null"
        return Node(line, "" if nothing else node.value)

    def _table(self, node: Any, line: int) -> Node:
        names = [(str(name.value), name.start_mark.line + 1) for name, _ in node.value]
        seen: set[str] = set()
        twice = [(name, at) for name, at in names if name in seen or seen.add(name)]  # type: ignore[func-returns-value]
        self._constructor.flatten_mapping(node)
        made: dict[str, Node] = {}
        for name, value in node.value:
            child = self.node(value)
            # The line of the name is where the eye looks.
            made[str(name.value)] = Node(
                name.start_mark.line + 1, child.text, child.items, child.table, child.twice
            )
        return Node(line, table=made, twice=twice)

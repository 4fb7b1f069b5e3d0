"""A settings file as a tree in which each value knows its line."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True, eq=False)
class Node:
    """A text, a list, or a table, at ``line`` of the file, counted from 1.

    text: None for what is no single value, "" for nothing.  table: its names as they are spelled; a name
    that came twice is in ``twice``, with the line of the second.
    """

    line: int
    text: str | None = None
    items: list[Node] | None = None
    table: dict[str, Node] | None = None
    twice: list[tuple[str, int]] = field(default_factory=list)

    def empty(self) -> bool:
        """Whether nothing stands there."""
        return self.text == ""

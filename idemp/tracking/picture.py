"""The flow as a picture: services in columns from the left to the right, an arrow for each pair.

Who sends stands before who receives; where services send in a circle, some arrows go back.  An arrow that
passes a column has a place of its own in it, so that none runs through a box.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from itertools import pairwise
from typing import NamedTuple

from idemp.ports import Edge
from idemp.tracking.flow import Arrow, arrows, label, services

_HEIGHT, _LANE, _GAP, _MARGIN = 34, 18, 26, 24
_LETTER = 7.4
"""How wide a letter is, more or less."""
_BETWEEN = 150
"""Between two columns, for what is written on the arrows."""
_TIP = 9
_PASSES = 8
_COLOURS = {False: "#475467", True: "#b42318"}


class _Place(NamedTuple):
    """A box, or where an arrow passes a column.  ``y``: of its middle."""

    x: float
    y: float
    width: float
    height: float


class _Route(NamedTuple):
    """An arrow, and the places between which it goes, from the left to the right."""

    number: int
    arrow: Arrow
    back: bool
    stops: Sequence[str]


Ports = Mapping[tuple[int, str, int], tuple[float, float]]
"""Where arrow ``number`` touches a place on its left (0) or right (1) side."""


def svg(edges: Sequence[Edge]) -> str:
    """Arrows are as wide as they are busy, and red where more than 1 % fails."""
    names, found = services(edges), arrows(edges)
    columns, routes = _columns(names, found)
    places = _places(columns, routes)
    ports = _ports(routes, places)
    width = max(each.x + each.width for each in places.values()) + _MARGIN
    height = max(each.y + each.height / 2 for each in places.values()) + _MARGIN
    lines = [_line(route, ports) for route in routes]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" '
            f'width="{width:.0f}" height="{height:.0f}" role="img" font-family="sans-serif" font-size="12">',
            "<title>message flow</title>",
            "<defs>",
            *(_tip(failing, colour) for failing, colour in _COLOURS.items()),
            "</defs>",
            f'<rect width="{width:.0f}" height="{height:.0f}" fill="#fff"/>',
            *(line for line, _ in lines),
            *(_box(name, places[name]) for name in names),
            *(text for _, text in lines),  # above all, so that it can be read
            "</svg>\n",
        ]
    )


# ------------------------------------------------------------------ who stands where


def _columns(names: Sequence[str], found: Sequence[Arrow]) -> tuple[list[list[str]], list[_Route]]:
    """Names in columns, with a stop in each column that an arrow passes."""
    back = _backward(names, found)
    rank = dict.fromkeys(names, 0)
    for _ in names:  # the longest way from the left; no circle is left
        for arrow in found:
            left, right = _ends(arrow, back)
            rank[right] = max(rank[right], rank[left] + 1)
    columns: list[list[str]] = [[] for _ in range(max(rank.values()) + 1)]
    for name in names:
        columns[rank[name]].append(name)
    routes = []
    for number, arrow in enumerate(found):
        left, right = _ends(arrow, back)
        between = [f"\0{number} {column}" for column in range(rank[left] + 1, rank[right])]
        for stop, column in zip(between, columns[rank[left] + 1 :], strict=False):
            column.append(stop)
        goes_back = (arrow.sender, arrow.service) in back
        routes.append(_Route(number, arrow, goes_back, [left, *between, right]))
    _untangle(columns, routes)
    return columns, routes


def _ends(arrow: Arrow, back: set[tuple[str, str]]) -> tuple[str, str]:
    ends = (arrow.sender, arrow.service)
    return ends[::-1] if ends in back else ends


def _backward(names: Sequence[str], found: Sequence[Arrow]) -> set[tuple[str, str]]:
    """Arrows without which there is no circle: those back to who is on the way from a beginning."""
    onward: dict[str, list[str]] = {name: [] for name in names}
    for arrow in found:
        onward[arrow.sender].append(arrow.service)
    taken = {arrow.service for arrow in found}
    back: set[tuple[str, str]] = set()
    seen: set[str] = set()
    for start in sorted(names, key=lambda name: name in taken):
        path: list[tuple[str, list[str]]] = [] if start in seen else [(start, list(onward[start]))]
        seen.add(start)
        while path:
            name, left = path[-1]
            if not left:
                path.pop()
            elif (following := left.pop(0)) in {each for each, _ in path}:
                back.add((name, following))
            elif following not in seen:
                seen.add(following)
                path.append((following, list(onward[following])))
    return back


def _untangle(columns: Sequence[list[str]], routes: Sequence[_Route]) -> None:
    """Order each column by the middle of its neighbours, there and back some times."""
    beside: dict[str, list[str]] = {}
    for route in routes:
        for left, right in pairwise(route.stops):
            beside.setdefault(left, []).append(right)
            beside.setdefault(right, []).append(left)
    for turn in range(_PASSES):
        at = {name: (n + 0.5) / len(column) for column in columns for n, name in enumerate(column)}
        for column in columns[turn % 2 :: 2]:
            middle = {
                name: sum(at[each] for each in near) / len(near) if (near := beside.get(name)) else at[name]
                for name in column
            }
            column.sort(key=middle.__getitem__)


def _places(columns: Sequence[Sequence[str]], routes: Sequence[_Route]) -> dict[str, _Place]:
    lanes: dict[tuple[str, int], int] = {}
    for route in routes:
        for left, right in pairwise(route.stops):
            for end in ((left, 1), (right, 0)):
                lanes[end] = lanes.get(end, 0) + 1
    sizes = {}
    for column in columns:
        widest = max((len(name) for name in column if name[0:1] != "\0"), default=0) * _LETTER + 28
        for name in column:
            busy = max(lanes.get((name, 0), 0), lanes.get((name, 1), 0))
            passing = name[0:1] == "\0"
            sizes[name] = (widest, _LANE if passing else max(_HEIGHT, 12 + _LANE * busy))
    tall = max(sum(sizes[name][1] + _GAP for name in column) - _GAP for column in columns)
    places, x = {}, float(_MARGIN)
    for column in columns:
        y = _MARGIN + (tall - sum(sizes[name][1] + _GAP for name in column) + _GAP) / 2
        for name in column:
            width, height = sizes[name]
            places[name] = _Place(x, y + height / 2, width, height)
            y += height + _GAP
        x += sizes[column[0]][0] + _BETWEEN
    return places


def _ports(routes: Sequence[_Route], places: Mapping[str, _Place]) -> Ports:
    """Side by side, in the order of where they come from or go to, so that they do not cross there."""
    sides: dict[tuple[str, int], list[tuple[float, bool, int]]] = {}
    for route in routes:
        for left, right in pairwise(route.stops):
            sides.setdefault((left, 1), []).append((places[right].y, route.back, route.number))
            sides.setdefault((right, 0), []).append((places[left].y, route.back, route.number))
    found = {}
    for (name, side), touching in sides.items():
        place = places[name]
        for n, (_, _, number) in enumerate(sorted(touching)):
            y = place.y + (n - (len(touching) - 1) / 2) * _LANE
            found[number, name, side] = (place.x + place.width * side, y)
    return found


# ------------------------------------------------------------------ as text


def _line(route: _Route, ports: Ports) -> tuple[str, str]:
    """The arrow, and what is written at its head."""
    points = []
    for left, right in pairwise(route.stops):
        points += [ports[route.number, left, 1], ports[route.number, right, 0]]
    away = 1
    if route.back:
        points, away = points[::-1], -1
    (x, y), head = points[0], points[-1]
    points[-1] = (head[0] - away * _TIP, head[1])
    path = f"M{x:.1f} {y:.1f}"
    for (x1, y1), (x2, y2) in pairwise(points):
        middle = (x1 + x2) / 2
        path += f" C{middle:.1f} {y1:.1f} {middle:.1f} {y2:.1f} {x2:.1f} {y2:.1f}"
    arrow = route.arrow
    failing = arrow.failing > 0.01
    told = label(arrow)
    width = 1 + math.log10(max(arrow.n, 1)) / 2
    title = _plain(f"{arrow.sender} to {arrow.service}: {told}")
    line = (
        f'<path d="{path}" fill="none" stroke="{_COLOURS[failing]}" stroke-width="{width:.1f}" '
        f'marker-end="url(#{_tip_name(failing)})"><title>{title}</title></path>'
    )
    text = (
        f'<text x="{head[0] - away * (_TIP + 3):.1f}" y="{head[1] - 4:.1f}" fill="{_COLOURS[failing]}" '
        f'text-anchor="{"start" if route.back else "end"}" font-size="11" stroke="#fff" stroke-width="3" '
        f'paint-order="stroke">{escape(told)}</text>'
    )
    return line, text


def _tip_name(failing: bool) -> str:
    return "bad" if failing else "good"


def _tip(failing: bool, colour: str) -> str:
    return (
        f'<marker id="{_tip_name(failing)}" viewBox="0 0 {_TIP} {_TIP}" refX="1" refY="{_TIP / 2}" '
        f'markerWidth="{_TIP}" markerHeight="{_TIP}" markerUnits="userSpaceOnUse" orient="auto">'
        f'<path d="M0 0 {_TIP} {_TIP / 2} 0 {_TIP}z" fill="{colour}"/></marker>'
    )


def _plain(text: str) -> str:
    """As XML may have it."""
    return escape("".join(c if c.isprintable() else " " for c in text))


def _box(name: str, place: _Place) -> str:
    told = _plain(name)
    return (
        f'<rect x="{place.x:.1f}" y="{place.y - place.height / 2:.1f}" width="{place.width:.1f}" '
        f'height="{place.height:.1f}" rx="6" fill="#f2f4f7" stroke="#475467"/>'
        f'<text x="{place.x + place.width / 2:.1f}" y="{place.y + 4:.1f}" '
        f'text-anchor="middle">{told}</text>'
    )

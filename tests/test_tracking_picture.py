"""The picture of a flow: every service and every arrow in it, nothing on top of anything.  Row U9."""

from __future__ import annotations

import random
import re
from itertools import combinations
from xml.etree import ElementTree

import pytest

from idemp.ports import Edge
from idemp.tracking.flow import arrows, services
from idemp.tracking.picture import svg

SVG = "{http://www.w3.org/2000/svg}"


def edge(sender: str, service: str, n: int = 10, kind: str = "ok") -> Edge:
    return Edge(sender, service, "order", kind, n, 0.1, 0.1, 0.0, 60.0)


def drawn(edges: list[Edge]) -> ElementTree.Element:
    return ElementTree.fromstring(svg(edges))


def boxes(picture: ElementTree.Element) -> list[tuple[float, float, float, float]]:
    """Left, top, right, bottom."""
    found = []
    for each in picture.findall(f"{SVG}rect")[1:]:
        x, y, width, height = (float(each.attrib[name]) for name in ("x", "y", "width", "height"))
        found.append((x, y, x + width, y + height))
    return found


def chance(seed: int) -> list[Edge]:
    dice = random.Random(seed)
    names = [f"service-{n}" for n in range(dice.randrange(2, 15))]
    pairs = [(a, b) for a in names for b in names if a != b]
    return [edge(a, b, dice.randrange(1, 10**6)) for a, b in dice.sample(pairs, min(len(pairs), 25))]


@pytest.mark.parametrize("seed", range(20))
def test_u9_whoever_sends_to_whom(seed: int) -> None:
    """U9: chains, circles and knots: each box inside and apart, each arrow from box to box."""
    edges = chance(seed)
    picture = drawn(edges)
    _, _, width, height = map(float, picture.attrib["viewBox"].split())
    found = dict(zip(services(edges), boxes(picture), strict=True))
    assert all(
        0 < left < right < width and 0 < top < bottom < height for left, top, right, bottom in found.values()
    )
    for (a, b, c, d), (e, f, g, h) in combinations(found.values(), 2):
        assert c < e or g < a or d < f or h < b
    paths = picture.findall(f"{SVG}path")
    assert len(paths) == len(arrows(edges))
    for arrow, path in zip(arrows(edges), paths, strict=True):
        numbers = [float(each) for each in re.findall(r"-?[\d.]+", path.attrib["d"])]
        assert _at_the_edge(numbers[:2], found[arrow.sender])
        assert _at_the_edge(numbers[-2:], found[arrow.service], room=10.0)
        title = path.find(f"{SVG}title")
        assert title is not None
        assert title.text == f"{arrow.sender} to {arrow.service}: {arrow.n}"


def _at_the_edge(point: list[float], box: tuple[float, float, float, float], room: float = 0.2) -> bool:
    (x, y), (left, top, right, bottom) = point, box
    return min(abs(x - left), abs(x - right)) <= room and top < y < bottom


def test_u9_what_fails_is_red_and_names_are_quoted() -> None:
    """U9: a share is written on it; a name may be anything."""
    odd = 'a "b" & <c>\x1b[1m'
    picture = drawn([edge("shop", odd, 90), edge("shop", odd, 10, "failed"), edge(odd, "post")])
    first, second = picture.findall(f"{SVG}path")[::-1]
    assert (first.attrib["stroke"], second.attrib["stroke"]) == ("#b42318", "#475467")
    texts = [each.text for each in picture.findall(f"{SVG}text")]
    assert texts[0] == 'a "b" & <c> [1m'
    assert "100, 10.0% failing" in texts


def test_u9_one_that_nobody_receives() -> None:
    """U9: a box, and no arrow."""
    picture = drawn([edge("shop", "", 3, "sent")])
    assert len(boxes(picture)) == 1
    assert picture.findall(f"{SVG}path") == []

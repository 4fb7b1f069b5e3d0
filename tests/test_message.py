"""How a message's identity is found, and what is refused."""

from __future__ import annotations

import contextlib
import json
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from idemp import message as message_module
from idemp.errors import BadMessage
from idemp.message import MAX_BODY, MAX_ID, Message, Properties, decode

PLAIN = Properties()


def body(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


def test_event_json() -> None:
    """The seed's format: names in any case, the exact one wins, args may be missing."""
    assert decode(b'{"type":"new_order","id":"123","args":{"a":1}}', PLAIN).args == {"a": 1}
    message = decode(b'{"Type":"t","ID":"wrong","id":"right"}', PLAIN)
    assert (message.type, message.id, message.args) == ("t", "right", {})


def test_the_brokers_properties_help_out() -> None:
    """Where the body has no id or type."""
    message = decode(b'{"total":1}', Properties(message_id="m", type="t"))
    assert (message.id, message.type) == ("m", "t")
    assert decode(body(id="b", type="t"), Properties(message_id="m")).id == "b"


def test_structured_cloudevents() -> None:
    """Identity is source and id together."""
    event = {"specversion": "1.0", "id": "7", "source": "/shop", "type": "t", "data": {"id": "data"}}
    message = decode(json.dumps(event).encode(), Properties(message_id="m"))
    assert (message.id, message.source, message.args) == ("/shop 7", "/shop", {"id": "data"})


@pytest.mark.parametrize("prefix", ["cloudEvents:", "cloudEvents_", "ce-", "ce_"])
def test_binary_cloudevents(prefix: str) -> None:
    """The attributes are headers; an id inside the data is data."""
    headers = {prefix + name: value for name, value in (("id", "7"), ("source", "urn:x"), ("type", "t"))}
    message = decode(b'{"id":"customer-1"}', Properties(headers=headers, message_id="m"))
    assert (message.id, message.type, message.args) == ("urn:x 7", "t", {"id": "customer-1"})
    text = Properties(headers=headers, content_type="text/plain")
    assert decode(b"hello", text).args == "hello"
    assert decode(b"", Properties(headers=headers)).args == {}


def test_cloudevents_cannot_run_into_each_other() -> None:
    """Source "a" with id "b c" and source "a b" with id "c" would be one."""
    with pytest.raises(BadMessage, match="space"):
        decode(body(specversion="1.0", id="c", source="a b", type="t"), PLAIN)


@pytest.mark.parametrize(
    ("data", "properties", "reason"),
    [
        (b"", PLAIN, "not JSON"),
        (b"\xff", PLAIN, "not JSON"),
        (b"null", PLAIN, "NoneType"),
        (b'{"type":"t"}', PLAIN, "no id"),
        (b'{"type":"t","id":null}', PLAIN, "no id"),
        (b'{"id":"1"}', PLAIN, "no type"),
        (b'{"type":"t","id":{}}', PLAIN, "must be a string, not dict"),
        (b'{"type":"t","id":""}', Properties(message_id="m"), "the id is empty"),
        (b"[" * 50_000, PLAIN, "not JSON"),
        (b'{"id":' + b"9" * 5000 + b"}", PLAIN, "not JSON"),
        (b" " * (MAX_BODY + 1), PLAIN, "are allowed"),
        (b"{", Properties(headers={"ce-id": "1", "ce-source": "s", "ce-type": "t"}), "content type"),
        (b"{}", Properties(headers={"ce-id": 7, "ce-source": "s", "ce-type": "t"}), "must be a string"),
        (body(specversion="1.0", source="s", type="t"), PLAIN, "no id"),
    ],
)
def test_what_is_refused(data: bytes, properties: Properties, reason: str) -> None:
    """N13: each with its reason; nothing without an id is ever equal to something else."""
    with pytest.raises(BadMessage, match=reason):
        decode(data, properties)


@given(st.text(min_size=1, max_size=1100), st.text(min_size=1))
def test_any_unicode_goes_through(id: str, type: str) -> None:
    """What is encoded is decoded, unless it is too long."""
    message = Message(id, type, {"id": id})
    if max(len(id.encode()), len(type.encode())) > MAX_ID:
        with pytest.raises(BadMessage, match="are allowed"):
            decode(message.encode(), message.properties())
        return
    again = decode(message.encode(), message.properties())
    assert (again.id, again.type, again.args) == (id, type, {"id": id})


@given(st.binary(max_size=300))
def test_any_bytes_are_decoded_or_refused(data: bytes) -> None:
    """Nothing but `BadMessage` ever comes out."""
    with contextlib.suppress(BadMessage):
        assert decode(data, PLAIN).id


# As text, so that nothing is only such JSON as some library would write.
_LARGE = {"long": "9" * 5000, "deep": "[" * 5000 + "]" * 5000, "much": f'"{"x" * MAX_ID}x"'}
_ODD = (
    *(
        '"a"',
        '""',
        '"\\ud800"',
        '"\\u0000"',
        '"\\q"',
        '"\udcff"',
        '"\x01"',
        '"\udced\udca0\udc80"',
        '"',
        "\ufeff",
    ),
    *(
        "0",
        "-0",
        "01",
        "1.",
        "5",
        "-",
        "9" * 30,
        "0.12345678901234567",
        "1e999",
        "-1E-999",
        "NaN",
        "-Infinity",
    ),
    *("null", "true", "tru", "{}", "[]", "[", "[1,]", '{"id":"inner","id":1}', '{"\udcff":0}', *_LARGE),
)
_NAMES = ("type", "id", "args", "ID", "Type", r"\u0069d", "specversion", "source", "data", "x", "\udcff")
_PAIRS = st.tuples(st.sampled_from(_NAMES), st.sampled_from(_ODD))
_USUAL = [("type", '"t"'), ("id", '"i"'), ("args", "{}")]


def _spelled(usual: bool, pairs: list[tuple[str, str]], start: str, end: str) -> bytes:
    fields = [*(_USUAL if usual else ()), *pairs]
    inside = ",".join(f'"{name}":{_LARGE.get(value, value)}' for name, value in fields)
    return f"{start}{{{inside}}}{end}".encode(errors="surrogateescape")


_BODIES = st.builds(
    _spelled,
    st.booleans(),
    st.lists(_PAIRS, max_size=5),
    st.sampled_from(("", "", "\ufeff")),
    st.sampled_from(("", "", " ", "\x00", "x", "{}")),
)


@settings(max_examples=500, deadline=None)
@given(_BODIES, st.sampled_from((PLAIN, Properties(message_id="m", type="t"))))
def test_the_short_way_to_read_a_body_leads_where_the_long_one_does(
    body: bytes, properties: Properties
) -> None:
    """Whatever is odd in it: the same message, or the same reason."""
    short = _came(body, properties)
    with mock.patch.object(message_module, "_usual", side_effect=ValueError):
        assert repr(short) == repr(_came(body, properties))  # a NaN is not equal to itself


def _came(body: bytes, properties: Properties) -> Message | str:
    try:
        return decode(body, properties)
    except BadMessage as error:
        return str(error)


def test_properties_carry_the_identity() -> None:
    """As AMQP names them."""
    properties = Message("1", "t", published=5.0, correlation_id="c").properties(app_id="shop")
    assert properties == Properties("1", "t", "c", "shop", 5.0, "application/json", {})
    assert Message("1", "t").properties().timestamp is not None

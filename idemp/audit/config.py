"""The auditor's settings: AuditMQ's file as it is, and what was added to it.

All faults are told at once, each with its line and its key.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import NamedTuple, TypeVar

from idemp.audit.judge import MESSAGES, NUMBERS, STRING, Field, Tolerance
from idemp.audit.messages import EVERYBODY, NAME, Unfit, fit, number
from idemp.audit.nodes import Node
from idemp.errors import ConfigError
from idemp.settings import duration

T = TypeVar("T")

PLACE = 2000
"""Bytes that the URL of a server has at most, or the name of a file."""
KINDS = (*NUMBERS, STRING, MESSAGES)


class Config(NamedTuple):
    """What the auditor is told.  tick: seconds between two judgements; keep: that buckets are remembered."""

    dsn: str
    fields: tuple[Field, ...]
    exchange: str = "auditmq_exchange"
    consumer_queue: str = "audit_in"
    consumer_routing_key: str = "auditmq"
    report_routing_key: str = "auditmq_reports"
    report_queue: str = ""
    consumer_name: str = "auditmq_worker"
    tick: float = 5.0
    keep: float = 86400.0
    state: str = "audit.db"
    publish_unknown: bool = False
    owner_reports: bool = True
    statsd: str = ""
    prometheus: int | None = None

    def services(self) -> set[str]:
        """Everybody who holds a field."""
        return {who for field in self.fields for who in field.holders()}


TEXTS = {
    "exchange": "exchange",
    "consumer_queue": "consumer_queue",
    "consumerroutingkey": "consumer_routing_key",
    "reportroutingkey": "report_routing_key",
    "report_queue": "report_queue",
    "consumername": "consumer_name",
    "state": "state",
    "statsd": "statsd",
}
"""Key in the file -> name here."""
SWITCHES = ("publish_unknown", "owner_reports")
KEYS = ("dsn", *TEXTS, "tick", "keep", "prometheus", *SWITCHES, "data")
VALUED = ("samples", "tolerance")
"""Of a field that has values."""
COUNTED = ("bucket", "settle")
"""Of messages."""
FIELD_KEYS = ("type", "owner", *VALUED, *COUNTED, "stale_after", "looks", "replicas")


def configured(root: Node, source: str) -> Config:
    """The settings in ``root``.  source: how they are called in a fault.  Raises `ConfigError`."""
    reader = _Reader()
    config = reader.config(root)
    if not reader.faults:
        return config
    faults = [f"line {line}: {sentence}" for line, sentence in sorted(reader.faults)]
    if len(faults) == 1:
        raise ConfigError(f"{source}: {faults[0]}")
    raise ConfigError(f"{source} has {len(faults)} faults:" + "".join(f"\n  {fault}" for fault in faults))


_A = {STRING: "a string has", MESSAGES: "messages have"}


class _Reader:
    """Collects faults; what is wrong becomes something harmless."""

    def __init__(self) -> None:
        self.faults: list[tuple[int, str]] = []

    def fault(self, node: Node, sentence: str) -> None:
        self.faults.append((node.line, sentence))

    # ---------------------------------------------------------------- the file

    def config(self, root: Node) -> Config:
        table = self.table(root, "the file", KEYS)
        if "dsn" not in table:
            self.fault(root, "dsn is missing; write it like dsn: amqp://guest:guest@localhost:5672/")
        texts = {
            name: self.text(table[key], key, PLACE if key == "state" else NAME)
            for key, name in TEXTS.items()
            if key in table
        }
        switches = {name: self.switch(table[name], name) for name in SWITCHES if name in table}
        tick = self.seconds(table["tick"], "tick") if "tick" in table else 5.0
        keep = self.seconds(table["keep"], "keep") if "keep" in table else 86400.0
        port = self.whole(table["prometheus"], "prometheus", 1, 65535) if "prometheus" in table else None
        dsn = self.text(table["dsn"], "dsn", PLACE) if "dsn" in table else ""
        if dsn and "://" not in dsn:
            self.fault(table["dsn"], "dsn is no URL; write it like amqp://guest:guest@localhost:5672/")
        fields = self.fields(table["data"]) if "data" in table else ()
        if not fields and not self.faults:
            self.fault(table.get("data", root), "data names no field; there is nothing to audit")
        return Config(dsn, fields, tick=tick, keep=keep, prometheus=port, **texts, **switches)  # type: ignore[arg-type]

    def fields(self, node: Node) -> tuple[Field, ...]:
        if node.empty():
            return ()
        table = self.named(node, "data", "a table of fields")
        spelled: dict[str, str] = {}
        for name, each in table.items():
            self.name(name, each, "data")
            other = spelled.setdefault(name.lower(), name)
            if other != name:
                self.fault(
                    each, f"data.{name} and data.{other} differ in the case of letters only; rename one"
                )
        return tuple(self.field(name, each) for name, each in table.items())

    def field(self, name: str, node: Node) -> Field:
        where = f"data.{name}"
        table = self.table(node, where, FIELD_KEYS)
        kind = self.kind(table.get("type"), node, where)
        owner = self.holder(table.get("owner"), node, where)
        replicas = self.replicas(table["replicas"], f"{where}.replicas", kind) if "replicas" in table else {}
        if not replicas and not (table.get("replicas") and self.faults):
            self.fault(table.get("replicas", node), f"{where}.replicas names nobody to compare {owner} with")
        if owner and owner in replicas:
            self.fault(table["replicas"], f"{where}.replicas names {owner!r}, which is the owner; remove one")
        tolerance = Tolerance()
        if "tolerance" in table:
            tolerance = self.tolerance(table["tolerance"], f"{where}.tolerance", kind)
        stale = self.seconds(table["stale_after"], f"{where}.stale_after") if "stale_after" in table else None
        counts = kind == MESSAGES
        for key in VALUED if counts else COUNTED:
            if key in table:
                self.fault(table[key], f"{where}.{key}: a field of type {kind} has none; remove it")
        samples = 2 if counts else self.samples(table.get("samples"), node, where)
        looks = self.whole(table["looks"], f"{where}.looks", 1, 1000) if "looks" in table else 1
        bucket = self.whole_seconds(table["bucket"], f"{where}.bucket") if "bucket" in table else 60
        settle = self.seconds(table["settle"], f"{where}.settle") if "settle" in table else 60.0
        return Field(name, kind, owner, samples, replicas, tolerance, stale, looks, bucket, settle)

    def kind(self, node: Node | None, field: Node, where: str) -> str:
        kinds = ", ".join(KINDS[:-1]) + f" or {KINDS[-1]}"
        if node is None:
            self.fault(field, f"{where}.type is missing; it is {kinds}")
        elif node.text not in KINDS:
            self.fault(node, f"{where}.type={node.text!r} is unknown; it is {kinds}")
        else:
            return node.text
        return KINDS[0]

    def holder(self, node: Node | None, field: Node, where: str) -> str:
        if node is None:
            self.fault(field, f"{where}.owner is missing; it names the service that holds the truth")
            return ""
        owner = self.text(node, f"{where}.owner")
        self.service(owner, node, f"{where}.owner")
        return owner

    def name(self, name: str, node: Node, where: str) -> None:
        if name and not fit(name):
            self.fault(node, f"{where}: {name[:40]!r} is no name; it has up to {NAME} bytes, all printable")

    def service(self, name: str, node: Node, where: str) -> None:
        if name == EVERYBODY:
            self.fault(node, f"{where}: no service can be called {EVERYBODY!r}, which is the overall status")

    def samples(self, node: Node | None, field: Node, where: str) -> int:
        if node is None:
            self.fault(
                field, f"{where}.samples is missing; write how many values must be constant, 2 or more"
            )
            return 2
        return self.whole(node, f"{where}.samples", 2, 10_000)

    def replicas(self, node: Node, where: str, kind: str) -> dict[str, Decimal]:
        """Of a list of tables with one name each, or of one table; of a name in two items the last counts."""
        if node.empty():
            return {}
        found: dict[str, Decimal] = {}
        for table in node.items if node.items is not None else [node]:
            for name, each in self.named(table, where, "a list of services, or a table").items():
                self.name(name, each, where)
                self.service(name, each, where)
                found[name] = self.offset(each, f"{where}.{name}", kind)
        return found

    def offset(self, node: Node, where: str, kind: str) -> Decimal:
        if node.empty():
            return Decimal(0)
        table = self.table(node, where, ("offset",))
        if "offset" not in table:
            return Decimal(0)
        if kind not in NUMBERS:
            self.fault(table["offset"], f"{where}.offset: {_A[kind]} no offset; remove it")
        return self.number(table["offset"], f"{where}.offset")

    def tolerance(self, node: Node, where: str, kind: str) -> Tolerance:
        text = (node.text or "").strip()
        if kind == STRING:
            self.fault(node, f"{where}: {_A[kind]} no tolerance; remove it")
        percent = text.endswith("%")
        amount = self.number(Node(node.line, text.removesuffix("%").strip()), where)
        if amount < 0:
            self.fault(
                node, f"{where}={text!r} is negative; write how far a replica may be off, like 5 or 0.5%"
            )
        return Tolerance(amount, percent)

    # ---------------------------------------------------------------- values

    def named(self, node: Node, where: str, what: str) -> Mapping[str, Node]:
        """A table whose names are free."""
        if node.table is None:
            self.fault(node, f"{where} must be {what}")
            return {}
        for name, line in node.twice:
            self.faults.append((line, f"{where} has {name!r} twice; remove one"))
        if "" in node.table:
            self.fault(node.table[""], f"{where} has an empty name")
        return node.table

    def table(self, node: Node, where: str, known: tuple[str, ...]) -> dict[str, Node]:
        """A table whose names are ``known``, in any case of letters."""
        found: dict[str, Node] = {}
        for name, each in self.named(node, where, f"a table with {', '.join(known)}").items():
            if name.lower() not in known:
                self.fault(each, f"{where} has no setting {name!r}; it has {', '.join(known)}")
            found[name.lower()] = each
        return found

    def text(self, node: Node, where: str, most: int = NAME) -> str:
        if not node.text:
            self.fault(node, f"{where} must be a text that is not empty")
        elif not fit(node.text, most):
            self.fault(node, f"{where} must have up to {most} bytes, all of them printable")
        return node.text or ""

    def number(self, node: Node, where: str) -> Decimal:
        read = number(node.text or "")
        if isinstance(read, Unfit):
            self.fault(node, f"{where}={node.text or ''!r} is no number")
            return Decimal(0)
        return read

    def whole(self, node: Node, where: str, least: int, most: int) -> int:
        text = node.text or ""
        if not text.isdecimal() or not text.isascii() or not least <= int(text[:9]) <= most:
            self.fault(node, f"{where}={node.text!r} must be a whole number from {least} to {most}")
            return least
        return int(text)

    def whole_seconds(self, node: Node, where: str) -> int:
        read = self.seconds(node, where)
        if read < 1 or read != int(read):
            self.fault(node, f"{where}={node.text!r} must be whole seconds, like 60s")
            return 60
        return int(read)

    def seconds(self, node: Node, where: str) -> float:
        return self.either(node, 60.0, lambda: duration(node.text or "", where))

    def switch(self, node: Node, where: str) -> bool:
        match (node.text or "").lower():
            case "true" | "yes" | "on":
                return True
            case "false" | "no" | "off":
                return False
        self.fault(node, f"{where}={node.text!r} must be true or false")
        return False

    def either(self, node: Node, otherwise: T, read: Callable[[], T]) -> T:
        try:
            return read()
        except ConfigError as error:
            self.fault(node, str(error))
            return otherwise

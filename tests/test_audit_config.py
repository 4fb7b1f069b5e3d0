"""The auditor's settings: AuditMQ's file is taken as it is, and every fault has its line and key."""

from __future__ import annotations

import re
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from idemp.audit.config import FIELD_KEYS, KEYS, Config, configured
from idemp.audit.document import read
from idemp.audit.judge import Field, Tolerance
from idemp.errors import ConfigError

SAMPLE = """
dsn: amqp://guest:guest@localhost:5672/
exchange: auditmq
consumer_queue: audit_in
data:
  sales_count:
    type: int
    owner: sales-service
    samples: 3
    replicas:
      - billing-service:
          offset: 10
      - stock-service:
"""


def config(text: str) -> Config:
    return configured(read(text, "config.yaml"), "config.yaml")


def test_a1_the_documented_sample() -> None:
    """Replicas as a list, defaults for what is not said."""
    found = config(SAMPLE)
    replicas = {"billing-service": Decimal(10), "stock-service": Decimal(0)}
    field = Field("sales_count", "int", "sales-service", 3, replicas)
    assert found == Config("amqp://guest:guest@localhost:5672/", (field,), exchange="auditmq")
    assert (found.consumer_queue, found.consumer_routing_key) == ("audit_in", "auditmq")
    assert (found.report_routing_key, found.consumer_name) == ("auditmq_reports", "auditmq_worker")
    assert (Config("", ()).exchange, found.tick, found.publish_unknown) == ("auditmq_exchange", 5.0, False)
    assert found.services() == {"sales-service", "billing-service", "stock-service"}


def test_a1_the_map_form_and_names_in_any_case() -> None:
    """Settings are read in any case; names of fields and services keep theirs, and may have dots."""
    found = config(
        """
        DSN: amqp://localhost
        ConsumerRoutingKey: in
        data:
          Sales.Count:
            Type: float
            OWNER: Sales
            samples: 2
            replicas: {Billing: {Offset: -0.1}, stock: {}}
        """
    )
    [field] = found.fields
    assert (field.name, field.owner) == ("Sales.Count", "Sales")
    assert field.replicas == {"Billing": Decimal("-0.1"), "stock": Decimal(0)}
    assert found.consumer_routing_key == "in"


def test_a1_of_a_replica_named_twice_the_last_counts() -> None:
    """In the list; JSON is YAML."""
    found = config(
        '{"dsn": "amqp://h", "data": {"f": {"type": "int", "owner": "S", "samples": 2,'
        ' "replicas": [{"B": {"offset": 1}}, {"B": {"offset": 2}}]}}}'
    )
    assert found.fields[0].replicas == {"B": Decimal(2)}


def test_the_page_shows_settings_that_work() -> None:
    """And each one is in its table."""
    page = (Path(__file__).resolve().parent.parent / "docs/audit.md").read_text()
    values, messages = re.findall(r"^```yaml\n(.*?)^```", page, re.M | re.S)
    assert config(values).services() == {"sales-service", "billing-service", "stock-service"}
    assert config(messages).services() == {"shop", "billing", "stock"}
    named = set(re.findall(r"^\| `([\w.<>]+)` ", page, re.M))
    assert named == {*KEYS[:-1], *(f"data.<field>.{key}" for key in FIELD_KEYS)}


def test_a13_the_tick_is_five_seconds_or_what_is_told() -> None:
    """As AuditMQ's, which could not be told; nothing and less is refused."""
    assert config(SAMPLE).tick == 5.0
    assert config(f"tick: 250ms\n{SAMPLE}").tick == 0.25
    with pytest.raises(ConfigError, match="line 1: tick"):
        config(f"tick: 0s\n{SAMPLE}")


def test_messages_have_settings_of_their_own() -> None:
    """And values theirs; a mixture is told."""
    field = "{type: messages, owner: S, bucket: 10s, settle: 30s, looks: 2, replicas: [B: ]}"
    [found] = config(f"dsn: amqp://h\nkeep: 1h\ndata: {{orders: {field}}}").fields
    assert (found.bucket, found.settle, found.looks) == (10, 30.0, 2)
    wrong = "{type: messages, owner: S, samples: 3, bucket: 1500ms, looks: 0, replicas: [B: {offset: 1}]}"
    with pytest.raises(ConfigError) as told:
        config(f"dsn: amqp://h\ndata: {{orders: {wrong}}}")
    for part in (
        "data.orders.samples: a field of type messages has none",
        "data.orders.bucket='1500ms' must be whole seconds",
        "data.orders.looks='0' must be a whole number from 1 to 1000",
        "data.orders.replicas.B.offset: messages have no offset",
    ):
        assert part in str(told.value)


def test_what_was_added() -> None:
    """Beyond AuditMQ's."""
    more = "tick: 500ms\nstate: /var/lib/audit.db\nreport_queue: out\n"
    more += "publish_unknown: true\nowner_reports: off\n"
    text = SAMPLE.replace("    type: int\n", "    type: int\n    tolerance: 0.5%\n    stale_after: 2m\n")
    found = config(more + text)
    assert (found.tick, found.state, found.report_queue) == (0.5, "/var/lib/audit.db", "out")
    assert (found.publish_unknown, found.owner_reports) == (True, False)
    assert found.fields[0].tolerance == Tolerance(Decimal("0.5"), True)
    assert found.fields[0].stale_after == 120.0


def test_all_faults_are_told_at_once() -> None:
    """In the order of lines, each naming its key; the password is not in it."""
    with pytest.raises(ConfigError) as raised:
        config(
            """dsn: me:tellnobody@host
tick: soon
exchnage: x
data:
  one:
    type: integer
    owner: S
    samples: 1
    replicas:
      - S:
  two:
    type: string
    owner: all
    samples: 3
    tolerance: 5
    replicas: {B: {}, B: {offset: 1}}
"""
        )
    lines = str(raised.value).splitlines()
    assert lines[0] == "config.yaml has 10 faults:"
    said = [
        (int(line.split()[1][:-1]), line.split(": ", 1)[1].split("=")[0].split()[0]) for line in lines[1:]
    ]
    assert said == [
        (1, "dsn"),
        (2, "tick"),
        (3, "the"),
        (6, "data.one.type"),
        (8, "data.one.samples"),
        (9, "data.one.replicas"),
        (13, "data.two.owner:"),
        (15, "data.two.tolerance:"),
        (16, "data.two.replicas"),
        (16, "data.two.replicas.B.offset:"),
    ]
    assert "tellnobody" not in str(raised.value)


@pytest.mark.parametrize(
    ("change", "by", "part"),
    [
        ("samples: 3", "samples: 1", "line 9: data.sales_count.samples='1' must be a whole number"),
        ("samples: 3", "samples: 0", "line 9: data.sales_count.samples='0' must be a whole number"),
        ("    samples: 3\n", "", "line 6: data.sales_count.samples is missing"),
        ("type: int", "type: bool", "line 7: data.sales_count.type='bool' is unknown"),
        ("stock-service", "sales-service", "which is the owner"),
        ("offset: 10", "offset: ten", "line 12: data.sales_count.replicas.billing-service.offset='ten'"),
        ("offset: 10", "offset: .nan", "is no number"),
        ("dsn: ", "Dns: ", "no setting 'Dns'"),
        ("data:", "data: [", "is no YAML"),
        ("data:", "a: &a [*a]\ndata:", "contains itself"),
        ("owner: sales-service", "owner:", "data.sales_count.owner must be a text"),
        (
            "owner: sales-service",
            'owner: "a\\ud800"',
            "line 8: data.sales_count.owner must have up to 200 bytes",
        ),
        ("stock-service", '"stock\\0"', "data.sales_count.replicas: 'stock\\x00' is no name"),
        ("sales_count:", f"{'x' * 201}:", "is no name; it has up to 200 bytes, all printable"),
    ],
)
def test_a19_a_fault_names_its_key(change: str, by: str, part: str) -> None:
    """And its line."""
    with pytest.raises(ConfigError) as raised:
        config(SAMPLE.replace(change, by))
    assert part in str(raised.value)
    assert str(raised.value).startswith("config.yaml")


@pytest.mark.parametrize("text", ["", "data:", "[]", "just text", "a: b: c", "\x00"])
def test_no_settings_at_all(text: str) -> None:
    """A sentence too."""
    with pytest.raises(ConfigError):
        config(text)


@given(st.text(alphabet="dsn:data {}[]-&*!\n#'\"%01.", max_size=60))
def test_any_text_is_settings_or_a_fault(text: str) -> None:
    """Nothing else is raised."""
    with pytest.raises(ConfigError):
        config(text)


def test_a_missing_extra_is_one_sentence() -> None:
    """With the line to type."""
    code = "import sys; sys.modules['yaml'] = None\nimport idemp.audit\nimport idemp.audit.document"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert "pip install 'idemp[audit]'" in done.stderr

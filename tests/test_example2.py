"""example2: customers and accounts, row by row of what they must do (R1 to R21)."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import jwt
import pytest
import redis as driver

from example2 import auth
from example2.settings import read
from idemp import ConfigError
from tests.pair import KEY, ROOT, Service, login, revenue, until
from tests.servers import PostgreSQL, Redis

Make = Callable[..., Service]


@pytest.fixture(scope="module")
def url(redis: Redis) -> str:
    """A database of Redis for this module."""
    return redis.database()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("example2")


@pytest.fixture(scope="module")
def accounts(url: str, folder: Path) -> Iterator[Service]:
    """One on SQLite, for all tests that do not stop it."""
    with closing(Service("accounts", url, f"sqlite:///{folder}/accounts.db", folder)) as service:
        yield service.start()


@pytest.fixture(scope="module")
def customers(url: str, folder: Path, accounts: Service) -> Iterator[Service]:
    """The other, which has heard of the accounts."""
    with closing(Service("customers", url, f"sqlite:///{folder}/customers.db", folder)) as service:
        service.start()
        heard(service, accounts)
        yield service


def heard(customers: Service, accounts: Service) -> None:
    """Until the customers service knows the accounts of both users."""
    for user, account in (("user1", "1"), ("user2", "2")):
        headers = login(accounts, user)

        def known(headers: dict[str, str] = headers, account: str = account) -> bool:
            body = {"name": "first", "account_id": account}
            return customers.client.post("/customers", json=body, headers=headers).status_code == 201

        until(known, f"account {account} is known")


@pytest.fixture
def own(redis: Redis, tmp_path: Path) -> Iterator[Make]:
    """Services of this test's own, on a database of Redis of its own."""
    place = redis.database()
    with ExitStack() as stack:

        def make(name: str, database: str = "", **more: str) -> Service:
            database = database or f"sqlite:///{tmp_path}/{name}.db"
            return stack.enter_context(closing(Service(name, place, database, tmp_path, **more)))

        make.place = place  # type: ignore[attr-defined]
        yield make


@pytest.fixture
def client(url: str) -> Iterator[Any]:
    with driver.Redis.from_url(url) as client:
        yield client


def new_customer(customers: Service, headers: dict[str, str], account: str = "1", name: str = "c") -> str:
    body = {"name": name, "account_id": account}
    answer = customers.client.post("/customers", json=body, headers=headers)
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


def new_invoice(customers: Service, headers: dict[str, str], customer: str, cents: int) -> str:
    body = {"customer_id": customer, "purchase_date": "2019-01-09", "purchase_price_cents": cents}
    answer = customers.client.post("/invoices", json=body, headers=headers)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


def of_customer(accounts: Service, headers: dict[str, str], customer: str) -> int | None:
    """Its revenue; None while it is not there."""
    for account in accounts.client.get("/accounts", headers=headers).json():
        for each in account["customers"]:
            if each["customer_id"] == customer:
                return int(each["total_revenue_cents"])
    return None


# ------------------------------------------------------------------ login and tokens


def test_login(accounts: Service) -> None:
    """R1: a token as plain text, good for 15 minutes; 400 and 401 without a body."""
    answer = accounts.client.post("/auth/login", json={"UserName": "user1", "PASSWORD": "password1"})
    assert answer.headers["content-type"].startswith("text/plain")
    claims = jwt.decode(answer.text, KEY, algorithms=["HS256"])
    assert claims["username"] == "user1"
    assert 890 < claims["exp"] - time.time() < 910
    for body in (b"{", b"[]", b'{"username": 1, "password": "x"}', b"{}"):
        bad = accounts.client.post("/auth/login", content=body)
        assert (bad.status_code, bad.content) == (400, b"")
    for name, password in (("user1", "password2"), ("nobody", "password1"), ("", "")):
        wrong = accounts.client.post("/auth/login", json={"username": name, "password": password})
        assert (wrong.status_code, wrong.content) == (401, b"")


ZERO = "0001-01-01T00:00:00Z"
SEED_TOKEN = (
    "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.eyJ1c2VybmFtZSI6InVzZXIxIiwiZXhwIjoxODkzNDU2MDAwfQ."
    "XfHeNgBJ4NrQgBD4PB3rcDe6S6PzUd17monc8nVXDfU"
)
SEED_KEY = "a62f2225bf70bfaccbc7f1ef2a397836717377de"


def test_a_token_of_the_seed_is_good_under_its_key() -> None:
    """R1, R2: the same claims, the same algorithm."""
    assert auth.caller(SEED_KEY)(f"Bearer {SEED_TOKEN}") == "user1"


@pytest.mark.parametrize(
    ("header", "status", "text"),
    [
        (None, 400, "Missing Bearer token in request"),
        ("", 400, "Missing Bearer token in request"),
        ("Bearer", 400, "Missing Bearer token in request"),
        ("Bearer a b", 400, "Missing Bearer token in request"),
        ("Bearer nothing", 403, "Forbidden"),
        ("Bearer a.b.c", 403, "Forbidden"),
        ("Bearer a.b", 403, "Forbidden"),
        (f"Bearer {SEED_TOKEN}", 403, "Forbidden"),
        (f"Bearer {SEED_TOKEN}x", 403, "Forbidden"),
        ("Bearer " + jwt.encode({"username": "user1", "exp": 1}, KEY), 403, "Forbidden"),
        ("Bearer " + jwt.encode({"username": "user1"}, KEY), 403, "Forbidden"),
        ("Bearer " + jwt.encode({"username": 1, "exp": 2**32}, KEY), 403, "Forbidden"),
        ("Bearer " + jwt.encode({"exp": 2**32}, KEY), 403, "Forbidden"),
        ("Bearer " + jwt.encode({"username": "user1", "exp": 2**32}, "", algorithm="none"), 403, "Forbidden"),
    ],
)
def test_a_bad_token(
    accounts: Service, customers: Service, header: str | None, status: int, text: str
) -> None:
    """R2: never a crash, on either service."""
    headers = {} if header is None else {"Authorization": header}
    for answer in (
        accounts.client.get("/accounts", headers=headers),
        customers.client.post("/customers", json={"name": "n", "account_id": "1"}, headers=headers),
        customers.client.delete("/invoices/1", headers=headers),
    ):
        assert (answer.status_code, answer.text) == (status, text)


def test_the_first_word_of_a_header_is_not_looked_at(accounts: Service) -> None:
    """R2: as the seed has it."""
    token = login(accounts)["Authorization"].split()[1]
    assert accounts.client.get("/accounts", headers={"Authorization": f"JWT {token}"}).status_code == 200


def test_an_old_hash_is_good_once(accounts: Service, folder: Path) -> None:
    """R17: user1 and user2 can log in; then argon2 has their password, and only that."""
    login(accounts, "user1")
    login(accounts, "user1")
    with closing(sqlite3.connect(folder / "accounts.db")) as db:
        [(kept,)] = db.execute("SELECT password_hash FROM users WHERE username = 'user1'").fetchall()
    assert kept.startswith("$argon2")
    assert auth.check("password1", kept) == (True, False)
    assert auth.check("password1", auth.old_hash("password1")) == (True, True)
    assert auth.check("password2", auth.old_hash("password1"))[0] is False
    assert auth.check("password1", None)[0] is False


# ------------------------------------------------------------------ customers and invoices


@pytest.mark.parametrize(
    "body",
    [b"{", b"[]", b'{"name": 1, "account_id": "1"}', b'{"name": "", "account_id": "1"}', b'{"name": "n"}',
     b'{"name": "n", "account_id": ""}', b'{"name": "n", "account_id": "abc"}', b'"\\ud800"'],
)  # fmt: skip
def test_a_bad_customer(accounts: Service, customers: Service, body: bytes) -> None:
    """R3: 400, and why."""
    answer = customers.client.post("/customers", content=body, headers=login(accounts))
    assert answer.status_code == 400
    assert answer.text.startswith("Invalid data")


def test_a_customer(accounts: Service, customers: Service) -> None:
    """R3: 201 with an id in decimal text; more fields are borne, and a percent sign too."""
    body = {"name": "100 % <Žižka>", "account_id": "1", "id": "5", "created_date": "2020-01-01T00:00:00Z"}
    headers = login(accounts)
    answer = customers.client.post("/customers", json=body, headers=headers)
    assert answer.status_code == 201
    assert answer.json()["id"].isdecimal()
    until(lambda: of_customer(accounts, headers, answer.json()["id"]) == 0)
    names = json.dumps(accounts.client.get("/accounts", headers=headers).json(), ensure_ascii=False)
    assert "100 % <Žižka>" in names


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"purchase_date": "2019-13-01"}, 400),
        ({"purchase_date": "2019-1-9"}, 400),
        ({"purchase_date": None}, 400),
        ({"customer_id": "seven"}, 400),
        ({"customer_id": "999999"}, 404),
        ({"purchase_price_cents": -1}, 400),
        ({"purchase_price_cents": "100"}, 400),
        ({"purchase_price_cents": 1.5}, 400),
        ({"purchase_price_cents": 2**63}, 400),
    ],
)
def test_a_bad_invoice(accounts: Service, customers: Service, change: dict[str, Any], status: int) -> None:
    """R4: an unknown customer is 404, bad data 400."""
    headers = login(accounts)
    good = {"customer_id": "1", "purchase_date": "2019-01-09", "purchase_price_cents": 1}
    answer = customers.client.post("/invoices", json=good | change, headers=headers)
    assert answer.status_code == status, answer.text


def test_events_are_those_of_the_seed(accounts: Service, customers: Service, client: Any) -> None:
    """R4, R5: read by a program that knows two fields and nothing else; the payloads to the letter."""
    headers = login(accounts)
    customer = new_customer(customers, headers, name="Martin North 4")
    invoice = new_invoice(customers, headers, customer, 8000)
    expected = {
        "CustomerCreated": {
            "id": customer, "account_id": "1", "name": "Martin North 4", "created_date": ZERO,
        },
        "InvoiceCreated": {
            "id": invoice, "customer_id": customer, "purchase_price_cents": 8000,
            "created_date": ZERO, "purchase_date": "2019-01-09",
        },
    }  # fmt: skip

    def old_reader() -> list[tuple[str, Any]]:
        entries = [fields for _, fields in client.xrange("event-stream")]
        return [(each[b"EventTypeName"].decode(), json.loads(each[b"Payload"])) for each in entries]

    def both() -> bool:
        found = old_reader()
        return all((kind, payload) in found for kind, payload in expected.items())

    until(both)


def test_a_repeated_request_has_one_effect(accounts: Service, customers: Service) -> None:
    """R6: with an Idempotency-Key the first answer comes again."""
    headers = login(accounts) | {"Idempotency-Key": "once"}
    assert new_customer(customers, headers) == new_customer(customers, headers)


# ------------------------------------------------------------------ accounts


def test_accounts_have_their_shape(accounts: Service, customers: Service) -> None:
    """R7: as the seed words it, in the order of the numbers; also with no description and no customer."""
    headers = login(accounts)
    made = accounts.client.post("/accounts", json={"name": "empty"}, headers=headers)
    assert made.status_code == 201
    for n in range(3):
        new_customer(customers, headers, name=f"n{n}")

    def there() -> Any:
        found = accounts.client.get("/accounts", headers=headers).json()
        return (
            found if sum(each["name"] in ("n0", "n1", "n2") for each in found[0]["customers"]) == 3 else None
        )

    found = until(there)
    assert [list(each) for each in found] == [["account", "customers", "total_revenue_cents"]] * len(found)
    assert list(found[0]["account"]) == ["id", "name", "description", "owned_by", "created_date"]
    assert found[0]["account"] == {
        "id": 1, "name": "one", "description": "one", "owned_by": "user1", "created_date": ZERO,
    }  # fmt: skip
    ids = [each["account"]["id"] for each in found]
    assert ids == sorted(ids)
    numbers = [int(each["customer_id"]) for each in found[0]["customers"]]
    assert numbers == sorted(numbers)
    last = found[-1]
    assert (last["account"]["name"], last["account"]["description"]) == ("empty", None)
    assert (last["customers"], last["total_revenue_cents"]) == ([], 0)
    assert accounts.client.get("/accounts", headers=headers).json() == found


def test_revenue_is_more_than_64_bits_can_hold(accounts: Service, customers: Service) -> None:
    """R8: each amount up to 2^63 - 1 cents, and the sum is exact."""
    headers = login(accounts)
    customer = new_customer(customers, headers)
    amounts = [2**63 - 1, 2**63 - 1, 2**31, 1, 0]
    for cents in amounts:
        new_invoice(customers, headers, customer, cents)
    until(lambda: of_customer(accounts, headers, customer) == sum(amounts))


def test_ownership(accounts: Service, customers: Service) -> None:
    """R9: user1 neither sees nor writes what is user2's, in either service."""
    one, two = login(accounts, "user1"), login(accounts, "user2")
    mine = new_customer(customers, one, "1")
    invoice = new_invoice(customers, one, mine, 5)
    until(lambda: of_customer(accounts, one, mine) == 5)
    assert of_customer(accounts, two, mine) is None
    owners = [each["account"]["owned_by"] for each in accounts.client.get("/accounts", headers=two).json()]
    assert set(owners) == {"user2"}
    body = {"customer_id": mine, "purchase_date": "2019-01-09", "purchase_price_cents": 1}
    for answer, status in (
        (customers.client.post("/customers", json={"name": "n", "account_id": "1"}, headers=two), 403),
        (customers.client.post("/customers", json={"name": "n", "account_id": "77"}, headers=two), 404),
        (customers.client.post("/invoices", json=body, headers=two), 403),
        (customers.client.delete(f"/invoices/{invoice}", headers=two), 403),
        (customers.client.delete(f"/customers/{mine}", headers=two), 403),
        (accounts.client.delete("/accounts/1", headers=two), 403),
        (accounts.client.delete("/accounts/77", headers=two), 404),
    ):
        assert answer.status_code == status, answer.text
    assert of_customer(accounts, one, mine) == 5


@pytest.mark.parametrize(
    ("path", "status", "answer"),
    [
        ("/accounts/1/is-owned-by/user1", 200, {"ok": True}),
        ("/accounts/1/is-owned-by/user2", 200, {"ok": False}),
        ("/accounts/99/is-owned-by/user1", 200, {"ok": False}),
        ("/accounts/x/is-owned-by/user1", 400, None),
    ],
)
def test_is_owned_by(accounts: Service, path: str, status: int, answer: Any) -> None:
    """R9: without a token, as in the seed."""
    said = accounts.client.get(path)
    assert said.status_code == status
    assert answer is None or said.json() == answer


def test_deletes(accounts: Service, customers: Service) -> None:
    """R15: an invoice's end subtracts it, a customer's takes all of it, an account's ends new customers."""
    headers = login(accounts)
    account = accounts.client.post("/accounts", json={"name": "short"}, headers=headers).json()["id"]
    until(lambda: _status(customers, headers, account) == 201)
    customer = new_customer(customers, headers, account)
    first, second = (new_invoice(customers, headers, customer, cents) for cents in (300, 40))
    until(lambda: of_customer(accounts, headers, customer) == 340)
    assert customers.client.delete(f"/invoices/{first}", headers=headers).status_code == 204
    assert customers.client.delete(f"/invoices/{first}", headers=headers).status_code == 404
    until(lambda: of_customer(accounts, headers, customer) == 40)
    assert customers.client.delete(f"/customers/{customer}", headers=headers).status_code == 204
    assert customers.client.delete(f"/invoices/{second}", headers=headers).status_code == 404
    until(lambda: of_customer(accounts, headers, customer) is None)
    assert accounts.client.delete(f"/accounts/{account}", headers=headers).status_code == 204
    assert int(account) not in revenue(accounts, headers)
    until(lambda: _status(customers, headers, account) == 404)


def _status(customers: Service, headers: dict[str, str], account: str) -> int:
    body = {"name": "n", "account_id": account}
    return customers.client.post("/customers", json=body, headers=headers).status_code


def test_status_paths_and_methods(accounts: Service, customers: Service) -> None:
    """R18: OK in text; what is not there is 404, the wrong method 405."""
    for service in (accounts, customers):
        assert (service.client.get("/status").status_code, service.client.get("/status").text) == (200, "OK")
        assert service.client.get("/nothing").status_code == 404
        assert service.client.put("/status").status_code == 405


# ------------------------------------------------------------------ events that come


def add(client: Any, kind: str, **payload: Any) -> str:
    """As the old writer does."""
    fields = {"EventTypeName": kind, "Payload": json.dumps(payload)}
    return str(client.xadd("event-stream", fields).decode())


def test_old_entries_are_applied_and_repeating_them_changes_nothing(accounts: Service, client: Any) -> None:
    """R5, R11: the same entry written twice, by a writer that knows of no ids."""
    headers = login(accounts)
    for _ in range(2):
        add(client, "CustomerCreated", id="70001", account_id="1", name="old")
        add(client, "InvoiceCreated", id="70002", customer_id="70001", purchase_price_cents=100)
    add(client, "CustomerCreated", id="70003", account_id="1", name="last")
    until(lambda: of_customer(accounts, headers, "70003") == 0)
    assert of_customer(accounts, headers, "70001") == 100


def test_an_invoice_before_its_customer(accounts: Service, client: Any) -> None:
    """R13: it counts once the customer is there; so do a deletion before a creation."""
    headers = login(accounts)
    add(client, "InvoiceDeleted", id="71009", customer_id="71001", purchase_price_cents=5)
    add(client, "InvoiceCreated", id="71009", customer_id="71001", purchase_price_cents=5)
    add(client, "InvoiceCreated", id="71002", customer_id="71001", purchase_price_cents=777)
    add(client, "CustomerCreated", id="71001", account_id="1", name="late")
    until(lambda: of_customer(accounts, headers, "71001") == 777)


def test_poison_is_set_aside(accounts: Service, client: Any, url: str, folder: Path) -> None:
    """R12: counted, visible, can be sent back; and the loop goes on."""
    before = accounts.look()["dead"]
    client.xadd("event-stream", {"EventTypeName": "CustomerCreated", "Payload": "{not json"})
    add(client, "SomethingElse", id="1")
    add(client, "CustomerCreated", id="72001", account_id="abc", name="n")
    add(client, "InvoiceCreated", id="72002")
    client.xadd("event-stream", {"neither": "field"})
    add(client, "CustomerCreated", id="72003", account_id="1", name="n")
    headers = login(accounts)
    until(lambda: of_customer(accounts, headers, "72003") == 0)
    about = until(lambda: (look := accounts.look()) and look["dead"] == before + 5 and look)
    assert about["ready"]
    counts = about["counts"]
    assert counts["accounts_rejected"] >= 3
    assert counts["accounts_CustomerCreated_parked"] >= 1
    assert counts["accounts_InvoiceCreated_parked"] >= 1
    place = ("--transport", f"{url}?namespace=example2")
    listed = cli("dead", "list", "accounts-queue", *place)
    for reason in ("account_id must be a number", "not JSON", "no handler for type", "customer_id must be"):
        assert reason in listed.stdout, listed
    store = f"sqlite:///{folder}/accounts.db"
    words = ("dead", "send", "accounts-queue", "--all", "--no-first", "--yes", "--store", store, *place)
    sent = cli(*words)
    assert sent.returncode == 0, sent.stderr
    again = until(
        lambda: (
            (look := accounts.look())["dead"] == before + 5
            and look["counts"]["accounts_CustomerCreated_parked"] > counts["accounts_CustomerCreated_parked"]
            and look
        )
    )
    assert again["ready"]


def cli(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "idemp", *words],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
        check=False,
    )


# ------------------------------------------------------------------ life


def test_settings_come_from_the_environment() -> None:
    """R19: no key has a default, and each mistake is one sentence that names its variable."""
    with pytest.raises(ConfigError, match=r"JWT_KEY.*openssl"):
        read({}, "accounts", 8090)
    good = read({"JWT_KEY": KEY}, "accounts", 8090)
    assert (good.port, good.database, good.event_stream) == (8090, "sqlite:///accounts.db", "event-stream")
    assert not good.demo_users
    for name, value in (
        ("PORT", "http"),
        ("KEEP", "all"),
        ("IDLE", "long"),
        ("REDIS_URL", "http://x"),
        ("INVOICE_STATUS", "204"),
        ("EVENT_STREAM", "account-stream"),
    ):
        with pytest.raises(ConfigError, match=name):
            read({"JWT_KEY": KEY, name: value}, "accounts", 8090)


def test_a_service_without_a_key_says_so(tmp_path: Path) -> None:
    """R19: exit code 2, no traceback."""
    done = subprocess.run(
        [sys.executable, "-m", "example2.accounts"],
        env={"PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert "JWT_KEY" in done.stderr
    assert "Traceback" not in done.stderr


def test_readiness_shows_lag_and_loops(own: Make) -> None:
    """R18: before Redis is there the process answers, is not ready and says why; then it is ready."""
    with Redis() as server:
        server.kill()
        service = own("accounts", REDIS_URL=server.url).start(ready=False)
        about = until(lambda: (look := service.look()) and "why" in look and look)
        assert not about["ready"]
        assert str(server.port) in about["why"]
        assert service.client.get("/status").text == "OK"
        assert service.client.get("/ready").status_code == 503
        server.start()
        until(service.ready)
        about = service.look()
        assert (about["lag"], about["pending"], about["dead"]) == (0, 0, 0)
        assert about["loops"] == {"consumer": "running", "relay": "running"}
        assert service.stop() == 0


def test_sigterm_ends_both_soon(own: Make) -> None:
    """R20: with exit code 0, and what was accepted is told after the next start."""
    accounts, customers = own("accounts").start(), own("customers").start()
    heard(customers, accounts)
    headers = login(accounts)
    customer = new_customer(customers, headers)
    for cents in range(1, 21):
        new_invoice(customers, headers, customer, cents)
    for service in (customers, accounts):
        began = time.monotonic()
        assert service.stop() == 0, service.said()
        assert time.monotonic() - began < 15
    accounts.start()
    customers.start()
    until(lambda: of_customer(accounts, headers, customer) == 210)


def test_row_and_event_are_both_or_neither(own: Make) -> None:
    """R6: kill -9 of the customers service again and again while it makes invoices."""
    accounts, customers = own("accounts").start(), own("customers").start()
    heard(customers, accounts)
    headers = login(accounts)
    customer = new_customer(customers, headers)
    answered = 0
    for _ in range(4):
        end = time.monotonic() + 0.5
        while time.monotonic() < end:
            body = {"customer_id": customer, "purchase_date": "2019-01-09", "purchase_price_cents": 1}
            if customers.client.post("/invoices", json=body, headers=headers).status_code == 200:
                answered += 1
        customers.kill()
        customers.start()
    with closing(sqlite3.connect(customers.folder / "customers.db")) as db:
        [(rows,)] = db.execute("SELECT count(*) FROM invoice").fetchall()
    assert rows >= answered > 0
    until(lambda: of_customer(accounts, headers, customer) == rows)


def test_it_goes_on_where_it_stood(own: Make, tmp_path: Path) -> None:
    """R10, R14: after kill -9 nothing is lost or counted twice; an empty database reads the whole stream."""
    accounts, customers = own("accounts").start(), own("customers").start()
    heard(customers, accounts)
    headers = login(accounts)
    customer = new_customer(customers, headers)
    new_invoice(customers, headers, customer, 10)
    until(lambda: of_customer(accounts, headers, customer) == 10)
    accounts.kill()
    for cents in (20, 30):
        new_invoice(customers, headers, customer, cents)
    accounts.start()
    until(lambda: of_customer(accounts, headers, customer) == 60)
    with closing(sqlite3.connect(tmp_path / "accounts.db")) as db:
        logged = db.execute("SELECT event_type, payload FROM event_log").fetchall()
    assert sorted(kind for kind, _ in logged).count("InvoiceCreated") == 3
    assert {json.loads(payload)["id"] for _, payload in logged}
    accounts.stop()
    for file in tmp_path.glob("accounts.db*"):
        file.unlink()
    accounts.start()
    until(lambda: of_customer(accounts, headers, customer) == 60)


def test_the_stream_is_trimmed_behind_its_readers(own: Make) -> None:
    """R21: with KEEP it is bounded; what accounts has not read stays while accounts is away."""
    accounts, customers = own("accounts", KEEP="20").start(), own("customers", KEEP="20").start()
    heard(customers, accounts)
    headers = login(accounts)
    customer = new_customer(customers, headers)
    accounts.kill()
    for _ in range(60):
        new_invoice(customers, headers, customer, 1)
    with driver.Redis.from_url(accounts.environment["REDIS_URL"]) as client:
        until(lambda: client.xlen("event-stream") >= 60)
        accounts.start()
        until(lambda: of_customer(accounts, headers, customer) == 60)
        until(lambda: client.xlen("event-stream") <= 21)


def test_on_postgresql(own: Make, postgresql: PostgreSQL) -> None:
    """R8, R16: two instances of accounts on one database; no entry counts twice."""
    database = postgresql.database()
    customers = own("customers", postgresql.database())
    first, second = own("accounts", database), own("accounts", database)
    for service in (first, second, customers):
        service.start(ready=False)
    for service in (first, second, customers):
        until(service.ready, service.said())
    heard(customers, first)
    headers = login(first)
    customer = new_customer(customers, headers)
    for _ in range(50):
        new_invoice(customers, headers, customer, 3)
    until(lambda: of_customer(first, headers, customer) == 150 == of_customer(second, headers, customer))

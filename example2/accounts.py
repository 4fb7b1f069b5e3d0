"""The accounts service: accounts, their customers and revenue from the events; users and their login."""

import json
import sys
import uuid
from typing import Annotated, Any

from fastapi import Body, Depends, FastAPI, HTTPException, Path
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from example2 import auth
from example2.customers import Created, Refusal, Request, Text, _answer
from example2.database import Database, Rows
from example2.events import cents, integer, text
from example2.service import Loops, main, make
from example2.settings import Settings
from idemp import Message, context, idempotent

PORT = 8090
ZERO = "0001-01-01T00:00:00Z"
TABLES = (
    "users (username TEXT PRIMARY KEY, password_hash TEXT NOT NULL)",
    "account (id SERIAL, name TEXT NOT NULL, description TEXT, created_date TEXT NOT NULL,"
    " owned_by TEXT NOT NULL)",
    "linked_customer (customer_id BIGINT PRIMARY KEY, account_id BIGINT NOT NULL, name TEXT NOT NULL,"
    " deleted INTEGER NOT NULL DEFAULT 0)",
    "linked_invoice (invoice_id BIGINT PRIMARY KEY, customer_id BIGINT NOT NULL, cents BIGINT NOT NULL,"
    " deleted INTEGER NOT NULL DEFAULT 0)",
    "event_log (event_id TEXT PRIMARY KEY, event_type TEXT NOT NULL, payload TEXT NOT NULL)",
)
DEMO = (("user1", "password1", "one"), ("user2", "password2", "two"))
_PART = 10**9
"""A sum of 64-bit numbers does not fit into 64 bits: it is made in two parts."""
_SUM = f"SUM(i.cents / {_PART}), SUM(i.cents % {_PART})"


class NewAccount(BaseModel):
    """The body of POST /accounts."""

    model_config = ConfigDict(strict=True)
    name: Text
    description: Annotated[str, Field(max_length=1000, pattern=r"^[^\x00]*$")] | None = None


# ------------------------------------------------------------------ events


def _logged(handler: Any) -> Any:
    """With an entry in the log of events, in the same transaction."""

    def handle(message: Message) -> None:
        rows = Rows(context().connection)
        handler(rows, message)
        rows.do(
            "INSERT INTO event_log (event_id, event_type, payload) VALUES (?, ?, ?)"
            " ON CONFLICT (event_id) DO NOTHING",
            *(message.id, message.type, json.dumps(message.args)),
        )

    return handle


def _customer_created(rows: Rows, message: Message) -> None:
    """An id is never given again, so whatever stands there, also its end, is the later word."""
    rows.do(
        "INSERT INTO linked_customer (customer_id, account_id, name) VALUES (?, ?, ?)"
        " ON CONFLICT (customer_id) DO NOTHING",
        *(integer(message, "id"), integer(message, "account_id"), text(message, "name")),
    )


def _customer_deleted(rows: Rows, message: Message) -> None:
    rows.do(
        "INSERT INTO linked_customer (customer_id, account_id, name, deleted) VALUES (?, 0, '', 1)"
        " ON CONFLICT (customer_id) DO UPDATE SET deleted = 1",
        integer(message, "id"),
    )


def _invoice_created(rows: Rows, message: Message) -> None:
    """Its customer need not be there yet: sums are made when they are asked for."""
    rows.do(
        "INSERT INTO linked_invoice (invoice_id, customer_id, cents) VALUES (?, ?, ?)"
        " ON CONFLICT (invoice_id) DO NOTHING",
        *(integer(message, "id"), integer(message, "customer_id"), cents(message, "purchase_price_cents")),
    )


def _invoice_deleted(rows: Rows, message: Message) -> None:
    rows.do(
        "INSERT INTO linked_invoice (invoice_id, customer_id, cents, deleted) VALUES (?, 0, 0, 1)"
        " ON CONFLICT (invoice_id) DO UPDATE SET deleted = 1",
        integer(message, "id"),
    )


HANDLERS = {
    "CustomerCreated": _customer_created,
    "CustomerDeleted": _customer_deleted,
    "InvoiceCreated": _invoice_created,
    "InvoiceDeleted": _invoice_deleted,
}


# ------------------------------------------------------------------ what the service does


class Accounts:
    """Accounts and users."""

    def __init__(self, settings: Settings, database: Database) -> None:
        self._settings, self._database = settings, database
        store = database.store
        key = lambda request, user, *_: f"{user}/{request}"  # noqa: E731
        self.create = idempotent(store, name="accounts.create", key=key, transaction=True)(self._create)
        self.delete = idempotent(store, name="accounts.delete", key=key, transaction=True)(self._delete)
        self._demo = idempotent(store, name="accounts.demo", key="once", transaction=True)(self._make_demo)

    def prepare(self) -> None:
        """The tables and, once in the life of the database, the users to try it with."""
        self._database.begin(lambda rows: rows.make(TABLES))
        if self._settings.demo_users:
            self._demo(once="users")

    def _make_demo(self, once: str) -> None:
        rows = Rows(context().connection)
        for user, password, account in DEMO:
            # As the seed kept them; the first login makes better hashes of them.
            rows.do("INSERT INTO users VALUES (?, ?) ON CONFLICT DO NOTHING", user, auth.old_hash(password))
            self._insert(rows, user, account, account)

    def _insert(self, rows: Rows, user: str, name: str, description: str | None) -> str:
        made = rows.one(
            "INSERT INTO account (name, description, created_date, owned_by) VALUES (?, ?, ?, ?)"
            " RETURNING id",
            *(name, description, ZERO, user),
        )
        assert made is not None
        id = str(made[0])
        event = {"id": id, "name": name, "description": description, "owned_by": user, "created_date": ZERO}
        context().publish("AccountCreated", event, exchange=self._settings.account_stream)
        return id

    def _create(self, request: str, user: str, name: str, description: str | None) -> dict[str, Any]:
        return {"id": self._insert(Rows(context().connection), user, name, description)}

    def _delete(self, request: str, user: str, account: str) -> dict[str, Any]:
        rows = Rows(context().connection)
        try:
            found = rows.one("SELECT owned_by FROM account WHERE id = ?", int(account))
            if found is None:
                raise Refusal(404, f"account {account} does not exist")
            if found[0] != user:
                raise Refusal(403, "Forbidden")
        except Refusal as refusal:
            return {"status": refusal.status, "why": refusal.why}
        rows.do("DELETE FROM account WHERE id = ?", int(account))
        stream = self._settings.account_stream
        context().publish("AccountDeleted", {"id": str(int(account))}, exchange=stream)
        return {}

    def login(self, username: str, password: str) -> bool:
        """Whether they belong together; an old hash is replaced."""

        def work(rows: Rows) -> bool:
            found = rows.one("SELECT password_hash FROM users WHERE username = ?", username)
            good, old = auth.check(password, found[0] if found else None)
            if good and old:
                kept = auth.hashed(password)
                rows.do("UPDATE users SET password_hash = ? WHERE username = ?", kept, username)
            return good

        return self._database.begin(work)

    def owned(self, account: int, username: str) -> bool:
        """Whether that account is there and is that user's."""
        query = "SELECT 1 FROM account WHERE id = ? AND owned_by = ?"
        return self._database.begin(lambda rows: rows.one(query, account, username)) is not None

    def overview(self, user: str) -> list[dict[str, Any]]:
        """The user's accounts with their customers, by their numbers."""
        return self._database.begin(lambda rows: _overview(rows, user))


def _overview(rows: Rows, user: str) -> list[dict[str, Any]]:
    accounts = rows.all(
        "SELECT id, name, description, owned_by, created_date FROM account WHERE owned_by = ? ORDER BY id",
        user,
    )
    customers = rows.all(
        f"SELECT c.account_id, c.customer_id, c.name, {_SUM} FROM account a"
        " JOIN linked_customer c ON c.account_id = a.id AND c.deleted = 0"
        " LEFT JOIN linked_invoice i ON i.customer_id = c.customer_id AND i.deleted = 0"
        " WHERE a.owned_by = ? GROUP BY c.account_id, c.customer_id, c.name ORDER BY c.customer_id",
        user,
    )
    of_account: dict[int, list[dict[str, Any]]] = {}
    for account, customer, name, high, low in customers:
        revenue = int(high or 0) * _PART + int(low or 0)
        entry = {"customer_id": str(customer), "total_revenue_cents": revenue, "name": name}
        of_account.setdefault(account, []).append(entry)
    return [_account(row, of_account.get(row[0], [])) for row in accounts]


def _account(row: tuple[Any, ...], customers: list[dict[str, Any]]) -> dict[str, Any]:
    names = ("id", "name", "description", "owned_by", "created_date")
    total = sum(customer["total_revenue_cents"] for customer in customers)
    account = dict(zip(names, row, strict=True))
    return {"account": account, "customers": customers, "total_revenue_cents": total}


# ------------------------------------------------------------------ HTTP


def build(settings: Settings) -> FastAPI:
    """The application."""
    database = Database(settings.database, "accounts")
    accounts = Accounts(settings, database)
    handlers = {
        kind: idempotent(database.store, name=f"accounts.{kind}", transaction=True)(_logged(handler))
        for kind, handler in HANDLERS.items()
    }
    loops = Loops(
        settings, database, "accounts", settings.event_stream, handlers, accounts.prepare, rebuild=True
    )
    app = make("accounts", loops, database)
    user = auth.caller(settings.jwt_key)
    refusals: dict[int | str, dict[str, Any]] = {
        400: {"description": "No token, or bad data"},
        403: {"description": "A bad token, or somebody else's"},
        404: {"description": "There is no such thing"},
        503: {"description": "The database does not answer"},
    }

    @app.post(
        "/auth/login",
        response_class=PlainTextResponse,
        responses={400: {"description": "Bad JSON"}, 401: {"description": "Wrong"}, 503: refusals[503]},
    )
    def login(
        body: Annotated[dict[str, Any], Body(examples=[{"username": "u", "password": "p"}])],
    ) -> Response:
        """A token for a user's name and password."""
        given = {name.lower(): value for name, value in body.items()}
        name, password = given.get("username"), given.get("password")
        if not isinstance(name, str) or not isinstance(password, str):
            return Response(status_code=400)
        if "\x00" in name or not name.isprintable() or not accounts.login(name, password):
            return Response(status_code=401)
        return PlainTextResponse(auth.token(name, settings.jwt_key))

    @app.get("/accounts", responses={400: refusals[400], 403: refusals[403], 503: refusals[503]})
    def list_accounts(who: Annotated[str, Depends(user)]) -> JSONResponse:
        """One's own accounts, with customers and revenue."""
        return JSONResponse(accounts.overview(who))

    @app.post("/accounts", status_code=201, response_model=Created, responses=refusals)
    def create_account(
        body: NewAccount, who: Annotated[str, Depends(user)], request: Request = None
    ) -> Response:
        """Open an account."""
        made = accounts.create(request or uuid.uuid4().hex, who, body.name, body.description)
        return _answer(made, 201)

    @app.delete("/accounts/{account}", status_code=204, responses=refusals)
    def delete_account(
        account: Annotated[str, Path(pattern=r"^[0-9]{1,18}$")],
        who: Annotated[str, Depends(user)],
        request: Request = None,
    ) -> Response:
        """Close an account of one's own."""
        return _answer(accounts.delete(request or uuid.uuid4().hex, who, account), 204)

    @app.get("/accounts/{account}/is-owned-by/{username}", responses={400: refusals[400], 503: refusals[503]})
    def is_owned_by(account: Annotated[str, Path(pattern=r"^-?[0-9]{1,18}$")], username: str) -> JSONResponse:
        """Whether it is that user's."""
        if "\x00" in username or not username.isprintable():
            raise HTTPException(400, "Invalid data: username")
        return JSONResponse({"ok": accounts.owned(int(account), username)})

    return app


if __name__ == "__main__":
    sys.exit(main("accounts", PORT, build))

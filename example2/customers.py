"""The customers service: customers and their invoices, and an event for each change.

It keeps a copy of the accounts, from their events, so that it knows whose an account is.
"""

import datetime
import sys
import uuid
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Header, HTTPException, Path
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from example2.auth import caller
from example2.database import Database, Rows
from example2.events import integer, text
from example2.service import Loops, main, make
from example2.settings import Settings
from idemp import Message, context, idempotent

PORT = 8080
MOST = 2**63 - 1
ZERO = "0001-01-01T00:00:00Z"
"""The date of what has none, in the events."""
TABLES = (
    "customer (id SERIAL, account_id BIGINT NOT NULL, name TEXT NOT NULL, created_date TEXT NOT NULL)",
    "invoice (id SERIAL, customer_id BIGINT NOT NULL, cents BIGINT NOT NULL, purchase_date TEXT NOT NULL,"
    " created_date TEXT NOT NULL)",
    "known_account (id BIGINT PRIMARY KEY, owned_by TEXT NOT NULL, deleted INTEGER NOT NULL DEFAULT 0)",
)

Text = Annotated[str, Field(min_length=1, max_length=1000, pattern=r"^[^\x00]*$")]
Id = Annotated[str, Field(pattern=r"^[0-9]{1,18}$")]
Date = Annotated[str, Field(max_length=40)]
Request = Annotated[str | None, Header(alias="Idempotency-Key", pattern=r"^[!-~]{1,200}$")]


class NewCustomer(BaseModel):
    """The body of POST /customers; what else is in it is ignored."""

    model_config = ConfigDict(strict=True)
    name: Text
    account_id: Id
    created_date: Date = ZERO


class NewInvoice(BaseModel):
    """The body of POST /invoices."""

    model_config = ConfigDict(strict=True)
    customer_id: Id
    purchase_date: Annotated[str, Field(pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}$")]
    purchase_price_cents: Annotated[int, Field(ge=0, le=MOST)]
    created_date: Date = ZERO


class Created(BaseModel):
    """The id of what was made."""

    id: str


class Refusal(Exception):
    """Nothing was changed, for a reason that the caller should know."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status, self.why = status, why


class Customers:
    """What the service does, each in one transaction with its event."""

    def __init__(self, settings: Settings, database: Database) -> None:
        self._stream = settings.event_stream
        self.create_customer = self._once(database, self._create_customer)
        self.create_invoice = self._once(database, self._create_invoice)
        self.delete_customer = self._once(database, self._delete_customer)
        self.delete_invoice = self._once(database, self._delete_invoice)

    def _once(self, database: Database, function: Any) -> Any:
        """A request that is repeated with its Idempotency-Key gets its first answer."""
        name = f"customers.{function.__name__.strip('_')}"

        def work(request: str, user: str, *values: Any) -> Any:
            try:
                return function(Rows(context().connection), user, *values)
            except Refusal as refusal:
                return {"status": refusal.status, "why": refusal.why}

        def key(request: str, user: str, *values: Any) -> str:
            return f"{user}/{request}"

        return idempotent(database.store, name=name, key=key, transaction=True)(work)

    def _create_customer(self, rows: Rows, user: str, name: str, account: str, created: str) -> Any:
        _owner(rows, account, user)
        made = rows.one(
            "INSERT INTO customer (account_id, name, created_date) VALUES (?, ?, ?) RETURNING id",
            *(int(account), name, created),
        )
        assert made is not None
        event = {"id": str(made[0]), "account_id": str(int(account)), "name": name, "created_date": created}
        self._tell("CustomerCreated", event)
        return {"id": event["id"]}

    def _create_invoice(
        self, rows: Rows, user: str, customer: str, date: str, cents: int, created: str
    ) -> Any:
        _customer(rows, customer, user)
        made = rows.one(
            "INSERT INTO invoice (customer_id, cents, purchase_date, created_date) VALUES (?, ?, ?, ?)"
            " RETURNING id",
            *(int(customer), cents, date, created),
        )
        assert made is not None
        event = {
            "id": str(made[0]),
            "customer_id": str(int(customer)),
            "purchase_price_cents": cents,
            "created_date": created,
            "purchase_date": date,
        }
        self._tell("InvoiceCreated", event)
        return {"id": event["id"]}

    def _delete_customer(self, rows: Rows, user: str, customer: str) -> Any:
        _customer(rows, customer, user)
        rows.do("DELETE FROM invoice WHERE customer_id = ?", int(customer))
        rows.do("DELETE FROM customer WHERE id = ?", int(customer))
        self._tell("CustomerDeleted", {"id": str(int(customer))})
        return {}

    def _delete_invoice(self, rows: Rows, user: str, invoice: str) -> Any:
        found = rows.one("SELECT customer_id, cents FROM invoice WHERE id = ?", int(invoice))
        if found is None:
            raise Refusal(404, f"invoice {invoice} does not exist")
        _customer(rows, str(found[0]), user)
        rows.do("DELETE FROM invoice WHERE id = ?", int(invoice))
        event = {"id": str(int(invoice)), "customer_id": str(found[0]), "purchase_price_cents": found[1]}
        self._tell("InvoiceDeleted", event)
        return {}

    def _tell(self, kind: str, payload: dict[str, Any]) -> None:
        context().publish(kind, payload, exchange=self._stream)


def _owner(rows: Rows, account: str, user: str) -> None:
    found = rows.one("SELECT owned_by FROM known_account WHERE id = ? AND deleted = 0", int(account))
    if found is None:
        raise Refusal(404, f"account {account} does not exist")
    if found[0] != user:
        raise Refusal(403, "Forbidden")


def _customer(rows: Rows, customer: str, user: str) -> None:
    found = rows.one("SELECT account_id FROM customer WHERE id = ?", int(customer))
    if found is None:
        raise Refusal(404, f"customer {customer} does not exist")
    _owner(rows, str(found[0]), user)


def _account_created(message: Message) -> None:
    """A deleted one stays deleted, in whatever order the two come."""
    rows = Rows(context().connection)
    values = integer(message, "id"), text(message, "owned_by")
    rows.do("INSERT INTO known_account (id, owned_by) VALUES (?, ?) ON CONFLICT (id) DO NOTHING", *values)


def _account_deleted(message: Message) -> None:
    Rows(context().connection).do(
        "INSERT INTO known_account (id, owned_by, deleted) VALUES (?, '', 1)"
        " ON CONFLICT (id) DO UPDATE SET deleted = 1",
        integer(message, "id"),
    )


def build(settings: Settings) -> FastAPI:
    """The application."""
    database = Database(settings.database, "customers")
    customers = Customers(settings, database)
    handlers = {
        kind: idempotent(database.store, name=f"customers.{kind}", transaction=True)(handler)
        for kind, handler in {"AccountCreated": _account_created, "AccountDeleted": _account_deleted}.items()
    }
    loops = Loops(
        settings,
        database,
        "customers",
        settings.account_stream,
        handlers,
        lambda: database.begin(lambda rows: rows.make(TABLES)),
        rebuild=True,
    )
    app = make("customers", loops, database)
    user = caller(settings.jwt_key)
    refusals: dict[int | str, dict[str, Any]] = {
        400: {"description": "No token, or bad data"},
        403: {"description": "A bad token, or somebody else's"},
        404: {"description": "There is no such thing"},
        503: {"description": "The database does not answer"},
    }

    @app.post("/customers", status_code=201, response_model=Created, responses=refusals)
    def create_customer(
        body: NewCustomer, who: Annotated[str, Depends(user)], request: Request = None
    ) -> Response:
        """Make a customer of an account of one's own."""
        values = body.name, body.account_id, body.created_date
        return _answer(customers.create_customer(request or uuid.uuid4().hex, who, *values), 201)

    @app.post("/invoices", status_code=settings.invoice_status, response_model=Created, responses=refusals)
    def create_invoice(
        body: NewInvoice, who: Annotated[str, Depends(user)], request: Request = None
    ) -> Response:
        """Make an invoice of a customer of one's own."""
        try:
            datetime.date.fromisoformat(body.purchase_date)
        except ValueError:
            raise HTTPException(400, "Invalid data: purchase_date is no date") from None
        values = body.customer_id, body.purchase_date, body.purchase_price_cents, body.created_date
        made = customers.create_invoice(request or uuid.uuid4().hex, who, *values)
        return _answer(made, settings.invoice_status)

    number = Annotated[str, Path(pattern=r"^[0-9]{1,18}$")]

    @app.delete("/customers/{customer}", status_code=204, responses=refusals)
    def delete_customer(
        customer: number, who: Annotated[str, Depends(user)], request: Request = None
    ) -> Response:
        """Delete a customer, with the invoices."""
        return _answer(customers.delete_customer(request or uuid.uuid4().hex, who, customer), 204)

    @app.delete("/invoices/{invoice}", status_code=204, responses=refusals)
    def delete_invoice(
        invoice: number, who: Annotated[str, Depends(user)], request: Request = None
    ) -> Response:
        """Delete an invoice."""
        return _answer(customers.delete_invoice(request or uuid.uuid4().hex, who, invoice), 204)

    return app


def _answer(made: dict[str, Any], status: int) -> Response:
    if "why" in made:
        raise HTTPException(made["status"], made["why"])
    return Response(status_code=204) if status == 204 else JSONResponse(made, status)


if __name__ == "__main__":
    sys.exit(main("customers", PORT, build))

"""A logger into MongoDB: a document an event, with the six names, in ``utracker.entries``.

For `configure` of envelopes, or as ``tracking`` of a consumer; look-ups need one of the other event logs.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

from idemp.errors import MissingExtra, StoreUnavailable
from idemp.ports import Event

try:
    import pymongo
    from pymongo.errors import PyMongoError
except ImportError:
    raise MissingExtra("a MongoDB logger", "mongodb") from None

URI = "mongodb://localhost:27017"


class MongoLogger:
    """Writes events to the MongoDB at ``uri``; connects with the first one.

    collection: an object with ``insert_one``, instead of one of that server.
    """

    def __init__(
        self,
        uri: str = URI,
        *,
        database_name: str = "utracker",
        collection_name: str = "entries",
        collection: Any = None,
    ) -> None:
        self._collection = collection
        self._client: Any = None
        self._where = (uri, database_name, collection_name)

    def write(self, event: Event) -> None:
        """Insert it.  Raises `StoreUnavailable`."""
        if self._collection is None:
            uri, database, collection = self._where
            self._client = pymongo.MongoClient(uri, connect=False)
            self._collection = self._client[database][collection]
        try:
            self._collection.insert_one(document(event))
        except PyMongoError as error:
            raise StoreUnavailable(f"MongoDB: {' '.join(str(error).split())[:300]}") from None

    def close(self) -> None:
        """Let go of the server."""
        if self._client is not None:
            self._client.close()


def document(event: Event) -> dict[str, Any]:
    """The six names; the time as MongoDB has it, in milliseconds."""
    try:
        payload = None if event.body is None else json.loads(event.body)
    except (ValueError, RecursionError):
        payload = event.body
    return {
        "datetime": datetime.fromtimestamp(int(event.at * 1000) / 1000, UTC),
        "service": event.service,
        "description": event.why if event.kind == "note" else event.kind,
        "uuid": event.uuid,
        "parent_uuid": event.parent or None,
        "payload": payload,
    }

"""Publishes a new order every 5 seconds.  ``python -m example1.producer [URL [SECONDS]]``"""

import json
import sys
import time
from uuid import uuid4

from idemp import open_transport, publish
from idemp.errors import IdempError
from idemp.message import Properties
from idemp.ports import Publication


def main(url: str = "amqp://guest:guest@localhost:5672/", seconds: str = "5") -> None:
    transport = open_transport(url)
    transport.declare("my-queue", "events")  # so that nothing is lost while no consumer has started
    while True:
        event = {"type": "new_order", "id": str(uuid4()), "user_id": str(uuid4())}
        properties = Properties(message_id=event["id"], type=event["type"], timestamp=time.time())
        publish(transport, [Publication(json.dumps(event).encode(), properties, "events", "foo")])
        print("published", event["id"], flush=True)
        time.sleep(float(seconds))


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except IdempError as error:
        sys.exit(f"producer: {error}")
    except KeyboardInterrupt:
        pass

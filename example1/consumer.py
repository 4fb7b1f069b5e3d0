"""Prints each event that comes.  ``python -m example1.consumer [URL]``"""

import sys

from idemp import open_transport
from idemp.errors import IdempError
from idemp.ports import Delivery


def main(url: str = "amqp://guest:guest@localhost:5672/") -> None:
    transport = open_transport(url)
    transport.declare("my-queue", "events")
    transport.consume("my-queue", prefetch=10)
    while True:
        for event in transport.poll(1.0):
            if isinstance(event, Delivery):
                print(event.body.decode(errors="replace"), flush=True)
                transport.ack([event.tag])


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except IdempError as error:
        sys.exit(f"consumer: {error}")
    except KeyboardInterrupt:
        pass

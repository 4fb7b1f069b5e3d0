"""Alice, Bob and Carl tell each other secrets.  ``python -m example1.bots [URL [SECONDS [EVENTLOG]]]``

Each takes what is in its queue and answers every second message; who has nothing to do begins anew.  Every
step is logged, without the secrets; at the end the flow is drawn, as ``idemp flow --dot`` draws it.
"""

import json
import random
import re
import sys
import threading
import time
from contextlib import closing

from idemp import open_event_log, open_transport, publish
from idemp.errors import IdempError
from idemp.message import Properties
from idemp.ports import Delivery, Publication
from idemp.tracking.envelope import Envelope, configure
from idemp.tracking.flow import dot
from idemp.tracking.recorder import Recorder

NAMES = ("alice", "bob", "carl")


def hide(content: str) -> str:
    return re.sub(r"secret:\d+", "secret:<hidden>", content)


def bot(name: str, url: str, recorder: Recorder, end: float) -> None:
    configure(everywhere=False, service_name=name, logger=recorder, formatter=hide)
    others = [other for other in NAMES if other != name]

    def send(message: Envelope, what: str) -> None:
        message.log(what)
        queue, properties = f"{random.choice(others)}-inbox", Properties(message_id=message.uuid)
        publish(out, [Publication(message.to_json().encode(), properties, "", queue)])

    with closing(open_transport(url)) as inbox, closing(open_transport(url)) as out:
        inbox.consume(f"{name}-inbox", prefetch=10)
        while time.time() < end:
            came = [event for event in inbox.poll(random.random() / 5) if isinstance(event, Delivery)]
            for delivery in came:
                message = Envelope.unpack(delivery.body)
                message.log("handle", hide_payload=True)
                if random.random() < 0.5:
                    send(message.child(f"And I tell you a secret:{random.randrange(10**6)}"), "reply")
                inbox.ack([delivery.tag])
            if not came:
                send(Envelope.pack(f"Let me tell you a secret:{random.randrange(10**6)}"), "seeding")
        inbox.poll(0.0)


def main(url: str = "memory://bots", seconds: str = "3", events: str = "sqlite:///bots.db") -> None:
    with closing(open_event_log(events)) as log, closing(open_transport(url)) as transport:
        for name in NAMES:
            transport.declare(f"{name}-inbox")
        recorder = Recorder(log, "bots")
        end = time.time() + float(seconds)
        bots = [threading.Thread(target=bot, args=(name, url, recorder, end)) for name in NAMES]
        for each in bots:
            each.start()
        for each in bots:
            each.join()
        recorder.close()
        print(json.dumps({"recorded": recorder.delivered, "dropped": recorder.dropped}), file=sys.stderr)
        print(dot(log.edges()), end="")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except (IdempError, ValueError) as error:
        sys.exit(f"bots: {error}")
    except KeyboardInterrupt:
        pass

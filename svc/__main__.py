"""The service as a process: environment, logging, one `Consumer`.  Its work is in handlers.py."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext

from idemp import ConfigError, Consumer, idempotent, open_event_log, open_store, open_transport
from idemp.bars import watching
from idemp.errors import IdempError
from idemp.metrics import Meters, PrometheusMeter, StatsdMeter
from idemp.ports import EventLog, Meter, Store, Transport
from idemp.settings import hidden
from idemp.signals import ended_once
from svc.handlers import HANDLERS, Handler
from svc.health import Health
from svc.settings import Settings, read

log = logging.getLogger("svc")


def main(handlers: Mapping[str, Handler] = HANDLERS) -> int:
    """Run until SIGTERM or SIGINT; the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    # What the driver logs of a lost connection, idemp says in one line.
    logging.getLogger("pika").setLevel(logging.CRITICAL)
    try:
        serve(read(os.environ), handlers)
    except IdempError as error:
        print(f"svc: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before the consumer took the signals over
        return 130
    return 0


def serve(settings: Settings, handlers: Mapping[str, Handler]) -> None:
    """Open what the settings name and consume until stopped."""
    name = settings.service
    with ExitStack() as stack:
        health = stack.enter_context(_health(settings.health_port))
        meter = stack.enter_context(closing(_meter(settings)))
        store = None if settings.store is None else stack.enter_context(closing(_store(settings.store)))
        transport = stack.enter_context(closing(_transport(settings.transport)))
        tracking = stack.enter_context(closing(_events(settings.tracking))) if settings.tracking else None
        _say_start(settings)
        consumer = Consumer(transport, service=name, meter=meter, tracking=tracking)
        for kind, handler in handlers.items():
            once = idempotent(store, name=f"{name}.{kind}") if store is not None else _every_time
            consumer.on(kind)(once(handler))
        if health is not None:
            health.consumer = consumer
        running = stack.enter_context(ended_once())

        def ready() -> None:
            running()
            log.info("%s: ready", name)

        consumer.run(ready=ready)
    log.info("%s: stopped", name)


def _every_time(handler: Handler) -> Handler:
    return handler


def _say_start(settings: Settings) -> None:
    name, broker, statsd = settings.service, hidden(settings.transport), settings.statsd
    if settings.store is not None:
        store = hidden(settings.store)
        log.info("%s: broker %s, statsd %s, deduplication on, store %s", name, broker, statsd, store)
        return
    log.info("%s: broker %s, statsd %s, deduplication off", name, broker, statsd)
    log.warning(
        "%s: without a store every delivery is processed, duplicates too; "
        "with IDEMP_STORE=sqlite:///seen.db each event takes effect once",
        name,
    )


def _health(port: int | None) -> AbstractContextManager[Health | None]:
    """First of all, so that it can be asked while the store is imported."""
    if port is None:
        return nullcontext()
    with _about("IDEMP_HEALTH_PORT"):
        return closing(Health(port))


def _meter(settings: Settings) -> Meter:
    with _about("IDEMP_STATSD"):
        statsd = StatsdMeter(settings.statsd)
    if settings.metrics_port is None:
        return statsd
    with _about("IDEMP_METRICS_PORT"):
        return Meters(statsd, PrometheusMeter(settings.service, settings.metrics_port))


def _store(url: str) -> Store:
    with _about("IDEMP_STORE"):
        store = open_store(url)
        with watching(f"reading {hidden(url)}", store.progress):
            store.apply([])
        return store


def _events(url: str) -> EventLog:
    """Not connected: a service works without it, and its events wait."""
    with _about("IDEMP_TRACKING"):
        return open_event_log(url)


def _transport(url: str) -> Transport:
    with _about("IDEMP_TRANSPORT"):
        transport = open_transport(url)
        transport.connect()
        return transport


@contextmanager
def _about(variable: str) -> Iterator[None]:
    """Let an error inside name the variable that it comes from."""
    try:
        yield
    except IdempError as error:
        raise ConfigError(f"{variable}: {error}") from None


if __name__ == "__main__":
    sys.exit(main())

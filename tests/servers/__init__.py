"""The real servers of the test suite: found, installed, started, killed, and gone when the run ends."""

from tests.servers.etcd import Etcd
from tests.servers.graphite import Graphite
from tests.servers.need import need
from tests.servers.ports import free_port
from tests.servers.postgresql import PostgreSQL
from tests.servers.prometheus import Prometheus
from tests.servers.rabbitmq import RabbitMQ
from tests.servers.redis import Redis
from tests.servers.statsd import Statsd

__all__ = ["Etcd", "Graphite", "PostgreSQL", "Prometheus", "RabbitMQ", "Redis", "Statsd", "free_port", "need"]

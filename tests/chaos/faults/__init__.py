"""The kinds of faults, by name.  Each is a small class with inject, witness and heal."""

from collections.abc import Mapping

from tests.chaos.faults import broker, consumers, etcd, messages, network, servers
from tests.chaos.faults.kind import Fault, Kind

__all__ = ["KINDS", "Fault", "Kind"]

KINDS: Mapping[str, Kind] = {
    **consumers.KINDS,
    **messages.KINDS,
    **etcd.KINDS,
    **servers.KINDS,
    **broker.KINDS,
    **network.KINDS,
}

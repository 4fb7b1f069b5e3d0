"""The etcd journal as an explicit-state model: the protocol, a search, and weakened forms of it."""

"""The etcd journal and the SQL protocol as explicit-state models: searches, and weakened forms of them."""

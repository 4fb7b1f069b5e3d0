/* statsd: counters are stats_counts.<name> (legacyNamespace), flushed each second.
   storage-schemas.conf must begin with the same interval. */
{
  port: 8125,
  servers: [{ server: "./servers/udp", address: "0.0.0.0", port: 8125 }],
  flushInterval: 1000,
  percentThreshold: [90, 99],
  graphiteHost: "127.0.0.1",
  graphitePort: 2003,
  graphite: { legacyNamespace: true }
}

/* statsd: counters are stats_counts.<name> (legacyNamespace), flushed each second.
   storage-schemas.conf must begin with the same interval.
   A gauge that is not sent any more is not repeated: what an auditor said ends with it. */
{
  port: 8125,
  servers: [{ server: "./servers/udp", address: "0.0.0.0", port: 8125 }],
  flushInterval: 1000,
  deleteGauges: true,
  percentThreshold: [90, 99],
  graphiteHost: "127.0.0.1",
  graphitePort: 2003,
  graphite: { legacyNamespace: true }
}

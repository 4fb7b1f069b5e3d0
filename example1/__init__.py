"""example1: a bare producer and a bare consumer, on any broker."""

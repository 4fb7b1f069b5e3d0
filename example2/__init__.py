"""Two services that keep each other up to date by business events on Redis Streams."""

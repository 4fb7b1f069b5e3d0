"""Tracking: which service received which message, when, from whom; what came of it; and replay.

Events are made by tracker.py and envelope.py, kept by an `idemp.ports.EventLog`, and read by trace.py
and flow.py, watch.py and advise.py; replay.py asks the dedup store before it sends anything again.
"""

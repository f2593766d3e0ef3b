"""Lanes: the durable, ordered, append-only queue of one rule on local disk, and its parked messages.

`docs/spool.md` specifies the bytes. Nothing here is thread-safe: a lane belongs to the thread of one event loop.
"""

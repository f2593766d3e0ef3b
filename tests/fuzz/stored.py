"""A stored message of RocketMQ, field by field."""

import struct

__all__ = ["stored_message"]


def stored_message(body: bytes, sys_flag: int) -> bytes:
    """Return a message as brokers store it; the compression is in `sys_flag`."""
    head = struct.pack(">iiiiqqiq8xq8xiq", -626843481, 0, 2, 0, 9, 77, sys_flag, 1, 2, 0, 0)
    rest = head + struct.pack(">i", len(body)) + body + b"\1T" + struct.pack(">H", 0)
    return struct.pack(">i", 4 + len(rest)) + rest

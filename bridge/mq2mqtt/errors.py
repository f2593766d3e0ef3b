"""Every error the bridge raises on purpose.

`retriable` is what the delivery loops branch on: true when the same call may succeed later without anybody
changing the message or the configuration.
"""

from typing import ClassVar

__all__ = [
    "BridgeError",
    "ConfigError",
    "FrameTooLargeError",
    "LaneCorruptError",
    "LaneError",
    "LaneFullError",
    "LaneLockedError",
    "LinkError",
    "MalformedEventError",
    "MessageRejectedError",
    "NotAuthorizedError",
    "NotConnectedError",
    "StoreError",
    "TopicNotFoundError",
    "UnmappableMessageError",
    "UnstorableError",
]


class BridgeError(Exception):
    """Base of all errors of the bridge; any other exception is a bug."""

    retriable: ClassVar[bool] = False


class ConfigError(BridgeError):
    """The operator's configuration or arguments are wrong; the text says what to change. Exit code 2."""


class UnmappableMessageError(BridgeError):
    """A message that the property contract cannot carry; it is parked with `reason`."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class MalformedEventError(BridgeError):
    """What a `StatusTracker` was fed is no status message."""


class LaneError(BridgeError):
    """A lane on disk cannot be used; the text names the file."""


class LaneLockedError(LaneError):
    """Another process writes or reads this lane."""


class LaneCorruptError(LaneError):
    """A file of a lane is foreign, unreadable or damaged before its tail."""


class LaneMisplacedError(LaneError):
    """A directory holds the lane of a rule that it is not named after: a copy, or moved."""


class LaneFullError(LaneError):
    """The lane holds `max_bytes` of unsent frames, or its disk is full; nothing was written."""

    retriable = True


class FrameTooLargeError(LaneError):
    """One message is longer than the whole lane may be (`spool.max_bytes`); nothing was written, it never fits."""


class LinkError(BridgeError):
    """RocketMQ did not do what was asked, in a way that time may mend (busy, timeout, system error)."""

    retriable = True


class NotConnectedError(LinkError):
    """No name server or broker could be reached, or the connection was lost before the answer."""


class TopicNotFoundError(LinkError):
    """The RocketMQ topic has no route. Retriable for ever: an operator may create it at any time."""


class NotAuthorizedError(LinkError):
    """RocketMQ refuses: wrong key, or no permission on the topic or group. Retriable: an operator may grant it."""


class MessageRejectedError(BridgeError):
    """RocketMQ calls the message illegal (answer code 13); sending it again cannot help."""


class StoreError(BridgeError):
    """The database did not do what was asked, in a way that time may mend (away, locked, full)."""

    retriable = True


class UnstorableError(StoreError):
    """A value that the database cannot hold; the text says which."""

    retriable = False

"""Messages as this client sends and receives them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol

__all__ = ["UNIQ_KEY", "EncodedMessages", "ReceivedMessage", "Sendable"]

UNIQ_KEY: Final = "UNIQ_KEY"


class Sendable(Protocol):
    """What can be sent: a body and properties (`TAGS`, `KEYS`, user properties)."""

    @property
    def body(self) -> bytes:
        """At least one byte: a broker answers an empty body with a NullPointerException."""

    @property
    def properties(self) -> Mapping[str, str]:
        """Names are not empty; names and values hold neither 0x01 nor 0x02."""


@dataclass(frozen=True, slots=True)
class EncodedMessages:
    """Messages of one batch whose properties are encoded already, as `encode_properties` does, without `UNIQ_KEY`."""

    bodies: Sequence[bytes]
    property_texts: Sequence[str]

    def __len__(self) -> int:
        return len(self.bodies)


class ReceivedMessage(NamedTuple):
    """A message read from a queue.

    Times are milliseconds since 1970: `born_ms` by the producer's clock, `stored_ms` by the broker's.
    `body` is decompressed. `broker` is the name of the broker whose queue this is, `store_host` its address as
    stored (4 or 16 bytes of IP, 4 of port).
    """

    topic: str
    body: bytes
    properties: dict[str, str]
    broker: str
    queue_id: int
    offset: int
    commit_log_offset: int
    born_ms: int
    stored_ms: int
    sys_flag: int
    flag: int
    reconsume_times: int
    store_host: bytes

    @property
    def message_id(self) -> str:
        """The producer's `UNIQ_KEY`, or else the id that names the place in the commit log."""
        return self.properties.get(UNIQ_KEY) or self.offset_id

    @property
    def offset_id(self) -> str:
        """The broker's address and the commit-log offset in hexadecimal, as `mqadmin queryMsgById` takes it."""
        return f"{self.store_host.hex().upper()}{self.commit_log_offset:016X}"

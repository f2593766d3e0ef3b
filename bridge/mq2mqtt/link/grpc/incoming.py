"""A message as this driver hands it out."""

from dataclasses import dataclass

__all__ = ["GrpcMessage"]


@dataclass(frozen=True, slots=True)
class GrpcMessage:
    """See `mq2mqtt.message.ReceivedMessage`."""

    topic: str
    body: bytes
    properties: dict[str, str]
    born_ms: int
    """To the second for what this driver sent."""
    broker: str
    queue_id: int
    offset: int

    @property
    def place(self) -> tuple[str, int, int]:
        """Where it is stored, which no other message of the topic shares."""
        return self.broker, self.queue_id, self.offset

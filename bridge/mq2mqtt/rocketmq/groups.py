"""The groups that this client is a member of, and the heartbeat that says so. No I/O."""

import json
from collections.abc import Callable, Mapping

__all__ = ["Groups"]


class Groups:
    """Producer and consumer groups of one client id.

    Attributes:
        producers: names of the producer groups.
        consumers: by group, the consumer's part of the heartbeat (`ConsumerData` of the Java client).
    """

    def __init__(self, client_id: str, *, producer: str) -> None:
        self._client_id = client_id
        self.producers = {producer}
        self.consumers: dict[str, Mapping[str, object]] = {}
        self._listeners: dict[str, Callable[[], None]] = {}

    def heartbeat(self, *, consumer: str | None = None) -> bytes:
        """Return the body of a HEART_BEAT request: of all groups, or of one of the consumer groups."""
        consumers = self.consumers if consumer is None else {consumer: self.consumers[consumer]}
        data = {
            "clientID": self._client_id,
            "consumerDataSet": [{**data, "groupName": group} for group, data in sorted(consumers.items())],
            "producerDataSet": [{"groupName": group} for group in sorted(self.producers)],
            "heartbeatFingerprint": 0,
            "withoutSub": False,
        }
        return json.dumps(data, separators=(",", ":")).encode()

    def departures(self) -> list[dict[str, str]]:
        """Return the fields of the UNREGISTER_CLIENT request of each group."""
        producers = [self.departure(producer=group) for group in sorted(self.producers)]
        return producers + [self.departure(consumer=group) for group in sorted(self.consumers)]

    def departure(self, *, producer: str | None = None, consumer: str | None = None) -> dict[str, str]:
        """Return the fields of the UNREGISTER_CLIENT request of one group."""
        fields = {"clientID": self._client_id}
        if producer is not None:
            fields["producerGroup"] = producer
        if consumer is not None:
            fields["consumerGroup"] = consumer
        return fields

    def listen(self, group: str, callback: Callable[[], None] | None) -> None:
        """Have `callback` called when the members of `group` change; `None` ends it."""
        if callback is None:
            self._listeners.pop(group, None)
        else:
            self._listeners[group] = callback

    def listener(self, group: str) -> Callable[[], None] | None:
        """Return what is to be called when the members of `group` change."""
        return self._listeners.get(group)

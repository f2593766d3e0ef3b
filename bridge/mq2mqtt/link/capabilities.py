"""What a driver of the link can do. What it can't is declared here, and shown, never silently different."""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Final

__all__ = ["Capabilities", "Capability", "capabilities"]

_MEANS: Final = "means"
_WITHOUT: Final = "without"


@dataclass(frozen=True, slots=True)
class Capability:
    """One field of `Capabilities` in words; both are sentences for an operator.

    Args:
        name: of the field.
        means: what a driver does that has it.
        without: what the bridge does where a driver lacks it.
    """

    name: str
    means: str
    without: str


def _can(means: str, *, without: str) -> bool:
    # A dataclass takes the field for its default.
    return field(default=True, metadata={_MEANS: means, _WITHOUT: without})


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What a driver can do. A new driver has to say what it can't; `capabilities` has the words."""

    # Sending
    keeps_order: bool = _can(
        "What is sent to one queue of the link is stored in its order.",
        without="Outbound and status rules, and receipts, are refused: a device's messages would be mixed up.",
    )
    chooses_queue: bool = _can(
        "The queues of the link are the topic's own queues in RocketMQ.",
        without="The driver has queues of its own, and RocketMQ's queue follows from them.",
    )
    sends_batches: bool = _can(
        "Several messages are sent in one request, and stored all or none.",
        without="Each message is a request of its own. When one fails, those before it may come twice.",
    )
    sends_any_property: bool = _can(
        "A message's properties may hold 32 KiB, and all characters but 0x01 and 0x02, which RocketMQ itself uses.",
        without="A message is parked that has a control character in a property, or more of them than the proxy takes: "
        "128 of 16 KiB together, unless it is set otherwise.",
    )
    proves_writing: bool = _can(
        "A rule without messages proves every 2 s that its brokers answer, and `check` that they let it write.",
        without="An idle outbound rule counts as up while its topic has a route; an obstacle shows with a message.",
    )
    tells_refusals: bool = _can(
        "RocketMQ's answer is known where it refuses: a wrong key, no permission, a message that it calls illegal.",
        without="A refusal looks like an outage. What only RocketMQ calls illegal is not parked: its queue waits.",
    )
    # Receiving
    receives_in_order: bool = _can(
        "The messages of one queue of RocketMQ are received in their order.",
        without="Inbound rules are refused: devices would get their messages mixed up.",
    )
    receives_any_body: bool = _can(
        "A body is received whole, whatever bytes are in it.",
        without="A message whose body may have been cut at a NUL byte is parked, never delivered.",
    )
    receives_any_property: bool = _can(
        "All properties of a message are received.",
        without="Those of docs/mapping.md alone are received, so a parked message has no others.",
    )
    reads_every_message: bool = _can(
        "Every message that RocketMQ stores can be read, however its sender compressed it or was connected.",
        without="What is compressed by LZ4 or Zstd, with librocketmq also what came over IPv6, is left out, logged and "
        "counted.",
    )
    starts_latest: bool = _can(
        "A new consumer group begins behind the last message of every queue (`from: latest`).",
        without="A new group misses nothing that comes from then on, but may begin with messages from before.",
    )
    starts_earliest: bool = _can(
        "A new consumer group begins with the first message of every queue (`from: earliest`).",
        without="Inbound rules with `from: earliest` are refused.",
    )
    commits_prefix: bool = _can(
        "What is not settled comes again with all behind it, as soon as the group has a member.",
        without="It comes again when RocketMQ's time for it is over, up to 20 s later.",
    )
    bounds_each_queue: bool = _can(
        "At most 1000 messages of each queue are on their way to devices.",
        without="At most 32 of each queue are, and its next come when the last of them is settled: each waits for the "
        "slowest device of those.",
    )
    shows_lag: bool = _can(
        "It is known how many messages wait in RocketMQ.",
        without="`mq2mqtt_consumer_lag` is missing for inbound rules.",
    )
    shares_groups: bool = _can(
        "The members of a consumer group share its queues out between them.",
        without="Each member reads all queues: inbound rules with a `group` are refused.",
    )
    lists_members: bool = _can(
        "RocketMQ tells who is in a consumer group.",
        without="A second bridge with the same `node` is not noticed.",
    )
    proves_reading: bool = _can(
        "`check` finds out whether a topic may be read in its group, without reading.",
        without="`check` does not look; the rule is down with the reason when it runs.",
    )
    # Around it
    creates_topics: bool = _can(
        "`check --create` makes topics that are missing.",
        without="`check --create` makes none: use `mqadmin updateTopic`.",
    )
    uses_access_keys: bool = _can(
        "Requests are signed with `rocketmq.access_key` and `secret_key`.",
        without="A configuration with `rocketmq.access_key` is refused.",
    )
    uses_tls: bool = _can(
        "RocketMQ is reached over TLS and verified, as `rocketmq.tls` says.",
        without="A configuration with `rocketmq.tls` is refused.",
    )
    maps_addresses: bool = _can(
        "Brokers are reached at other addresses than they announce, as `rocketmq.address_map` says.",
        without="A configuration with `rocketmq.address_map` is refused.",
    )

    @property
    def missing(self) -> tuple[Capability, ...]:
        """What the driver can't do."""
        return tuple(capability for capability in capabilities() if not getattr(self, capability.name))


def capabilities() -> Iterator[Capability]:
    """Yield every capability there is, in the order of `Capabilities`."""
    for one in fields(Capabilities):
        yield Capability(one.name, one.metadata[_MEANS], one.metadata[_WITHOUT])

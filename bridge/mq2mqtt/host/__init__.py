"""The MQTT side of the bridge, as the rest of it sees it.

`MqttHost` is what the bridge asks of a broker; `Intake` is what a broker's adapter asks of the bridge.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Protocol

from mq2mqtt.message import ClientEvent, MqttMessage
from mq2mqtt.rules import RuleSet
from mq2mqtt.spool.watching import Watcher

__all__ = [
    "CLIENT_EVENTS",
    "DELIVERY_TIMEOUT",
    "LATE_SECONDS",
    "Delivery",
    "DropReason",
    "Intake",
    "LaneWriter",
    "Missed",
    "MqttHost",
    "Outcome",
    "Settled",
    "Subscriber",
    "TopicRoute",
]


class Outcome(StrEnum):
    """How a delivery ended (design section 8). The best of its receivers' counts, in this order."""

    DELIVERED = "delivered"
    QUEUED = "queued"
    EXPIRED = "expired"
    DROPPED = "dropped"
    NO_SUBSCRIBER = "no_subscriber"


class DropReason(StrEnum):
    """Why a delivery or a publish was dropped: the `reason` label of `mq2mqtt_dropped_total`."""

    LANE_FULL = "lane_full"
    LANE_NOT_OPEN = "lane_not_open"
    SLOW_DEVICE = "slow_device"
    NOT_PERSISTENT = "not_persistent"
    OFFLINE_QUOTA = "offline_quota"
    NOT_STORABLE = "not_storable"
    SESSION_ENDED = "session_ended"
    NOT_AUTHORIZED = "not_authorized"
    DISCONNECTED = "disconnected"
    TOO_LARGE = "too_large"
    PARKING_FULL = "parking_full"
    UNREADABLE = "unreadable"
    HOST_REFUSED = "host_refused"


@dataclass(frozen=True, slots=True)
class Delivery:
    """The outcome of handing one message to the host, over all its receivers."""

    outcome: Outcome
    reason: DropReason | None = None


Settled = Callable[[Delivery], None]
"""Called exactly once for each message given to `publish` or `deliver`, maybe before the call returns."""

Missed = Callable[[str, int, Settled], None]
"""`missed(client_id, qos, settled)`: a persistent session did not get a message that it subscribed to; keep it.

`qos` is min(message, subscription), 1 or 2. `settled` is called exactly once, maybe later, with what became of it
(`queued`, or why not): that is the outcome of this receiver.
"""

DELIVERY_TIMEOUT = 5.0
"""Seconds after which a receiver that has not acknowledged is settled as `slow_device` (design section 2)."""


class MqttHost(Protocol):
    """A broker that devices are connected to.

    `publish` and `deliver` never block and never raise: they return at once and report through `settled`,
    at PUBACK / PUBCOMP (QoS 0: written to the connection), at the latest after `DELIVERY_TIMEOUT`. Messages for
    one client are written in the order of the calls. A slow or stuck client never delays another.
    `handed` is called once for each receiver, when the message is written to its connection: for the latency
    histogram.
    """

    @property
    def connected_clients(self) -> int:
        """How many clients are connected now."""

    @property
    def problem(self) -> str | None:
        """Why the broker cannot be reached, for an operator; `None` when it can."""

    @property
    def shows_topics(self) -> bool:
        """Whether `publish` can show receivers another topic (`shown_topic`)."""

    @property
    def sees_clients(self) -> bool:
        """Whether it knows who is connected. Without that nothing is kept for a client, and no status is told."""

    @property
    def sees_acknowledgements(self) -> bool:
        """Whether `delivered` means that the device has acknowledged, not only that the broker took the message."""

    @property
    def hears_late(self) -> bool:
        """Whether it may be told only within `LATE_SECONDS` that a client has come or gone; else it is at once."""

    async def available(self) -> None:
        """Return when it takes messages: at once, unless it cannot be reached or has too many to deliver already.

        What is given to it meanwhile waits, and is settled only when the broker has been reached.
        """

    def publish(
        self,
        message: MqttMessage,
        settled: Settled,
        *,
        shown_topic: str | None = None,
        handed: Callable[[], None],
        missed: Missed | None = None,
    ) -> None:
        """Fan out to the subscribers of `message.topic`, QoS min(message, subscription), retain 0.

        `shown_topic` (`mqttRealTopic`) changes only the topic that receivers see, never who gets it. `missed` is
        called for each persistent session that is away, or left or did not acknowledge, with QoS 1 or 2; a host that
        keeps messages for sessions itself, or cannot tell, never calls it.
        """

    def deliver(
        self,
        client_id: str,
        message: MqttMessage,
        settled: Settled,
        *,
        handed: Callable[[], None],
    ) -> None:
        """Hand `message` to one client, subscribed or not, with the message's QoS, shown as `message.topic` (P2P).

        For a client that is away the outcome is dropped, `NOT_PERSISTENT`.
        """

    def is_online(self, client_id: str) -> bool:
        """Whether `client_id` has a live connection."""

    async def kick(self, client_id: str) -> None:
        """Close the client's connection, if it has one."""


LATE_SECONDS: Final = 60.0
"""See `MqttHost.hears_late`."""

CLIENT_EVENTS: Final = ".clients"
"""The lane of client events, as a `LaneWriter` has it."""


class LaneWriter(Protocol):
    """A host that writes the lanes of outbound rules in a process of its own; the bridge only reads them."""

    @property
    def watcher(self) -> Watcher:
        """Where followed lanes get their news from."""

    def go_by(self, rules: RuleSet) -> None:
        """Let the writer know these rules: now, or when it can be reached."""

    def problem_of(self, rule_id: str) -> str | None:
        """Why the writer takes nothing for a rule now, as far as it has told; `None` when it does.

        With `CLIENT_EVENTS`: why events of clients are lost, or cannot be read.
        """


class Subscriber(Protocol):
    """A host that fetches what devices publish, as a client of the broker: it subscribes for each outbound rule."""

    def go_by(self, rules: RuleSet) -> None:
        """Subscribe for these rules: now, or when the broker can be reached."""

    def problem_of(self, rule_id: str) -> str | None:
        """Why nothing can be fetched or published for one rule, for an operator; `None` when it can."""


@dataclass(frozen=True, slots=True)
class TopicRoute:
    """What the rules say about a publish to one MQTT topic. Cheap to look up, the same object for a topic.

    `outbound` is the id of the outbound rule whose lane takes it; `p2p_target` is the client id of
    `{parent}/p2p/{clientId}` under a parent topic that has any rule, and `p2p_rule` that rule's id.
    """

    outbound: str | None = None
    p2p_target: str | None = None
    p2p_rule: str | None = None


class Intake(Protocol):
    """Where an adapter brings what devices publish, after the broker's ACL and before PUBACK / PUBCOMP."""

    def route(self, topic: str) -> TopicRoute | None:
        """Return what the rules say about `topic`; `None` when no rule is concerned.

        `$` topics and anything that is no valid topic name are nobody's.
        """

    def over_limit(self, topic: str, payload_bytes: int) -> bool:
        """Whether a publish exceeds `limits`; if so the adapter refuses it as it refuses a forbidden one."""

    def accept(
        self,
        route: TopicRoute,
        message: MqttMessage,
        *,
        will: bool = False,
    ) -> Awaitable[None] | None:
        """Put `message` into the lane of `route.outbound`.

        Returns `None` when that is done (PUBACK may go out). Otherwise an awaitable that ends when it is done:
        the lane is full (QoS 1 and 2 only), or `durability: power` waits for the disk. Cancelling it takes a
        message that is still waiting for space out again. Messages of one lane are taken in the order of the calls.
        A QoS 0 message for a full lane is dropped and counted.
        """

    def deliver_p2p(self, route: TopicRoute, message: MqttMessage) -> Awaitable[None] | None:
        """Hand a P2P message that a device published to its target, privately (spec 6).

        Returns `None` when PUBACK may go out. Otherwise an awaitable as that of `accept`: one that is to be kept
        (QoS 1 or 2, the sender's cleanSession=false) waits until it is on disk.
        """

    def on_client_event(self, event: ClientEvent) -> None:
        """Tell that a client came or went."""

"""What a connection and the adapter around it know each other by."""

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

from amqtt.session import Session

from mq2mqtt.host import Intake
from mq2mqtt_amqtt.packets import Publish

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Collection

    from mq2mqtt_amqtt.connection import Connection

__all__ = ["Host", "Reason", "Receivers", "Will", "is_kept"]


class Reason(StrEnum):
    """Why a connection ended: `ClientEvent.reason` of a tcpclean (spec 8)."""

    TAKEN_OVER = "clientId conflict"
    SILENT = "no heart"
    CLOSED = "closed by client"
    DISCONNECTED = "disconnected by client"
    KICKED = "kicked"
    INVALID_PACKET = "invalid packet"
    BROKER_STOPPED = "broker stopped"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Will:
    """The will of one CONNECT. amqtt keeps it in the session, where the next connection's CONNECT replaces it."""

    topic: str
    payload: bytes
    qos: int
    retain: bool


class Host(Protocol):
    """What a connection needs of the adapter."""

    @property
    def intake(self) -> Intake | None:
        """See `Routing.intake`."""

    @property
    def restricted(self) -> bool:
        """See `Routing.restricted`."""

    async def may_publish(self, session: Session, topic: str) -> bool:
        """Ask the plugins that filter topics."""

    def wanted(self, publish: Publish) -> bool:
        """Whether anything in the broker wants to see `publish`: a subscriber, a plugin, the retained messages."""

    def online(self, connection: "Connection") -> None:
        """CONNACK has been sent."""

    def offline(self, connection: "Connection") -> None:
        """The connection is ending: nothing more can be delivered to it."""

    async def finish(self, connection: "Connection") -> None:
        """Publish the will, update session and presence; called once."""

    def writing(self, client_id: str) -> "Collection[asyncio.Future[None]]":
        """Return what of a client's subscriptions is being written to the store. Do not cancel it."""


class Receivers(Protocol):
    """Who says what a client may receive."""

    @property
    def restricted(self) -> bool:
        """Whether any plugin filters topics."""

    async def may_receive(self, session: Session, topic: str) -> bool:
        """Ask the plugins that filter topics."""


def is_kept(session: Session) -> bool:
    """Whether amqtt keeps a session while its client is away: with cleanSession=false, unless marked anonymous."""
    return not session.clean_session and not session.is_anonymous

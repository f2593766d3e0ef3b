"""Who is connected, and what the programs behind RocketMQ are told of it."""

from mq2mqtt.presence.journal import Journal
from mq2mqtt.presence.presence import Presence
from mq2mqtt.presence.state import Connection

__all__ = ["Connection", "Journal", "Presence"]

"""Who is connected, and what the programs behind RocketMQ are told of it; for them, `StatusTracker`."""

from mq2mqtt.presence.journal import Journal
from mq2mqtt.presence.presence import Presence
from mq2mqtt.presence.state import Connection
from mq2mqtt.presence.tracker import StatusTracker

__all__ = ["Connection", "Journal", "Presence", "StatusTracker"]

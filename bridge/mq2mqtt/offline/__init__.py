"""What clients that are away will get when they return."""

from mq2mqtt.offline.queue import OfflineQueue

__all__ = ["OfflineQueue"]

"""Which sessions the broker keeps for this bridge, noted on disk.

The broker queues messages for a session until somebody takes it up. That of a rule which has gone while the sidecar was
not running would fill it for ever; nobody but this file knows of it.
"""

import json
from pathlib import Path

from loguru import logger

from mq2mqtt.spool.files import make_directory, replace_file

__all__ = ["Sessions"]


class Sessions:
    """Client id -> topic filter of each session."""

    def __init__(self, path: Path) -> None:
        """Read the file; what cannot be read is logged, and means that no session is known."""
        self._path = path
        self.kept: dict[str, str] = {}
        try:
            fields = json.loads(path.read_bytes())
            self.kept = {str(client_id): str(topic_filter) for client_id, topic_filter in fields.items()}
        except FileNotFoundError:
            pass
        except (OSError, ValueError, AttributeError, RecursionError) as error:
            logger.warning("{}: sessions of rules that have gone stay in the broker: {}", path, error)

    def keep(self, client_id: str, topic_filter: str) -> None:
        """Note a session, before the broker begins it."""
        if self.kept.get(client_id) != topic_filter:
            self.kept[client_id] = topic_filter
            self._write()

    def forget(self, client_id: str) -> None:
        """The broker has ended a session."""
        if self.kept.pop(client_id, None) is not None:
            self._write()

    def _write(self) -> None:
        try:
            make_directory(self._path.parent)
            replace_file(self._path, json.dumps(self.kept).encode() + b"\n", sync=False)
        except OSError as error:
            logger.warning("sessions are not noted in {}: {}", self._path, error)

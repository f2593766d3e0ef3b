"""The device trace: every connection and how it ended, from `Presence` into the store."""

from mq2mqtt.presence import Connection, Presence
from mq2mqtt.store import Connect, ConnectStore

__all__ = ["keep_history"]


def keep_history(presence: Presence, connects: ConnectStore) -> None:
    """Have each coming and going noted in `connects` from now on, and who is connected already."""

    def came(connection: Connection) -> None:
        connects.began(
            Connect(
                client_id=connection.client_id,
                channel_id=connection.channel_id,
                client_ip=connection.client_ip,
                clean_session=connection.clean_session,
                connected_ms=connection.connected_ms,
            )
        )

    def gone(connection: Connection, ended_ms: int, reason: str) -> None:
        connects.ended(connection.client_id, connection.channel_id, ended_ms=ended_ms, reason=reason)

    presence.listen(came=came, gone=gone)
    # Their beginning may not have reached the store before the last end of this process.
    for connection in presence.connections.values():
        came(connection)

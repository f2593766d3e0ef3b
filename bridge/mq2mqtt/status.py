"""The body of a status message: what the programs behind RocketMQ are told of a client (spec 5.1). Pure."""

import json

from mq2mqtt.errors import UnmappableMessageError
from mq2mqtt.message import ClientEvent, ClientEventType

__all__ = ["status_body", "tag_of"]

# ASCII, because a client id need not be what UTF-8 can carry.
_to_json = json.JSONEncoder(separators=(",", ":"), check_circular=False).encode


def status_body(event: ClientEvent, *, seq: int, epoch: int, node: str) -> bytes:
    """Return the body of the message about `event`.

    Args:
        event: what happened.
        seq: a number that rises with every event that this bridge tells, over restarts too.
        epoch: the number at which the broker's present life began.
        node: the bridge's name, `Settings.node`.
    """
    return _to_json(
        {
            "clientId": event.client_id,
            "channelId": event.channel_id,
            "clientIp": event.client_ip,
            "eventType": event.type,
            "time": event.time_ms,
            "seq": seq,
            "epoch": epoch,
            "node": node,
        }
    ).encode()


def tag_of(body: bytes) -> str:
    """Return the RocketMQ tag of a body: its event type.

    Raises:
        UnmappableMessageError: it is no body of a status message.
    """
    try:
        return ClientEventType(json.loads(body)["eventType"])
    except (ValueError, LookupError, TypeError, RecursionError):
        raise UnmappableMessageError("no client event") from None

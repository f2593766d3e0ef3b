"""What the proxy would refuse, known before anything of a batch is sent. Pure."""

import re

from mq2mqtt.errors import MessageRejectedError
from mq2mqtt.message import RocketMessage

__all__ = ["require_sendable"]

# As everywhere in RocketMQ; the proxy allows less by default, 16 KiB, and says so itself.
_PROPERTIES_BYTES = 32_767
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")


def require_sendable(message: RocketMessage, *, max_body: int) -> None:
    """See that RocketMQ takes `message`, as far as can be known here.

    Raises:
        MessageRejectedError: it would not.
    """
    if not message.body:
        raise MessageRejectedError("the body is empty")
    if len(message.body) > max_body:
        raise MessageRejectedError(f"the body has {len(message.body)} bytes, the proxy takes {max_body}")
    size = 0
    for name, value in message.properties.items():
        if _CONTROL.search(name) or _CONTROL.search(value):
            raise MessageRejectedError(f"property {name!r} has a control character, which the proxy refuses")
        try:
            size += len(name.encode()) + len(value.encode())
        except UnicodeEncodeError:
            raise MessageRejectedError(f"property {name!r} is no Unicode text") from None
    if size > _PROPERTIES_BYTES:
        raise MessageRejectedError(f"the properties have {size} bytes, RocketMQ takes {_PROPERTIES_BYTES}")
    tag = message.properties.get("TAGS", "")
    if "|" in tag or (tag and not tag.strip()):
        raise MessageRejectedError(f"the proxy takes no tag {tag!r}")

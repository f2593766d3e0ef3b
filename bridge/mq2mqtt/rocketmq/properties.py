"""Message properties on the wire: `key 0x01 value 0x02`, one after another, in UTF-8."""

from collections.abc import Mapping
from typing import Final

from mq2mqtt.rocketmq.codes import ResponseCode
from mq2mqtt.rocketmq.errors import MessageIllegal

__all__ = ["MAX_PROPERTIES", "decode_properties", "encode_properties"]

# The length is a signed 16-bit integer on the wire, and the broker adds properties of its own (CLUSTER, MSG_REGION,
# TRACE_ON: about 75 bytes, more where a cluster has a long name). 5.3.3 does not check the sum for a batch: it stores
# 32767 bytes plus its own with a wrong length, and then no message after that one, of any topic, can be read (tried).
MAX_PROPERTIES: Final = 32000


def encode_properties(properties: Mapping[str, str]) -> str:
    """Return `properties` as the text that goes on the wire, each entry with its closing 0x02.

    An empty value is left out: to RocketMQ it equals a missing one.

    Raises:
        MessageIllegal: a key is empty, or a key or value holds one of the two separators.
    """
    if not properties:
        return ""
    count = len(properties)
    text = "\x02".join(map("\x01".join, properties.items())) + "\x02"
    if "\x01\x02" in text or text[0] == "\x01" or "\x02\x01" in text:
        filled = {key: value for key, value in properties.items() if value}
        if "" in filled:
            raise _illegal("a property has no name")
        if len(filled) < count:
            return encode_properties(filled)
    if text.count("\x01") != count or text.count("\x02") != count:
        raise _illegal("a property holds one of the separators 0x01 and 0x02")
    return text


def decode_properties(text: str) -> dict[str, str]:
    """Read what any client wrote; entries without a name or a value are left out, as the Java client does."""
    if not text:
        return {}
    odd = "\x01\x02" in text or "\x02\x01" in text or text[0] == "\x01" or text[-1] == "\x01"
    if not odd:
        try:
            # Twice as fast as the careful way below; it fails on an entry without a separator.
            return dict([entry.split("\x01", 1) for entry in text.removesuffix("\x02").split("\x02")])
        except ValueError:
            pass
    pairs = (entry.partition("\x01") for entry in text.split("\x02"))
    return {key: value for key, _, value in pairs if key and value}


def _illegal(reason: str) -> MessageIllegal:
    return MessageIllegal(ResponseCode.MESSAGE_ILLEGAL, reason, address="this client")

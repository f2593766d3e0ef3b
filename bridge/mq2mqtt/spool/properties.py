"""The properties section of a publish frame: MQTT 5's own encoding, without its leading length. Sans-I/O."""

from mq2mqtt.errors import UnmappableMessageError
from mq2mqtt.message import MqttProperties

__all__ = ["decode_properties", "encode_properties"]

# MQTT 5, table 2-4. Fixed-length values by identifier; then the variable ones.
_FIXED_BYTES = {
    **dict.fromkeys((0x01, 0x17, 0x19, 0x24, 0x25, 0x28, 0x29, 0x2A), 1),
    **dict.fromkeys((0x13, 0x21, 0x22, 0x23), 2),
    **dict.fromkeys((0x02, 0x11, 0x18, 0x27), 4),
}
_TEXTS_OR_BINARY = frozenset((0x03, 0x08, 0x09, 0x12, 0x15, 0x16, 0x1A, 0x1C, 0x1F))
_EXPIRY, _CONTENT_TYPE, _SUBSCRIPTION_ID, _USER = 0x02, 0x03, 0x0B, 0x26


def _with_length(text: str) -> bytes:
    value = text.encode("utf-8", "surrogateescape")
    return len(value).to_bytes(2, "big") + value


def encode_properties(properties: MqttProperties) -> bytes:
    """Return MQTT 5's encoding: identifier and value each, big-endian, without the leading length.

    Raises:
        ValueError: a value does not fit MQTT 5's field.
    """
    parts: list[bytes] = []
    try:
        if properties.expiry_seconds is not None:
            parts.append(bytes((_EXPIRY,)) + properties.expiry_seconds.to_bytes(4, "big"))
        if properties.content_type is not None:
            parts.append(bytes((_CONTENT_TYPE,)) + _with_length(properties.content_type))
        parts.extend(bytes((_USER,)) + _with_length(name) + _with_length(value) for name, value in properties.user)
    except OverflowError as error:
        raise ValueError(f"an MQTT 5 property does not fit: {error}") from error
    return b"".join(parts)


def _field(section: bytes, position: int) -> tuple[bytes, int]:
    """Return the length-prefixed value at `position` and where it ends."""
    start = position + 2
    end = start + int.from_bytes(section[position:start], "big")
    if start > len(section) or end > len(section):
        raise UnmappableMessageError("malformed MQTT 5 properties: a value is cut off")
    return section[start:end], end


def _skip(section: bytes, identifier: int, position: int) -> int:
    """Return where the value of a property ends that the bridge does not carry."""
    if identifier in _TEXTS_OR_BINARY:
        return _field(section, position)[1]
    if identifier == _SUBSCRIPTION_ID:
        while position < len(section) and section[position] & 0x80:
            position += 1
        end = position + 1
    elif identifier in _FIXED_BYTES:
        end = position + _FIXED_BYTES[identifier]
    else:
        raise UnmappableMessageError(f"malformed MQTT 5 properties: no property has identifier {identifier:#04x}")
    if end > len(section):
        raise UnmappableMessageError("malformed MQTT 5 properties: a value is cut off")
    return end


def decode_properties(section: bytes) -> MqttProperties | None:
    """Decode what the bridge carries of MQTT 5 properties; other known ones are skipped. `None` if nothing is left.

    Raises:
        UnmappableMessageError: the section is malformed.
    """
    content_type: str | None = None
    expiry: int | None = None
    user: list[tuple[str, str]] = []
    position = 0
    while position < len(section):
        identifier = section[position]
        position += 1
        if identifier == _USER:
            name, position = _field(section, position)
            value, position = _field(section, position)
            user.append((_text(name), _text(value)))
        elif identifier == _CONTENT_TYPE:
            value, position = _field(section, position)
            content_type = _text(value)
        else:
            start, position = position, _skip(section, identifier, position)
            if identifier == _EXPIRY:
                expiry = int.from_bytes(section[start:position], "big")
    if content_type is None and expiry is None and not user:
        return None
    return MqttProperties(content_type=content_type, expiry_seconds=expiry, user=tuple(user))


def _text(value: bytes) -> str:
    return value.decode("utf-8", "surrogateescape")

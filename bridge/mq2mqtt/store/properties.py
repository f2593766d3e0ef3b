"""MQTT 5 properties as a text column: JSON in ASCII, which every database holds whatever is in it."""

import json

from mq2mqtt.message import MqttProperties

__all__ = ["decode_properties", "encode_properties"]


def encode_properties(properties: MqttProperties) -> str:
    """Return `properties` as JSON; what is not set is left out."""
    fields: dict[str, object] = {}
    if properties.content_type is not None:
        fields["content_type"] = properties.content_type
    if properties.expiry_seconds is not None:
        fields["expiry_seconds"] = properties.expiry_seconds
    if properties.user:
        fields["user"] = properties.user
    return json.dumps(fields)


def decode_properties(text: str) -> MqttProperties:
    """Return what `encode_properties` wrote."""
    fields = json.loads(text)
    return MqttProperties(
        content_type=fields.get("content_type"),
        expiry_seconds=fields.get("expiry_seconds"),
        user=tuple((name, value) for name, value in fields.get("user", ())),
    )

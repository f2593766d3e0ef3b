"""The bridge as a plugin of the amqtt broker: `plugins: {mq2mqtt_amqtt.BridgePlugin: {config_file: mq2mqtt.yaml}}`."""

from mq2mqtt_amqtt.auth import AuthPlugin
from mq2mqtt_amqtt.plugin import BridgePlugin

__all__ = ["AuthPlugin", "BridgePlugin"]

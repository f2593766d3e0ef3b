"""Whether what a deployment acknowledged reaches RocketMQ."""

from mq2mqtt.message import ReceivedMessage
from tests.bridge_process import wait_for
from tests.docker.stack import Stack
from tests.stream import Stream


class Watched:
    """A stream of publishes to a topic of its own, and which of them RocketMQ has."""

    def __init__(self, stack: Stack, name: str, messages: list[ReceivedMessage]) -> None:
        self._second_topic = f"/{name}"
        self._messages = messages
        self.stream = Stream(stack.mqtt_port, f"sensors/{name}", rate=200)
        self.stream.start()
        wait_for(lambda: len(self.arrived()) >= 200, seconds=60, what="it does not flow")

    def arrived(self) -> set[bytes]:
        return {
            message.body
            for message in list(self._messages)
            if message.properties.get("mqttSecondTopic") == self._second_topic
        }

    def assert_nothing_is_missing(self) -> None:
        self.stream.stop()

        def missing() -> set[bytes]:
            return self.stream.acknowledged - self.arrived()

        wait_for(lambda: not missing(), seconds=60, what=lambda: f"{len(missing())} acknowledged messages are missing")

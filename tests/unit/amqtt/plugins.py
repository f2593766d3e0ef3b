"""Plugins of other people, as a broker with the bridge may have them."""
# ruff: noqa: ANN401 - amqtt's interfaces

import asyncio
from dataclasses import dataclass
from typing import Any

from amqtt.contexts import Action
from amqtt.plugins.base import BaseAuthPlugin, BasePlugin, BaseTopicPlugin

ACL = "tests.unit.amqtt.plugins.SlowAcl"
LISTENER = "tests.unit.amqtt.plugins.Listener"
GATE = "tests.unit.amqtt.plugins.Gate"
TOPIC_GATE = "tests.unit.amqtt.plugins.TopicGate"
ANSWERS = "tests.unit.amqtt.plugins.Answers"
OPEN, WRONG, CRASH = "open", "wrong", "crash"


class SlowAcl(BaseTopicPlugin):
    """Forbids topics that end in `/forbidden`, for publishing, and in `/secret`, for receiving. Answers late."""

    asked: list[tuple[str, str]] = []  # noqa: RUF012 - amqtt makes the plugin; the test clears it

    @dataclass
    class Config:
        delay: float = 0.0

    async def topic_filtering(
        self,
        *,
        session: Any = None,  # noqa: ARG002
        topic: Any = None,
        action: Any = None,
    ) -> bool:
        self.asked.append((action, topic))
        config: Any = self.config
        # The later the publish, the quicker the answer: concurrent questions would overtake each other.
        if action is Action.PUBLISH and topic.endswith("/slow"):
            await asyncio.sleep(config.delay)
        forbidden = "/forbidden" if action is Action.PUBLISH else "/secret"
        return not (action is not Action.SUBSCRIBE and topic.endswith(forbidden))


class Listener(BasePlugin[Any]):
    """Listens to what amqtt tells its plugins."""

    heard: list[tuple[str, Any]] = []  # noqa: RUF012 - amqtt makes the plugin; the test clears it

    async def on_broker_message_received(self, *, client_id: str, message: Any) -> None:
        self.heard.append(("received", (client_id, message.topic)))

    async def on_broker_message_broadcast(self, *, client_id: str, message: Any) -> None:
        self.heard.append(("broadcast", (client_id, message.topic)))

    async def on_mqtt_packet_received(self, *, packet: Any, session: Any = None) -> None:  # noqa: ARG002
        self.heard.append(("packet in", type(packet).__name__))

    async def on_mqtt_packet_sent(self, *, packet: Any, session: Any = None) -> None:  # noqa: ARG002
        self.heard.append(("packet out", type(packet).__name__))


class Gate(BaseAuthPlugin):
    """Lets in who has the password `OPEN`; fails for `CRASH`."""

    @dataclass
    class Config:
        pass

    async def authenticate(self, *, session: Any) -> bool:
        if session.password == CRASH:
            raise RuntimeError("the user database is gone")
        session.attributes["gate"] = session.username
        return bool(session.password == OPEN)


class TopicGate(BaseTopicPlugin):
    """Permits everything, but what `holds` says only once `opened` is set; `asked` tells that somebody waits."""

    holds: Action
    opened: asyncio.Event
    asked: asyncio.Event

    @dataclass
    class Config:
        pass

    async def topic_filtering(self, *, session: Any = None, topic: Any = None, action: Any = None) -> bool:  # noqa: ARG002
        if action is self.holds:
            self.asked.set()
            await self.opened.wait()
        return True


class Answers(BaseTopicPlugin):
    """Who may receive what: permits it, but for the topics in `later`, whose answers the test sets."""

    later: dict[str, asyncio.Future[bool]]

    @dataclass
    class Config:
        pass

    async def topic_filtering(self, *, session: Any = None, topic: Any = None, action: Any = None) -> bool:  # noqa: ARG002
        answer = self.later.get(topic) if action is Action.RECEIVE else None
        return answer is None or await answer

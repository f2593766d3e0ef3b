"""What `mq2mqtt explain` prints: which rules take a message, and exactly what they make of it. Asks no server."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final, Literal

import typer

from mq2mqtt import topics
from mq2mqtt.errors import UnmappableMessageError
from mq2mqtt.mapping import Inbound, OutboundMapper, is_own, to_mqtt, to_rocketmq
from mq2mqtt.message import ClientEvent, ClientEventType, MqttMessage, RocketBatch, RocketMessage
from mq2mqtt.rules import InboundRule, OutboundRule, StatusRule, group_of
from mq2mqtt.settings import Settings
from mq2mqtt.spool.frame import Frame, FrameKind, decode_frames, encode_publish
from mq2mqtt.status import status_body
from mq2mqtt.status_worker import UNSEEN

__all__ = ["StoredMessage", "explain_client", "explain_publish", "explain_stored"]

_OK, _PROBLEMS = 0, 1
_MAX_SHOWN_BYTES = 512
_ANY_OFFSET = 0
_PLAIN_QOS: Final = 1
"""Highest QoS of what a plain MQTT client fetches, so what RocketMQ is told of: docs/mqtt.md."""

_Host = Literal["amqtt", "mosquitto", "mqtt"]


@dataclass(frozen=True, slots=True)
class StoredMessage:
    """A message as a consumer of RocketMQ would receive it; see `mq2mqtt.message.ReceivedMessage`."""

    topic: str
    body: bytes
    properties: dict[str, str]
    born_ms: int = 0
    broker: str = ""
    queue_id: int = 0
    offset: int = 0


def explain_publish(settings: Settings, message: MqttMessage) -> int:
    """Print what becomes of a device's publish; return 0 when a rule takes it, else 1."""
    topic, host = message.topic, _host(settings)
    typer.echo(f"PUBLISH {topic!r}, {_describe(message)}, from client {message.client_id!r}")
    if obstacle := _obstacle(settings, message):
        typer.echo(f"  not taken: {obstacle}")
        return _PROBLEMS
    rules = settings.rule_set
    outbound = rules.outbound(topic)
    address = topics.p2p_address(topic)
    if address is not None and host == "mqtt":
        typer.echo(f"  P2P: reaches {_eavesdroppers(topic)}")
    elif address is not None:
        typer.echo(f"  P2P: goes to client {address.client_id!r} alone, no subscription sees it")
    if outbound is None:
        parent = rules.parent_rule(topics.parent_of(topic))
        typer.echo(f"  not sent to RocketMQ: {_why_not_outbound(parent, topic)}")
        return _OK if address is not None and host != "mqtt" else _PROBLEMS
    if host == "mqtt":
        typer.echo("  a plain MQTT client is not told who published it, nor of that session, and fetches QoS 2 as 1")
        message = replace(message, qos=min(message.qos, _PLAIN_QOS), client_id="", clean_session=True)
    return _show_outbound(settings, outbound, message)


def _host(settings: Settings) -> _Host:
    """Return the broker that `settings` are for: without `host` it is `mq2mqtt run`'s, as `check` takes it."""
    return settings.host.type if settings.host.model_fields_set else "amqtt"


def _eavesdroppers(p2p_topic: str) -> str:
    """Say whom a P2P message reaches where the broker takes it for an ordinary one."""
    parent = topics.parent_of(p2p_topic)
    return f"whoever subscribes to {p2p_topic!r}, or to {f'{parent}/#'!r}: an ordinary topic to the broker"


def _obstacle(settings: Settings, message: MqttMessage) -> str | None:
    """Say why no rule gets to see `message`."""
    topic, host = message.topic, _host(settings)
    if topics.is_legacy_request(topic) and host != "mqtt":
        return "it asks, as clients of ApsaraMQ do, for what is always on here: acknowledged and ignored"
    if topic.startswith("$"):
        end = ", the broker closes the connection" if host == "amqtt" else ""
        return f"the topic begins with $: it is the broker's own{end}"
    if problem := topics.topic_problem(topic):
        return f"the topic {problem}, the broker closes the connection"
    parent = topics.parent_of(topic)
    if settings.rule_set.parent_rule(parent) is None:
        known = sorted(settings.rule_set.parents)
        similar = [name for name in known if name.lower() == parent.lower()]
        hint = f"MQTT topics are case-sensitive: {similar[0]}" if similar else ", ".join(known) or "no rules"
        return f"no rule has the parent topic {parent!r} ({hint})"
    if (over := _over_limit(settings, message)) is not None:
        return f"{over}; its subscribers get it all the same" if host == "mqtt" else over
    return None


def _over_limit(settings: Settings, message: MqttMessage) -> str | None:
    topic, limits = message.topic, settings.limits
    if limits.topic_chars is not None and len(topic) > limits.topic_chars:
        return f"the topic has {len(topic)} characters, limits.topic_chars is {limits.topic_chars}"
    if limits.payload_bytes is not None and len(message.payload) > limits.payload_bytes:
        return f"the payload has {len(message.payload)} bytes, limits.payload_bytes is {limits.payload_bytes}"
    return None


def _why_not_outbound(rule: OutboundRule | InboundRule | None, topic: str) -> str:
    if isinstance(rule, OutboundRule):
        return f"rule {rule.id} is disabled"
    return f"{topics.parent_of(topic)!r} is the target of inbound rules only"


def _show_outbound(settings: Settings, rule: OutboundRule, message: MqttMessage) -> int:
    typer.echo(f"  rule {rule.id} sends it to RocketMQ:")
    # The way a real publish takes: through a frame of the lane.
    (frame,), _ = decode_frames(encode_publish(message, accepted_us=0), 0, max_frames=1)
    try:
        sent = to_rocketmq(frame, node=settings.node, rule_id=rule.id, offset=_ANY_OFFSET, topic=rule.target)
    except UnmappableMessageError as error:
        typer.echo(f"    parked: {error.reason}")
        return _PROBLEMS
    _show_sent(sent)
    return _OK


def _show_sent(sent: RocketMessage) -> None:
    typer.echo(f"    topic {sent.topic}")
    for name, value in sent.properties.items():
        note = "    (the last number is the message's offset in the lane)" if name == "KEYS" else ""
        typer.echo(f"    {name} = {_shown(value)}{note}")
    typer.echo(f"    body {_payload(sent.body)}")


def explain_client(settings: Settings, client_id: str) -> int:
    """Print what RocketMQ is told when a client connects; return 0 when a rule tells it, else 1."""
    typer.echo(f"CONNECT of client {client_id!r}")
    group = group_of(client_id)
    rule = settings.rule_set.status(group)
    if rule is None or _host(settings) == "mqtt":
        typer.echo(f"  not told: {_why_not_told(settings, group)}")
        return _PROBLEMS
    typer.echo(f"  rule {rule.id} tells RocketMQ, and also of its end (tags disconnect, tcpclean):")
    event = ClientEvent(ClientEventType.CONNECT, client_id, "<connection>", "192.0.2.1:50000", 1_700_000_000_000)
    body = status_body(event, seq=1, epoch=0, node=settings.node)
    frame = Frame(FrameKind.EVENT, 0, 0, client_id, "", b"", body)
    _, properties = OutboundMapper(node=settings.node, rule_id=rule.id).map(frame, _ANY_OFFSET)
    _show_sent(RocketBatch(rule.target, [body], [properties])[0])
    return _OK


def _why_not_told(settings: Settings, group: str) -> str:
    if _host(settings) == "mqtt":
        return UNSEEN
    if not group:
        return "its id is not <GroupID>@@@<DeviceID>"
    rules = [rule for rule in settings.rules if isinstance(rule, StatusRule)]
    for rule in rules:
        if rule.source == group:
            return f"rule {rule.id} is disabled"
    return f"no status rule has the source {group!r} ({', '.join(rule.source for rule in rules) or 'there is none'})"


def explain_stored(settings: Settings, message: StoredMessage) -> int:
    """Print what becomes of a message in RocketMQ; return 0 when a rule delivers it, else 1."""
    typer.echo(f"RocketMQ topic {_shown(message.topic)}, {len(message.body)} bytes")
    for name, value in message.properties.items():
        typer.echo(f"  {_shown(name)} = {_shown(value)}")
    inbound = [rule for rule in settings.rules if isinstance(rule, InboundRule)]
    taking = [rule for rule in inbound if rule.source == message.topic]
    if not taking:
        known = ", ".join(sorted({rule.source for rule in inbound})) or "none"
        typer.echo(f"  no inbound rule has this source (sources: {known})")
        return _PROBLEMS
    delivering = sum(_show_inbound(settings, rule, message) for rule in taking)
    return _OK if delivering else _PROBLEMS


def _show_inbound(settings: Settings, rule: InboundRule, message: StoredMessage) -> bool:
    """Print what `rule` makes of `message`; return whether it delivers it."""
    obstacle = _inbound_obstacle(rule, message.properties)
    if obstacle is not None:
        typer.echo(f"  rule {rule.id} skips it: {obstacle}")
        return False
    try:
        inbound = to_mqtt(message, parent=rule.target, limits=settings.limits)
    except UnmappableMessageError as error:
        typer.echo(f"  rule {rule.id} parks it: {error.reason}")
        return False
    for name in inbound.invalid:
        typer.echo(f"  rule {rule.id} ignores {name}: {_shown(message.properties[name])} is not in the contract")
    topic = _topic_seen(_host(settings), rule, inbound)
    if topic.is_real and message.properties.get("mqttRealTopic") and "mqttRealTopic" not in inbound.invalid:
        typer.echo(f"  rule {rule.id} ignores mqttRealTopic: this broker shows everybody the real topic")
    typer.echo(f"  rule {rule.id} publishes to {topic.receivers}:")
    typer.echo(f"    topic {topic.name!r}, {_describe(inbound.message)}")
    _show_mqtt5(inbound)
    return True


def _inbound_obstacle(rule: InboundRule, properties: Mapping[str, str]) -> str | None:
    if not rule.enabled:
        return "it is disabled"
    if not rule.takes(properties.get("TAGS")):
        tag = f"its tag is {properties['TAGS']!r}" if "TAGS" in properties else "it has no tag (property TAGS)"
        return f"{tag}, the rule takes {rule.tags}"
    if is_own(properties):
        return "a bridge sent it (property mq2mqttNode): it would go round for ever"
    return None


@dataclass(frozen=True, slots=True)
class _Seen:
    """Under which topic a message reaches whom."""

    name: str
    receivers: str
    is_real: bool
    """Whether `mqttRealTopic` has no say."""


def _topic_seen(host: _Host, rule: InboundRule, inbound: Inbound) -> _Seen:
    topic = inbound.message.topic
    if inbound.p2p_target is None:
        shows = host == "amqtt"
        name = inbound.shown_topic if shows and inbound.shown_topic is not None else topic
        return _Seen(name, f"the subscribers of {topic!r}", is_real=not shows)
    if host == "mqtt":
        topic = topics.p2p_topic(rule.target, inbound.p2p_target)
        return _Seen(topic, f"{_eavesdroppers(topic)} (P2P)", is_real=True)
    return _Seen(topic, f"client {inbound.p2p_target!r} alone (P2P)", is_real=False)


def _show_mqtt5(inbound: Inbound) -> None:
    """Print what only receivers with MQTT 5 see, and for how long the message is worth delivering."""
    properties = inbound.message.properties
    if properties is not None:
        if properties.content_type is not None:
            typer.echo(f"    content type {_shown(properties.content_type)}")
        for name, value in properties.user:
            typer.echo(f"    user property {_shown(name)} = {_shown(value)}")
    if inbound.lifetime == 0:
        typer.echo("    lifetime 0 s: it is delivered at once or never")
    elif inbound.lifetime is not None:
        typer.echo(f"    lifetime {inbound.lifetime} s from when it was sent to RocketMQ, then it is dropped")


def _describe(message: MqttMessage) -> str:
    session = "clean session" if message.clean_session else "persistent session"
    retain = ", retain" if message.retain else ""
    return f"QoS {message.qos}, {session}{retain}, payload {_payload(message.payload)}"


def _payload(payload: bytes) -> str:
    more = f" ... ({len(payload)} bytes)" if len(payload) > _MAX_SHOWN_BYTES else ""
    return f"{payload[:_MAX_SHOWN_BYTES]!r}{more}"


def _shown(value: str) -> str:
    """Return `value` as it is, unless a terminal could not show it."""
    return value if value.isprintable() else repr(value)

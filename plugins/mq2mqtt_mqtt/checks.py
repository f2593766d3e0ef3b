"""`mq2mqtt check` with `host.type: mqtt`: does the broker let the sidecar in, and take its subscriptions?"""

import secrets
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

from mq2mqtt.rules import OutboundRule, StatusRule
from mq2mqtt.settings import Settings
from mq2mqtt.status_worker import UNSEEN
from mq2mqtt_mosquitto.client import Incoming, MqttClient, MqttError
from mq2mqtt_mosquitto.mosquitto_conf import Advice, advice_without_hook, found_in, read_conf, report
from mq2mqtt_mqtt.feed import subscribe
from mq2mqtt_mqtt.host import login_of

__all__ = ["check_broker"]


async def check_broker(settings: Settings, mosquitto_conf: Path | None = None) -> int:
    """Print one line per finding; return the exit code.

    Raises:
        ConfigError: `mosquitto_conf` cannot be read, or a file of `host.tls` is no use.
    """
    findings = [finding async for finding in _findings(settings)]
    if mosquitto_conf is not None:
        findings += found_in(mosquitto_conf, advice_without_hook(read_conf(mosquitto_conf)))
    return report(findings)


async def _findings(settings: Settings) -> AsyncIterator[Advice]:
    url = settings.host.url
    # The sidecar may be at work: its own client id would end its connection.
    login = replace(login_of(settings), client_id=f"{settings.host.client_id}-check-{secrets.token_hex(6)}")
    try:
        client = await MqttClient.connect(login, received=_ignore, room=_nothing)
    except TimeoutError:
        yield Advice(f"host.url {url}: the broker does not answer; it has to speak MQTT 5", wrong=True)
        return
    except (OSError, MqttError) as error:
        yield Advice(f"host.url {url}: {getattr(error, 'strerror', None) or error}", wrong=True)
        return
    try:
        yield Advice(f"host.url {url}: the broker lets the sidecar in")
        if client.limits.packet_bytes is not None:
            longest = client.limits.packet_bytes
            yield Advice(f"host.url {url}: it takes packets up to {longest} bytes, longer ones are dropped")
        for rule in settings.rules:
            if isinstance(rule, StatusRule) and rule.enabled:
                yield Advice(f"rule {rule.id}: {UNSEEN}", wrong=True)
            elif isinstance(rule, OutboundRule) and rule.enabled:
                yield await _try_subscription(client, rule)
        yield Advice("how much it keeps for the sidecar no broker tells: see docs/mqtt.md and --mosquitto-conf")
    finally:
        client.close()


async def _try_subscription(client: MqttClient, rule: OutboundRule) -> Advice:
    topic_filter = f"{rule.source}/#"
    try:
        await subscribe(client, topic_filter)
    except MqttError as error:
        return Advice(f"rule {rule.id}: {error}", wrong=True)
    return Advice(f"rule {rule.id}: the broker takes the subscription to {topic_filter}")


def _ignore(_message: Incoming) -> None:
    """The sidecar's own session gets it too."""


def _nothing() -> None:
    """Nothing is sent."""

"""`mq2mqtt check`: does the configuration fit the RocketMQ and the PostgreSQL it names?"""

import secrets
from pathlib import Path

import typer

from mq2mqtt.errors import BridgeError, ConfigError, LinkError, NotConnectedError
from mq2mqtt.link import RocketLink
from mq2mqtt.link.drivers import driver_of, library, open_link
from mq2mqtt.link.refusals import refusals
from mq2mqtt.rules import InboundRule, Rule
from mq2mqtt.settings import RocketMQSettings, Settings
from mq2mqtt.store.sql import reach

__all__ = ["check"]

_OK, _PROBLEMS = 0, 1
# The name server has answered, so this is about a broker.
_ADDRESS_HINT = "; if this machine reaches that broker at another address, say so in rocketmq.address_map"


async def check(settings: Settings, path: Path, *, create: bool) -> int:
    """Print one line per finding; return the exit code. `create` makes the topics that are missing."""
    rules = settings.rules
    typer.echo(f"ok       {path}: valid, {len(rules)} rule{'' if len(rules) == 1 else 's'}")
    code = await _check_store(settings)
    # With another driver than the configuration needs, or none, there is nobody to ask RocketMQ.
    return max(code, _check_driver(settings) or await _check_rocketmq(settings, create=create))


def _check_driver(settings: Settings) -> int:
    driver = driver_of(settings.rocketmq)
    problems = refusals(settings.rocketmq, settings.rules)
    try:
        typer.echo(f"ok       rocketmq.driver {driver.name}: {library(driver)}")
    except ConfigError as error:
        problems = [str(error), *problems]
    for capability in driver.capabilities.missing:
        typer.echo(f"lacks    rocketmq.driver {driver.name}: {capability.name}: {capability.without}")
    for problem in problems:
        typer.echo(f"PROBLEM  {problem}")
    return _PROBLEMS if problems else _OK


async def _check_store(settings: Settings) -> int:
    try:
        place = await reach(settings.store.url, node=settings.node)
    except BridgeError as error:
        typer.echo(f"PROBLEM  {error}")
        return _PROBLEMS
    if place is not None:
        typer.echo(f"ok       store.url {place} answers")
    return _OK


async def _check_rocketmq(settings: Settings, *, create: bool) -> int:
    rules = settings.rules
    link = open_link(settings.rocketmq, client_id=f"mq2mqtt@check@{secrets.token_hex(6)}")
    place = _place(settings.rocketmq)
    await link.start()
    try:
        # Any topic will do, but one of RocketMQ's own: the answer counts.
        await link.topic_exists("mq2mqtt")
        if not rules:
            typer.echo(f"ok       {place} answers; there are no rules")
        return await _check_rules(settings, link, create=create)
    except LinkError as error:
        typer.echo(f"PROBLEM  {place}: {error}")
        return _PROBLEMS
    finally:
        await link.close()


def _place(rocketmq: RocketMQSettings) -> str:
    """Return whom the driver asks first."""
    if rocketmq.proxy is not None:
        return f"rocketmq.proxy {rocketmq.proxy}"
    return f"rocketmq.namesrv {rocketmq.namesrv}"


async def _check_rules(settings: Settings, link: RocketLink, *, create: bool) -> int:
    code = _OK
    for rule in settings.rules:
        code = max(code, await _check_topic(rule, rule.rocketmq_topic, link, settings, create=create))
        if isinstance(rule, InboundRule) and rule.receipts is not None:
            code = max(code, await _check_topic(rule, rule.receipts, link, settings, create=create))
    return code


async def _check_topic(rule: Rule, name: str, link: RocketLink, settings: Settings, *, create: bool) -> int:
    topic = f"RocketMQ topic {name}"
    can = driver_of(settings.rocketmq).capabilities
    try:
        if await link.topic_exists(name):
            use = await _use(rule, name, link, settings)
            typer.echo(f"ok       rule {rule.id}: {topic} exists, and {use}")
        elif create and can.creates_topics:
            await link.create_topic(name)
            typer.echo(f"created  rule {rule.id}: {topic}")
        else:
            remedy = "create it, or run check --create" if can.creates_topics else "create it with mqadmin"
            typer.echo(f"PROBLEM  rule {rule.id}: {topic} does not exist: {remedy}")
            return _PROBLEMS
    except BridgeError as error:
        hint = _ADDRESS_HINT if isinstance(error, NotConnectedError) and can.maps_addresses else ""
        typer.echo(f"PROBLEM  rule {rule.id}: {topic}: {error}{hint}")
        return _PROBLEMS
    return _OK


async def _use(rule: Rule, topic: str, link: RocketLink, settings: Settings) -> str:
    """Return how the bridge may use a topic of the rule, as far as the driver can find out.

    Raises:
        BridgeError: it may not, or that cannot be learnt now.
    """
    can = driver_of(settings.rocketmq).capabilities
    if isinstance(rule, InboundRule) and topic == rule.source:
        group = rule.consumer_group(settings.node)
        await link.require_reading(topic, group)
        return f"may be read in group {group}" if can.proves_reading else "whether it may be read is not known"
    await link.require_writing(topic)
    return "may be written" if can.proves_writing else "whether it may be written is not known"

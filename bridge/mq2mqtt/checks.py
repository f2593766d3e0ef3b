"""`mq2mqtt check`: does the configuration fit the RocketMQ and the PostgreSQL it names?"""

import secrets
from pathlib import Path

import typer

from mq2mqtt.errors import BridgeError, LinkError, NotConnectedError
from mq2mqtt.link import RocketLink
from mq2mqtt.link.drivers import open_link
from mq2mqtt.rules import InboundRule, Rule
from mq2mqtt.settings import Settings
from mq2mqtt.store.sql import reach

__all__ = ["check"]

_OK, _PROBLEMS = 0, 1
# The name server has answered, so this is about a broker.
_ADDRESS_HINT = "; if this machine reaches that broker at another address, say so in rocketmq.address_map"


async def check(settings: Settings, path: Path, *, create: bool) -> int:
    """Print one line per finding; return the exit code. `create` makes the topics that are missing."""
    rules = settings.rules
    typer.echo(f"ok       {path}: valid, {len(rules)} rule{'' if len(rules) == 1 else 's'}")
    return max(await _check_store(settings), await _check_rocketmq(settings, create=create))


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
    await link.start()
    try:
        # Any topic will do: the name server's answer counts.
        await link.topic_exists("TBW102")
        if not rules:
            typer.echo(f"ok       rocketmq.namesrv {settings.rocketmq.namesrv} answers; there are no rules")
        return await _check_rules(settings, link, create=create)
    except LinkError as error:
        typer.echo(f"PROBLEM  rocketmq.namesrv {settings.rocketmq.namesrv}: {error}")
        return _PROBLEMS
    finally:
        await link.close()


async def _check_rules(settings: Settings, link: RocketLink, *, create: bool) -> int:
    code = _OK
    for rule in settings.rules:
        code = max(code, await _check_topic(rule, rule.rocketmq_topic, link, settings.node, create=create))
        if isinstance(rule, InboundRule) and rule.receipts is not None:
            code = max(code, await _check_topic(rule, rule.receipts, link, settings.node, create=create))
    return code


async def _check_topic(rule: Rule, name: str, link: RocketLink, node: str, *, create: bool) -> int:
    topic = f"RocketMQ topic {name}"
    try:
        if await link.topic_exists(name):
            use = await _use(rule, name, link, node)
            typer.echo(f"ok       rule {rule.id}: {topic} exists, and {use}")
        elif create:
            await link.create_topic(name)
            typer.echo(f"created  rule {rule.id}: {topic}")
        else:
            typer.echo(f"PROBLEM  rule {rule.id}: {topic} does not exist: create it, or run check --create")
            return _PROBLEMS
    except BridgeError as error:
        hint = _ADDRESS_HINT if isinstance(error, NotConnectedError) else ""
        typer.echo(f"PROBLEM  rule {rule.id}: {topic}: {error}{hint}")
        return _PROBLEMS
    return _OK


async def _use(rule: Rule, topic: str, link: RocketLink, node: str) -> str:
    """Return how the bridge may use a topic of the rule.

    Raises:
        BridgeError: it may not, or that cannot be learnt now.
    """
    if isinstance(rule, InboundRule) and topic == rule.source:
        group = rule.consumer_group(node)
        await link.require_reading(topic, group)
        return f"may be read in group {group}"
    await link.require_writing(topic)
    return "may be written"

"""`mq2mqtt check`: does the configuration fit the RocketMQ it names?"""

import secrets
from pathlib import Path

import typer

from mq2mqtt.bridge import build_link
from mq2mqtt.errors import LinkError
from mq2mqtt.link import RocketLink
from mq2mqtt.settings import Settings

__all__ = ["check"]

_OK, _PROBLEMS = 0, 1


async def check(settings: Settings, path: Path, *, create: bool) -> int:
    """Print one line per finding; return the exit code. `create` makes the topics that are missing."""
    rules = settings.rules
    typer.echo(f"ok       {path}: valid, {len(rules)} rule{'' if len(rules) == 1 else 's'}")
    link = build_link(settings, client_id=f"mq2mqtt@check@{secrets.token_hex(6)}")
    await link.start()
    try:
        return await _check_topics(settings, link, create=create)
    except LinkError as error:
        typer.echo(f"PROBLEM  rocketmq.namesrv {settings.rocketmq.namesrv}: {error}")
        return _PROBLEMS
    finally:
        await link.close()


async def _check_topics(settings: Settings, link: RocketLink, *, create: bool) -> int:
    code = _OK
    checked: set[str] = set()
    for rule in settings.rules:
        topic = rule.rocketmq_topic
        if topic in checked:
            continue
        checked.add(topic)
        if await link.topic_exists(topic):
            typer.echo(f"ok       rule {rule.id}: RocketMQ topic {topic} exists")
        elif create:
            await link.create_topic(topic)
            typer.echo(f"created  rule {rule.id}: RocketMQ topic {topic}")
        else:
            typer.echo(
                f"PROBLEM  rule {rule.id}: RocketMQ topic {topic} does not exist: create it, or run check --create"
            )
            code = _PROBLEMS
    if not settings.rules:
        await link.topic_exists("TBW102")
        typer.echo(f"ok       rocketmq.namesrv {settings.rocketmq.namesrv} answers; there are no rules")
    return code

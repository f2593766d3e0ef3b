"""What a configuration needs and its driver can't do: refused when the bridge starts, and when rules change."""

from collections.abc import Iterable, Iterator

from mq2mqtt.errors import ConfigError
from mq2mqtt.link.capabilities import Capability
from mq2mqtt.link.drivers import driver_of
from mq2mqtt.rules import InboundRule, Rule, rule_location
from mq2mqtt.settings import RocketMQSettings

__all__ = ["refusals", "require_capabilities"]


def refusals(settings: RocketMQSettings, rules: Iterable[Rule]) -> list[str]:
    """Return one line for each thing that the driver of `settings` can't do for them and for `rules`.

    A rule that is disabled counts too: what waits in its lane is sent.
    """
    driver = driver_of(settings)
    missing = {capability.name: capability for capability in driver.capabilities.missing}
    needs = [(f"rocketmq.{field}", name) for field, name in _settings_needs(settings)]
    for index, rule in enumerate(rules):
        needs += [(f"{rule_location(index, rule.id)}: {field}", name) for field, name in _rule_needs(rule)]
    return [_line(where, driver.name, missing[name]) for where, name in needs if name in missing]


def require_capabilities(settings: RocketMQSettings, rules: Iterable[Rule]) -> None:
    """Return where there are no `refusals`.

    Raises:
        ConfigError: there are; one line for each.
    """
    if lines := refusals(settings, rules):
        raise ConfigError("\n".join(lines))


def _settings_needs(settings: RocketMQSettings) -> Iterator[tuple[str, str]]:
    """Yield field and capability."""
    if settings.access_key is not None:
        yield "access_key", "uses_access_keys"
    if settings.tls:
        yield "tls", "uses_tls"
    if settings.address_map:
        yield "address_map", "maps_addresses"


def _rule_needs(rule: Rule) -> Iterator[tuple[str, str]]:
    """Yield field and capability."""
    if not isinstance(rule, InboundRule):
        yield "type", "keeps_order"
        return
    yield "type", "receives_in_order"
    # Who asks for the latest is not harmed by more.
    if rule.start == "earliest":
        yield "from", "starts_earliest"
    if rule.group is not None:
        yield "group", "shares_groups"
    if rule.receipts is not None:
        yield "receipts", "keeps_order"


def _line(where: str, driver: str, lacks: Capability) -> str:
    return f"{where}: rocketmq.driver {driver} can't do this: {lacks.means} Change it or the driver: docs/drivers.md"

"""The bridge on the MQTT broker that this run of the tests is about (`--host`)."""

from pathlib import Path
from typing import Any, Final

from tests.bridge_process import BridgeProcess
from tests.mosquitto_bridge import MosquittoBridge

HOSTS: Final = ("amqtt", "mosquitto")

_chosen = [HOSTS[0]]


def choose_host(name: str) -> None:
    """Have `new_bridge` use this broker from now on."""
    _chosen[0] = name


def host() -> str:
    """Name the broker that `new_bridge` uses."""
    return _chosen[0]


def on_amqtt() -> bool:
    """Whether that broker is amqtt: the two differ in what docs/mosquitto.md lists."""
    return host() == "amqtt"


def new_bridge(directory: Path, *, namesrv: str, rules: list[dict[str, Any]]) -> BridgeProcess:
    """Make a bridge on that broker, not yet started."""
    kind = MosquittoBridge if host() == "mosquitto" else BridgeProcess
    return kind(directory, namesrv=namesrv, rules=rules)

"""What an operator sees of a driver, and that the bridge keeps its promises with each: `scripts/test --driver NAME`."""

import asyncio
import uuid
from pathlib import Path
from typing import Any

import pytest

from mq2mqtt.link.drivers import DRIVERS, library
from mq2mqtt.quickstart.drivers import make_group, make_topic
from mq2mqtt.settings import RocketMQSettings
from tests.bridge_process import BridgeProcess, wait_for
from tests.device import Device
from tests.rocket_peer import RocketPeer

pytestmark = pytest.mark.e2e

_PUBLISHED = 600
_SENT = 60


class Scene:
    """A bridge with one rule each way; `missing` is a topic that nobody made."""

    def __init__(self, directory: Path, settings: RocketMQSettings) -> None:
        name = uuid.uuid4().hex[:12]
        self.settings = settings
        self.out, self.into, self.missing = f"out_{name}", f"in_{name}", f"missing_{name}"
        self.rules: list[dict[str, Any]] = [
            {"id": f"out-{name}", "type": "outbound", "source": "sensors", "target": self.out},
            {"id": f"in-{name}", "type": "inbound", "source": self.into, "target": "devices"},
        ]
        self.bridge = BridgeProcess(directory, namesrv=settings.namesrv, rules=self.rules)
        self.bridge.config["rocketmq"] = settings.model_dump(exclude_none=True)
        for topic in (self.out, self.into):
            asyncio.run(make_topic(settings.driver, settings.namesrv, topic))
        self.group = f"GID_mq2mqtt_in-{name}_test"
        asyncio.run(make_group(settings.driver, settings.namesrv, self.group))

    def check(self, *options: str) -> tuple[int, list[str]]:
        """What `mq2mqtt check` ends with, and says."""
        self.bridge.write_config()
        checked = self.bridge.command("check", *options)
        assert checked.stderr == ""
        return checked.returncode, checked.stdout.splitlines()


@pytest.fixture
def scene(tmp_path: Path, link_settings: RocketMQSettings) -> Any:  # noqa: ANN401 - an iterator
    scene = Scene(tmp_path / "bridge", link_settings)
    yield scene
    scene.bridge.kill()


def test_check_shows_the_driver_and_what_it_lacks(scene: Scene) -> None:
    driver = DRIVERS[scene.settings.driver]
    code, lines = scene.check()
    assert (code, [line for line in lines if line.startswith("PROBLEM")]) == (0, [])
    assert f"ok       rocketmq.driver {driver.name}: {library(driver)}" in lines
    assert [line for line in lines if line.startswith("lacks")] == [
        f"lacks    rocketmq.driver {driver.name}: {lacks.name}: {lacks.without}"
        for lacks in driver.capabilities.missing
    ]
    can = driver.capabilities
    written, read = (line for line in lines if line.startswith("ok       rule"))
    assert written.endswith("may be written" if can.proves_writing else "whether it may be written is not known")
    assert read.endswith(f"may be read in group {scene.group}" if can.proves_reading else "is not known")


def test_check_names_a_missing_topic_and_creates_it_where_the_driver_can(scene: Scene) -> None:
    scene.bridge.config["rules"] = [{**scene.rules[0], "target": scene.missing}]
    code, lines = scene.check("--create")
    topic = f"rule {scene.rules[0]['id']}: RocketMQ topic {scene.missing}"
    if DRIVERS[scene.settings.driver].capabilities.creates_topics:
        assert (code, lines[-1]) == (0, f"created  {topic}")
    else:
        assert (code, lines[-1]) == (1, f"PROBLEM  {topic} does not exist: create it with mqadmin")


def test_the_lag_is_told_by_drivers_that_know_it_and_by_no_other(scene: Scene) -> None:
    scene.bridge.start()
    knows = DRIVERS[scene.settings.driver].capabilities.shows_lag
    assert ("mq2mqtt_consumer_lag{" in scene.bridge.get("/metrics")[1]) == knows


def test_a_bridge_that_is_killed_loses_nothing_and_keeps_the_order(scene: Scene) -> None:
    bridge = scene.bridge
    bridge.start()
    with RocketPeer(scene.settings.namesrv) as peer, peer.collect_bodies(scene.out) as bodies:
        with Device(bridge.mqtt_port, "orderly", clean=False, reconnects=True) as device:
            for number in range(_PUBLISHED):
                device.publish("sensors/n", b"%d" % number, qos=1, wait=False)
            wait_for(lambda: bodies, what="nothing reaches RocketMQ")
            bridge.kill()
            bridge.start()
            device.wait_published()
        wait_for(lambda: len(set(bodies)) == _PUBLISHED, seconds=60, what=lambda: f"{len(set(bodies))} arrived")
    # What comes twice is a repetition of what had come before.
    assert list(dict.fromkeys(bodies)) == [b"%d" % number for number in range(_PUBLISHED)]


def test_what_a_killed_bridge_had_not_delivered_is_delivered(scene: Scene) -> None:
    bridge = scene.bridge
    bridge.start()
    with RocketPeer(scene.settings.namesrv) as peer, Device(bridge.mqtt_port, "GID_dev@@@1", reconnects=True) as device:
        for number in range(_SENT):
            properties = {"mqttSecondTopic": "/p2p/GID_dev@@@1", "cleansessionflag": "false"}
            peer.send(scene.into, b"%d" % number, **properties)
            if number == _SENT // 2:
                wait_for(lambda: device.received, what="nothing reaches the device")
                bridge.kill()
        bridge.start()
        wait_for(
            lambda: len({message.payload for message in device.received}) == _SENT,
            seconds=90,
            what=lambda: f"{len(device.received)} of {_SENT} came",
        )

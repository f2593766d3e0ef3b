"""The host beside a real Mosquitto with the hook: what it makes of the hook's answers."""

import itertools
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from mq2mqtt.host import CLIENT_EVENTS
from mq2mqtt.message import ClientEvent
from mq2mqtt.presence import Connection, Journal, Presence
from mq2mqtt.settings import Settings
from mq2mqtt.spool.follower import FollowedLane
from mq2mqtt.spool.reader import LaneReader
from mq2mqtt_mosquitto.host import MosquittoHost
from tests.e2e.hook.mosquitto import says_why
from tests.mosquitto import TOKEN, Mosquitto
from tests.mqtt_client import Client, publish_packet
from tests.plain_mosquitto import PlainMosquitto
from tests.unit.amqtt.world import ListIntake, until

LIMIT = 64 << 10


class Hosts:
    """One host after another for one broker, each for the outbound rules `<source>-out`."""

    def __init__(self, url: str, spool: Path) -> None:
        self._url = url
        self.spool = spool
        self.host: MosquittoHost

    def _settings(self, sources: tuple[str, ...]) -> Settings:
        values: dict[str, Any] = {
            "host": {"url": self._url, "token": TOKEN},
            "spool": {"path": self.spool, "max_bytes": LIMIT},
            "rules": [{"id": f"{name}-out", "type": "outbound", "source": name, "target": "t"} for name in sources],
        }
        return Settings(**values)

    def new_host(self, *sources: str) -> None:
        self.host = MosquittoHost(self._settings(sources))
        self.go_by(*sources)

    async def start(self, *sources: str) -> None:
        self.new_host(*sources)
        self.host.start()
        await until(lambda: self.host.problem is None)

    def go_by(self, *sources: str) -> None:
        self.host.go_by(self._settings(sources).rule_set)

    def lane(self, source: str) -> FollowedLane | None:
        path = self.spool / f"{source}-out"
        return FollowedLane.open(path, max_bytes=LIMIT, target="t", watcher=self.host.watcher)


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Mosquitto]:
    broker = Mosquitto(tmp_path, spool=tmp_path / "spool")
    broker.start()
    yield broker
    broker.kill()


@pytest.fixture
async def hosts(broker: Mosquitto) -> AsyncIterator[Hosts]:
    hosts = Hosts(broker.url, broker.spool)
    yield hosts
    await hosts.host.stop()


async def test_a_lane_is_told_while_it_is_full(hosts: Hosts, broker: Mosquitto) -> None:
    await hosts.start("full", "other")
    device = await Client.connect(broker.port, "device")
    for number in range(1, 80):
        device.send(publish_packet("full/x", bytes(1000), qos=1, packet_id=number))
    await until(lambda: "bytes are unsent, max_bytes is 65536" in (hosts.host.problem_of("full-out") or ""))
    assert hosts.host.problem_of("other-out") is None
    lane = hosts.lane("full")
    assert lane is not None
    reader = LaneReader(lane)
    reader.settle([entry.offset for entry in reader.read(max_messages=1000)])
    await until(lambda: hosts.host.problem_of("full-out") is None)
    reader.close()
    lane.close()
    await device.drop()


async def test_it_is_told_that_client_events_cannot_be_read(hosts: Hosts, broker: Mosquitto) -> None:
    await hosts.start("a")
    assert hosts.host.problem_of(CLIENT_EVENTS) is None
    await hosts.host.stop()
    device = await Client.connect(broker.port, "device")
    (segment,) = (hosts.spool / CLIENT_EVENTS).glob("*.seg")
    sound = segment.read_bytes()
    with segment.open("r+b") as file:
        file.seek(-20, 2)
        file.write(b"?")
    other = await Client.connect(broker.port, "other")
    await hosts.start("a")
    await until(lambda: str(segment) in (hosts.host.problem_of(CLIENT_EVENTS) or ""))
    assert hosts.host.hears_late
    with segment.open("r+b") as file:
        file.write(sound)
    await until(lambda: not hosts.host.hears_late)
    for client in (device, other):
        await client.drop()


async def test_news_comes_when_a_lane_is_begun(hosts: Hosts) -> None:
    await hosts.start("first")
    begun: list[bool] = []
    hosts.host.changed = lambda: begun.append((hosts.spool / "second-out").is_dir())
    hosts.go_by("first", "second")
    # News of the first lane may come before.
    await until(lambda: begun[-1:] == [True])
    lane = hosts.lane("second")
    assert lane is not None
    lane.close()


async def test_subscriptions_for_wills_end_with_their_rules(hosts: Hosts, broker: Mosquitto) -> None:
    def ended() -> list[str]:
        lines = [line.partition(": ")[2] for line in broker.log_file.read_text().splitlines()]
        return [after.strip() for line, after in itertools.pairwise(lines) if "Received UNSUB" in line]

    await hosts.start("a", "b", "c")
    hosts.go_by("a", "b")
    await until(lambda: ended() == ["c/#"])
    await hosts.host.stop()
    # The broker has kept the session.
    await hosts.start("b", "d")
    await until(lambda: ended() == ["c/#", "a/#"])


async def test_the_reason_while_there_is_no_hook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mq2mqtt_mosquitto.session._ANSWER_SECONDS", 0.2)
    spool = tmp_path / "spool"
    stranger = Mosquitto(tmp_path / "hook", spool=spool, options=("plugin_opt_sidecar_client_id another",))
    for broker, problem in (
        (stranger, "Not authorized; its sidecar_client_id must be host.client_id, mq2mqtt-sidecar"),
        (PlainMosquitto(tmp_path / "plain"), "no hook answers: load its plugin in mosquitto.conf"),
    ):
        broker.start()
        hosts = Hosts(broker.url, spool)
        hosts.new_host()
        hosts.host.start()
        await until(lambda hosts=hosts, problem=problem: problem in (hosts.host.problem or ""))  # type: ignore[misc]
        await hosts.host.stop()
        broker.kill()


class Lives:
    """What listeners of the core are told: comings, and goings with their reasons; over all lives of the core."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.came: list[Connection] = []
        self.went: list[tuple[Connection, str]] = []
        self.presence = Presence()

    def begin(self) -> Presence:
        """Begin another life: it knows what the journal says."""
        self.presence.close()
        self.presence = Presence(Journal(self._directory), node="test")
        self.presence.listen(came=self.came.append, gone=lambda one, _ms, reason: self.went.append((one, reason)))
        self.presence.start(lives_on=True)
        return self.presence

    def reasons(self, client_id: str) -> list[str]:
        return [reason for connection, reason in self.went if connection.client_id == client_id]

    @property
    def open(self) -> set[str]:
        return set(self.presence.connections)


class PresenceIntake(ListIntake):
    def __init__(self, presence: Presence) -> None:
        super().__init__()
        self._presence = presence

    def on_client_event(self, event: ClientEvent) -> None:
        self._presence.take(event)


def _new_life(hosts: Hosts, lives: Lives) -> None:
    """Begin another sidecar."""
    presence = lives.begin()
    hosts.new_host("a")
    hosts.host.follow(presence)
    hosts.host.intake = PresenceIntake(presence)
    hosts.host.start()


async def test_every_connection_is_told_once_whoever_was_away(hosts: Hosts, broker: Mosquitto, tmp_path: Path) -> None:
    lives = Lives(tmp_path / "presence")
    _new_life(hosts, lives)
    devices = {name: await Client.connect(broker.port, name, clean=False) for name in ("stays", "leaves", "taken")}
    await until(lambda: lives.open == set(devices))
    await hosts.host.stop()

    await devices["leaves"].disconnect()
    short = await Client.connect(broker.port, "short")
    short.abort()
    again = await Client.connect(broker.port, "taken")
    await again.ping()
    _new_life(hosts, lives)
    await until(lambda: lives.open == {"stays", "taken"} and lives.reasons("taken") == ["clientId conflict"])
    why = ("disconnected by client", "closed by client") if says_why() else ("unknown", "unknown")
    assert (lives.reasons("leaves"), lives.reasons("short")) == ([why[0]], [why[1]])
    assert [connection.clean_session for connection in lives.came if connection.client_id == "taken"] == [False, True]

    # Broker and sidecar at once.
    broker.kill()
    await hosts.host.stop()
    broker.start()
    later = await Client.connect(broker.port, "later")
    _new_life(hosts, lives)
    await until(lambda: lives.open == {"later"})
    broker.stop()
    await until(lambda: lives.open == set())
    assert [lives.reasons(name)[-1] for name in ("stays", "taken", "later")] == [
        "broker restarted",
        "broker restarted",
        "broker stopped",
    ]
    channels = [connection.channel_id for connection in lives.came]
    assert len(channels) == len(set(channels)) == 6
    assert sorted(connection.channel_id for connection, _ in lives.went) == sorted(channels)
    for device in (*devices.values(), again, later):
        await device.drop()
    lives.presence.close()

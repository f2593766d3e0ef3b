"""A bridge with traffic in both directions while something happens to its RocketMQ."""

import contextlib
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from mq2mqtt.errors import LinkError
from tests.bridge_process import BridgeProcess, wait_for
from tests.device import Device
from tests.faults.report import FaultRow, FaultTable, assert_invariants
from tests.new_bridge import new_bridge
from tests.rocket_peer import RocketPeer
from tests.stream import Stream
from tests.waiting import PATIENCE

TOLD_SECONDS = 5.0 * PATIENCE
"""How soon `/readyz` and `mq2mqtt_rule_up` say that a rule cannot work."""
_STALL_SECONDS = 8.0
"""A publisher's longest wait, below that of the faults. A quiet machine stays far below it, a busy one has pauses."""
_ARRIVAL_SECONDS = 90.0

Told = Mapping[str, tuple[float, str]]
"""By rule: seconds from the fault until it was told down, and the reason."""


class Uplink:
    """A device's stream into one outbound rule."""

    def __init__(self, rule_id: str, *, qos: int, rate: float) -> None:
        self.rule_id = rule_id
        self.topic = f"{rule_id}_{uuid.uuid4().hex[:12]}"
        self.traffic = f"uplink QoS {qos}, {rate:g}/s"
        self.gone = 0
        """So many messages, from the first on, were deleted together with the topic that had stored them."""
        self._qos = qos
        self._rate = rate
        self.stream: Stream | None = None

    @property
    def rule(self) -> dict[str, Any]:
        return {"id": self.rule_id, "type": "outbound", "source": self.rule_id, "target": self.topic}

    @property
    def queues(self) -> int:
        return 4

    def start(self, bridge: BridgeProcess, _: RocketPeer) -> None:
        client_id = f"GID_{self.rule_id}@@@1"
        topic = f"{self.rule_id}/x"
        self.stream = Stream(bridge.mqtt_port, topic, rate=self._rate, qos=self._qos, client_id=client_id)
        self.stream.start()

    @property
    def acknowledged(self) -> int:
        return len(self.stream.acknowledged) if self.stream else 0

    def stop(self) -> None:
        if self.stream is not None:
            self.stream.stop()

    def row(self, fault: str, peer: RocketPeer, *, told: tuple[float, str] | None) -> FaultRow:
        """Wait until everything acknowledged has arrived, and count."""
        assert self.stream is not None
        acknowledged = self.stream.acknowledged
        gone = [b"%d" % number for number in range(self.gone)]
        with peer.collect(self.topic) as messages:
            wait_for(
                lambda: acknowledged <= {*gone, *(message.body for message in messages)},
                seconds=_ARRIVAL_SECONDS,
                what=lambda: f"{self.topic}: {len(messages)} messages of {len(acknowledged)}",
            )
            arrivals = [*gone, *(message.body for message in messages)]
        return _row(self, fault, acknowledged, arrivals, stall=self.stream.longest_stall, told=told)


class Downlink:
    """A RocketMQ application that sends to a device through one inbound rule, one message after another."""

    def __init__(self, rule_id: str, *, rate: float) -> None:
        self.rule_id = rule_id
        self.topic = f"{rule_id}_{uuid.uuid4().hex[:12]}"
        self.traffic = f"downlink QoS 1, {rate:g}/s"
        self._interval = 1 / rate
        self._stopping = threading.Event()
        self._sending = threading.Event()
        self._sending.set()
        self._on_its_way = threading.Lock()
        self._thread: threading.Thread | None = None
        self._bridge: BridgeProcess | None = None
        self._devices: list[Device] = []
        self._acknowledged: list[bytes] = []

    @property
    def rule(self) -> dict[str, Any]:
        return {"id": self.rule_id, "type": "inbound", "source": self.topic, "target": self.rule_id}

    @property
    def queues(self) -> int:
        # Order is promised within a queue.
        return 1

    def start(self, bridge: BridgeProcess, peer: RocketPeer) -> None:
        self._bridge = bridge
        self.connect()
        self._thread = threading.Thread(target=self._send, args=(peer,), name=f"send {self.topic}", daemon=True)
        self._thread.start()

    def connect(self) -> None:
        """Connect the device, again after its broker had ended, and subscribe."""
        assert self._bridge is not None
        self._devices.append(Device(self._bridge.mqtt_port, f"GID_{self.rule_id}@@@1"))
        self._devices[-1].connect()
        self._devices[-1].subscribe(f"{self.rule_id}/#", qos=1)

    def disconnect(self) -> None:
        for device in self._devices:
            device.client.disconnect()
            device.client.loop_stop()

    def pause(self) -> None:
        """Send nothing until `resume`, and wait until everything sent has arrived."""
        self._sending.clear()
        with self._on_its_way:
            self._wait_arrived()

    def resume(self) -> None:
        self._sending.set()

    def send_burst(self, peer: RocketPeer, count: int) -> None:
        """Send `count` messages as one batch, while paused."""
        first = len(self._acknowledged)
        bodies = [b"%d" % number for number in range(first, first + count)]
        peer.send_many(self.topic, bodies, mqttSecondTopic="/x")
        self._acknowledged += bodies

    @property
    def has_arrived(self) -> bool:
        """Whether the device has got all that was sent."""
        return set(self._acknowledged) <= set(self.arrivals)

    def _wait_arrived(self) -> set[bytes]:
        acknowledged = set(self._acknowledged)
        wait_for(
            lambda: acknowledged <= set(self.arrivals),
            seconds=_ARRIVAL_SECONDS,
            what=lambda: f"{self.topic}: {len(self.arrivals)} messages of {len(acknowledged)}",
        )
        return acknowledged

    def _send(self, peer: RocketPeer) -> None:
        while not self._stopping.wait(self._interval):
            self._sending.wait()
            with self._on_its_way:
                if self._sending.is_set():
                    self._send_next(peer)

    def _send_next(self, peer: RocketPeer) -> None:
        body = b"%d" % len(self._acknowledged)
        # Where it is not known to be stored, the same is next: a duplicate that comes of it is counted as one.
        with contextlib.suppress(LinkError):
            peer.send(self.topic, body, mqttSecondTopic="/x")
            self._acknowledged.append(body)

    @property
    def acknowledged(self) -> int:
        return len(self._acknowledged)

    @property
    def arrivals(self) -> list[bytes]:
        return [bytes(message.payload) for device in self._devices for message in device.received]

    def stop(self) -> None:
        self._stopping.set()
        self._sending.set()
        if self._thread is not None:
            self._thread.join()

    def row(self, fault: str, _: RocketPeer, *, told: tuple[float, str] | None) -> FaultRow:
        """Wait until everything acknowledged has arrived, and count."""
        acknowledged = self._wait_arrived()
        return _row(self, fault, acknowledged, self.arrivals, stall=None, told=told)


Traffic = Uplink | Downlink


class Scene:
    """A bridge and its traffic. Use as a context manager: what was started ends with it.

    `namesrv` and `rocketmq` (more of that section of the configuration) are the bridge's; `peer` has its own way to
    the same RocketMQ. `idle` rules carry nothing.
    """

    def __init__(  # noqa: PLR0913 - keyword-only, each a thing of its own
        self,
        directory: Path,
        *,
        namesrv: str,
        peer: RocketPeer,
        traffic: Sequence[Traffic],
        idle: Sequence[Traffic] = (),
        rocketmq: Mapping[str, Any] | None = None,
    ) -> None:
        self._traffic = traffic
        self._idle = idle
        self._peer = peer
        self.bridge = new_bridge(directory, namesrv=namesrv, rules=[one.rule for one in (*traffic, *idle)])
        self.bridge.config["rocketmq"].update(rocketmq or {})
        # A group of its own: a broker that was paused remembers members of closed connections for 2 minutes.
        self.bridge.config["node"] = uuid.uuid4().hex[:12]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for one in self._traffic:
            if isinstance(one, Uplink) and one.stream is not None:
                one.stream.give_up()
            elif isinstance(one, Downlink):
                one.stop()
                one.disconnect()
        self.bridge.kill()

    def start(self) -> None:
        """Make the topics, start the bridge and all traffic, and wait until all of it flows."""
        for one in (*self._traffic, *self._idle):
            self._peer.create_topic(one.topic, queues=one.queues)
        self.bridge.start()
        for one in self._traffic:
            one.start(self.bridge, self._peer)
        self.wait_flow()

    def wait_flow(self, only: Iterable[Traffic] = (), *, messages: int = 50) -> None:
        """Wait until every rule (or `only` those) has carried `messages` more to the other end."""
        before = {one.rule_id: self.carried(one) for one in only or self._traffic}
        for one in only or self._traffic:
            enough = before[one.rule_id] + messages
            wait_for(lambda: self.carried(one) >= enough, seconds=60, what=self.bridge.log)  # noqa: B023 - done at once

    def carried(self, one: Traffic) -> float:
        outcome = "sent" if isinstance(one, Uplink) else "delivered"
        return self.bridge.metric("mq2mqtt_messages_total", rule=one.rule_id, outcome=outcome)

    def wait_told(self, *rule_ids: str, since: float) -> Told:
        """Wait until these rules are told down, with a reason, all within `TOLD_SECONDS` after `since` (monotonic)."""
        told: dict[str, tuple[float, str]] = {}
        while len(told) < len(rule_ids):
            readiness = self.bridge.readiness()
            now = time.monotonic() - since
            for rule_id in rule_ids:
                if readiness[rule_id]["state"] == "down" and rule_id not in told:
                    told[rule_id] = (now, readiness[rule_id]["reason"])
                    assert self.bridge.metric("mq2mqtt_rule_up", rule=rule_id) == 0
            missing = set(rule_ids) - told.keys()
            assert not missing or now < TOLD_SECONDS + 10, f"{missing} not told down after {now:.1f} s"
            time.sleep(0.05)
        late = {rule_id: one for rule_id, one in told.items() if one[0] > TOLD_SECONDS}
        assert not late, late
        assert all(reason for _, reason in told.values())
        return told

    def assert_down(self, *rule_ids: str) -> None:
        """These rules, and no others, are down."""
        readiness = self.bridge.readiness()
        assert {rule_id for rule_id, rule in readiness.items() if rule["state"] == "down"} == set(rule_ids), readiness

    def wait_up(self, *, seconds: float = 60.0) -> None:
        """Wait until every rule is told up, by `/readyz` and by its metric."""
        wait_for(lambda: self.bridge.get("/readyz")[0] == 200, seconds=seconds, what=self.bridge.describe)
        for one in (*self._traffic, *self._idle):
            assert self.bridge.metric("mq2mqtt_rule_up", rule=one.rule_id) == 1

    def finish(
        self, table: FaultTable, fault: str, *, told: Told | None = None, stall_seconds: float = _STALL_SECONDS
    ) -> dict[str, FaultRow]:
        """End the traffic, let everything arrive, check the invariants, and add a row for each kind of traffic.

        Returns the rows by rule.
        """
        self.wait_up()
        self.wait_flow()
        for one in self._traffic:
            one.stop()
        self._wait_settled(lambda: self.bridge.metric("mq2mqtt_lane_messages") == 0)
        rows = {one.rule_id: one.row(fault, self._peer, told=(told or {}).get(one.rule_id)) for one in self._traffic}
        self._wait_settled(lambda: self.bridge.metric("mq2mqtt_in_flight") == 0)
        assert_invariants(self.bridge)
        for row in rows.values():
            table.add(row)
            assert row.longest_stall is None or row.longest_stall < stall_seconds, row
        assert self.bridge.stop() == 0
        assert "Traceback" not in self.bridge.log_file.read_text()
        return rows

    def _wait_settled(self, condition: Callable[[], bool]) -> None:
        wait_for(condition, seconds=_ARRIVAL_SECONDS, what=lambda: self.bridge.get("/metrics")[1])


def _row(  # noqa: PLR0913 - the columns
    one: Traffic,
    fault: str,
    acknowledged: set[bytes],
    arrivals: list[bytes],
    *,
    stall: float | None,
    told: tuple[float, str] | None,
) -> FaultRow:
    told_down, reason = told or (None, "")
    return FaultRow.of(
        fault=fault,
        traffic=one.traffic,
        acknowledged=acknowledged,
        arrivals=arrivals,
        longest_stall=stall,
        told_down=told_down,
        reason=reason,
    )

"""Every decoder of bytes from outside: what it may raise, and bytes to begin from.

The contract is the same for all: return, or raise one of `errors`, within bounded time and memory.
"""

import contextlib
import json
import struct
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from amqtt.errors import AMQTTError, MQTTError

from mq2mqtt import mapping, settings
from mq2mqtt.errors import ConfigError, LaneError, MalformedEventError, UnmappableMessageError
from mq2mqtt.message import ClientEvent, ClientEventType, MqttMessage, MqttProperties
from mq2mqtt.presence import StatusTracker
from mq2mqtt.presence.records import decode_record, encode_record
from mq2mqtt.presence.state import Announced, Came, Connection, Head, Noted, Told
from mq2mqtt.rocketmq.codec import MAX_INFLATED, decode_messages
from mq2mqtt.rocketmq.errors import DecodeError, FrameError
from mq2mqtt.rocketmq.message import ReceivedMessage
from mq2mqtt.rocketmq.properties import decode_properties
from mq2mqtt.rocketmq.remoting import FrameDecoder, encode_request
from mq2mqtt.rocketmq.route import parse_cluster_masters, parse_members, parse_route
from mq2mqtt.settings import Limits
from mq2mqtt.spool import frame as codec
from mq2mqtt.spool.frame import Frame, FrameKind
from mq2mqtt.spool.inspect import read_entries, summarize
from mq2mqtt.spool.lane import Lane
from mq2mqtt.spool.machine import Machine
from mq2mqtt.spool.parked import ParkedStore, list_parked
from mq2mqtt.spool.reader import LaneReader
from mq2mqtt.status import status_body, tag_of
from mq2mqtt_amqtt.announce import decode
from mq2mqtt_amqtt.packets import MalformedPacketError, parse_publish
from mq2mqtt_mosquitto.control import ControlError, decode_answer
from mq2mqtt_mosquitto.presence import Presence
from tests.fuzz.stored import stored_message
from tests.unit.rocketmq.golden import golden_bytes

__all__ = ["TARGETS", "Target"]

_DATA = Path(__file__).parents[1] / "data"
_BOOT = b"b" * 16
_MEMORY = Path("/dev/shm")  # noqa: S108 - a file system without a disk, where there is one


@dataclass(frozen=True)
class Target:
    """One decoder."""

    decode: Callable[[bytes], object]
    errors: tuple[type[Exception], ...]
    """What it documents to raise."""
    seeds: tuple[bytes, ...]

    def check(self, data: bytes) -> None:
        """Decode; any error but the documented ones comes out."""
        with contextlib.suppress(*self.errors):
            self.decode(data)


# -- RocketMQ --


def _remoting(data: bytes) -> None:
    whole = _commands([data])
    # However the stream is cut, it means the same.
    assert whole == _commands([data[: len(data) // 2], data[len(data) // 2 :]])


def _commands(parts: list[bytes]) -> list[object]:
    decoder = FrameDecoder()
    commands = [command for part in parts for command in decoder.feed(part)]
    for command in commands:
        assert all(type(text) is str for pair in command.fields.items() for text in pair)
    return list(commands)


def _stored(data: bytes) -> None:
    for message in decode_messages(data, broker="b", on_error=lambda _: None):
        assert len(message.body) <= MAX_INFLATED
        _to_mqtt(message)


def _properties(data: bytes) -> None:
    text, _, body = data.partition(b"\0\0")
    properties = decode_properties(text.decode(errors="replace"))
    _to_mqtt(ReceivedMessage("mq_commands", body, properties, "b", 0, 1, 2, 3, 4, 0, 0, 0, bytes(8)))


def _to_mqtt(received: ReceivedMessage) -> None:
    try:
        inbound = mapping.to_mqtt(received, parent="devices", limits=Limits())
    except UnmappableMessageError:
        return
    inbound.message.topic.encode()


def _route(data: bytes) -> None:
    route = parse_route("t", data)
    for queue in route.write_queues:
        assert route.master(queue.broker)
    for name in route.brokers:
        assert isinstance(route.reader(name), str | None)


def _masters(data: bytes) -> None:
    assert all(isinstance(address, str) for address in parse_cluster_masters(data).values())


def _members(data: bytes) -> None:
    assert all(isinstance(member, str) for member in parse_members(data))


_ROUTE = json.dumps(
    {
        "brokerDatas": [
            {"brokerAddrs": {"0": "127.0.0.1:10911", "1": "127.0.0.1:10921"}, "brokerName": "a", "cluster": "c"}
        ],
        "queueDatas": [{"brokerName": "a", "perm": 6, "readQueueNums": 4, "writeQueueNums": 4, "topicSysFlag": 0}],
    }
).encode()
_CLUSTER = (
    b'{"brokerAddrTable":{"a":{"brokerAddrs":{0:"127.0.0.1:10911"},"brokerName":"a"}},"clusterAddrTable":{"c":["a"]}}'
)


# -- the spool --


def _frames(data: bytes) -> None:
    frames, ends = codec.decode_frames(data, 0, max_frames=1000)
    assert codec.count_frames(data, 0) == (len(frames), ends[-1] if ends else 0)
    assert b"".join(map(codec.encode, frames)) == data[: ends[-1] if ends else 0]
    codec.problem_at(data, ends[-1] if ends else 0)
    codec.find_frame(data, 1)


def _sound_frame(data: bytes) -> None:
    """A frame whose CRC is right, as another writer may make it, on its way to RocketMQ."""
    buffer = struct.pack("<II", len(data), zlib.crc32(data)) + data
    frames, _ = codec.decode_frames(buffer, 0, max_frames=1)
    for frame in frames:
        mapping.to_rocketmq(frame, node="n", rule_id="r", offset=1, topic="T")


def _lane(data: bytes) -> None:
    """A directory of files: length and content of each of `_LANE_FILES`, one after another; length 65535 for none."""
    with tempfile.TemporaryDirectory(dir=_MEMORY if _MEMORY.is_dir() else None) as directory:
        path = Path(directory) / "rule-a"
        path.mkdir()
        for name, content in _files(data):
            (path / name).write_bytes(content)
        summarize(path)
        with contextlib.suppress(LaneError):
            list(read_entries(path))
        lane = Lane.open(path, max_bytes=1 << 20, target="t", machine=Machine(boot_id=_BOOT))
        try:
            reader = LaneReader(lane)
            while reader.read(max_messages=100):
                reader.settle_to(reader.position)
            reader.close()
        finally:
            lane.close()


def _files(data: bytes) -> list[tuple[str, bytes]]:
    files = []
    for name in _LANE_FILES:
        (size,) = struct.unpack_from("<H", data.ljust(2, b"\0"))
        if size != 0xFFFF:
            files.append((name, data[2 : 2 + size]))
        data = data[2 + size :] if size != 0xFFFF else data[2:]
    return files


def _lane_seeds() -> tuple[tuple[str, ...], tuple[bytes, ...]]:
    """Return the names of the files, and seeds: two segments of one boot and one of the next, some settled."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "rule-a"
        clock = iter(range(1_700_000_000_000_000, 1_700_000_000_001_000))
        for boot_id in (b"a" * 16, _BOOT):
            machine = Machine(now_us=lambda: next(clock), boot_id=boot_id)
            lane = Lane.open(path, max_bytes=8 * 250, target="t", machine=machine)
            for number in range(5):
                lane.append(
                    codec.encode_publish(MqttMessage("s/a", b"%d" % number * 20, client_id="c"), accepted_us=number)
                )
            lane.close()
        reader = LaneReader(lane := Lane.open(path, max_bytes=2000, target="t", machine=machine))
        reader.read(max_messages=2)
        reader.settle_to(reader.position)
        reader.close()
        lane.close()
        files = [path / "lane.json", path / "cursor", *sorted(path.glob("*.seg"))]
        contents = [struct.pack("<H", file.stat().st_size) + file.read_bytes() for file in files]
    without_cursor = [contents[0], b"\xff\xff", *contents[2:]]
    return tuple(file.name for file in files), (b"".join(contents), b"".join(without_cursor))


_LANE_FILES, _LANE_SEEDS = _lane_seeds()


def _parked(data: bytes) -> None:
    with tempfile.TemporaryDirectory(dir=_MEMORY if _MEMORY.is_dir() else None) as directory:
        parked = Path(directory) / "parked"
        parked.mkdir()
        (parked / "1.parked").write_bytes(data)
        ParkedStore(Path(directory), max_bytes=1 << 20)
        list_parked(Path(directory))


_FRAMES = tuple(bytes.fromhex(vector["frame_hex"]) for vector in json.loads((_DATA / "frames_v1.json").read_bytes()))
_PUBLISH = codec.encode_publish(
    MqttMessage("s/a", b"{}", client_id="c", properties=MqttProperties("json", 9, (("k", "v"),))), accepted_us=1
)
_RECORD = codec.encode(Frame(FrameKind.PARKED, 0, 1, "7", "why", b"", _PUBLISH))


# -- MQTT --


def _publish(data: bytes) -> None:
    parse_publish(data[0] & 0x0F if data else 0, data[1:])


def _packet(data: bytes) -> None:
    if data:
        decode(data[0], data[1:])


_PACKETS = (
    b"\x10\0\4MQTT\4\xee\0\x3c\0\3dev\0\1w\0\3bye\0\4user\0\4pass",
    b"\x82\0\1\0\3a/b\1\0\1#\2",
    b"\xa2\0\1\0\3a/b",
    b"\x32\0\3a/b\0\1body",
    b"\x62\0\1",
    b"\x40\0\1",
    b"\xe0",
    b"\xc0",
)


# -- the sidecar --


def _client_event(data: bytes) -> None:
    told: list[ClientEvent] = []
    presence = Presence(tell=told.append, ask=lambda: None, ended=lambda *_: None)
    presence.take(1, Frame(FrameKind.EVENT, 0, 0, "dev", "", b"", data))
    assert len(told) <= 1


_ANSWERS = tuple(
    bytes.fromhex(vector["bytes"]) for vector in json.loads((_DATA / "control_v1.json").read_text())["answers"]
)
_EVENT = b'{"type":"connect","channelId":"0-1","clientIp":"::1","time":1,"cleanSession":true}'


# -- client status --


def _status(data: bytes) -> None:
    StatusTracker().feed(data)


def _journal(data: bytes) -> None:
    decode_record(Frame(FrameKind.EVENT, 0, 0, "", "", b"", data))


_STATUS = status_body(ClientEvent(ClientEventType.CONNECT, "GID_d@@@1", "c1", "ip", 1), seq=7, epoch=1, node="n")
_CONNECTION = Connection("GID_d@@@1", "c1", "ip", 1)
_TOLD = Told("presence", 1, ClientEventType.CONNECT, _CONNECTION, 1, 7, 1)
_JOURNAL = tuple(
    codec.decode_frames(encode_record(record), 0, max_frames=1)[0][0].payload
    for record in (Head(1, 1, -1, 1), Came(_CONNECTION, 5), _TOLD, Noted(_TOLD, Announced(_CONNECTION, 2, stale=True)))
)


# -- settings --


def _settings(data: bytes) -> None:
    with tempfile.NamedTemporaryFile(suffix=".yaml", dir=_MEMORY if _MEMORY.is_dir() else None) as file:
        file.write(data)
        file.flush()
        settings.load(file.name)


_YAML = b"""node: default
rocketmq: {namesrv: "127.0.0.1:9876"}
spool: {path: var, max_bytes: 1GiB}
mqtt: {amqtt: {a: &x [1, 2.5, 2001-01-01, !!int "3", null], b: *x, c: {<<: {d: 1}}}}
rules:
  - {id: telemetry, type: outbound, source: sensors, target: mq_sensors}
  - {id: commands, type: inbound, source: mq_commands, target: devices, tags: "*"}
"""

TARGETS: dict[str, Target] = {
    "remoting": Target(
        _remoting,
        (FrameError,),
        (golden_bytes("response_json"), golden_bytes("response_binary"), encode_request(10, 1, {"a": "b"}, b"body")),
    ),
    "stored": Target(
        _stored,
        (DecodeError,),
        (
            golden_bytes("stored_plain"),
            golden_bytes("stored_v6both"),
            *(golden_bytes(f"stored_{kind}") for kind in ("zlib", "lz4", "zstd")),
            golden_bytes("stored_plain") + golden_bytes("stored_zlib"),
            stored_message(zlib.compress(b"z" * 99), 1),
        ),
    ),
    "properties": Target(
        _properties,
        (),
        (
            golden_bytes("properties"),
            b"mqttSecondTopic\1/p2p/c\2qoslevel\0011\2cleansessionflag\1false\2\0\0body",
            b"mqttRealTopic\1devices/x\2mqtt5MsgExpireInterval\0019\2mqtt5ContentType\1json\2",
            b'mqtt5UserProperty\1[{"key":"a","value":"b"}]\2',
        ),
    ),
    "route": Target(_route, (FrameError,), (_ROUTE, _ROUTE.replace(b'"0"', b"0").replace(b'"1"', b"1"))),
    "cluster": Target(_masters, (FrameError,), (_CLUSTER, _CLUSTER.replace(b"0:", b'"0":'))),
    "members": Target(_members, (FrameError,), (b'{"consumerIdList":["127.0.0.1@1","127.0.0.1@2"]}', b"{}")),
    "frames": Target(_frames, (), (*_FRAMES, b"".join(_FRAMES))),
    "sound-frame": Target(_sound_frame, (UnmappableMessageError,), (_FRAMES[1][8:], _PUBLISH[8:])),
    "lane": Target(_lane, (LaneError,), _LANE_SEEDS),
    "parked": Target(_parked, (LaneError,), (_RECORD,)),
    "publish": Target(_publish, (MalformedPacketError,), (b"\x32\0\3a/b\0\1body", b"\x31\0\3a/bbody")),
    "packet": Target(_packet, (MalformedPacketError, MQTTError, AMQTTError), _PACKETS),
    "control-answer": Target(decode_answer, (ControlError,), _ANSWERS),
    "client-event": Target(
        _client_event, (), (_EVENT, _EVENT.replace(b"connect", b"tcpclean"), _EVENT.replace(b"1,", b"1e999,"))
    ),
    "status": Target(_status, (MalformedEventError,), (_STATUS, _STATUS.replace(b'"seq":7,', b""))),
    "status-tag": Target(tag_of, (UnmappableMessageError,), (_STATUS,)),
    "journal": Target(_journal, (ValueError,), _JOURNAL),
    "settings": Target(_settings, (ConfigError,), (_YAML,)),
}

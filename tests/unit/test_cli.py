import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mq2mqtt import __version__, cli, settings
from mq2mqtt.message import MqttMessage
from mq2mqtt.spool.frame import Frame, FrameKind, encode_publish
from mq2mqtt.spool.lane import Lane
from mq2mqtt.spool.parked import ParkedStore

Output = tuple[int, str, str]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "mq2mqtt.yaml"
    rules = [{"id": "sensors-out", "type": "outbound", "source": "sensors", "target": "mq_sensors"}]
    # Other tests that run now may use the ports of the defaults.
    ports = {"admin": {"listen": "127.0.0.1:0"}, "mqtt": {"listen": "127.0.0.1:0"}}
    path.write_text(yaml.safe_dump({"spool": {"path": "spool"}, "rules": rules} | ports))
    return path


class Run:
    """Runs the command as `main` does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch = monkeypatch
        self._capsys = capsys

    def __call__(self, *arguments: str | Path) -> Output:
        self._monkeypatch.setattr("sys.argv", ["mq2mqtt", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        output = self._capsys.readouterr()
        code = ended.value.code
        return (code if isinstance(code, int) else 0), output.out, output.err


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    return Run(monkeypatch, capsys)


def test_version(run: Run) -> None:
    assert run("--version") == (0, f"mq2mqtt {__version__}\n", "")


def test_the_example_is_a_configuration(run: Run, tmp_path: Path) -> None:
    code, text, _ = run("config", "example")
    assert code == 0
    path = tmp_path / "mq2mqtt.yaml"
    path.write_text(text)
    assert len(settings.load(path).rules) == 3


def test_the_schema_is_json(run: Run) -> None:
    code, text, _ = run("config", "schema")
    assert code == 0
    assert json.loads(text)["properties"]["rules"]


@pytest.mark.parametrize(
    "arguments", [("run",), ("check",), ("spool", "ls"), ("parked", "ls"), ("parked", "show", "x")]
)
def test_a_missing_file_is_one_line_and_exit_code_2(run: Run, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    code, out, err = run(*arguments, "-c", tmp_path / "nope.yaml")
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert "nope.yaml" in err


def test_a_wrong_rule_is_named_with_its_field(run: Run, config: Path) -> None:
    config.write_text(config.read_text().replace("mq_sensors", "mq sensors"))
    code, _, err = run("check", "-c", config)
    assert code == 2
    assert "rules[0] (sensors-out)" in err
    assert "target" in err


def test_wrong_usage_is_exit_code_2(run: Run) -> None:
    assert run("frobnicate")[0] == 2
    code, out, err = run("run", "--no-such-option")
    assert (code, out) == (2, "")
    assert err.splitlines()[-1] == "Error: No such option: --no-such-option"


@pytest.mark.parametrize("option", [("--log-level", "LOUD"), ("--listen", "1883"), ("--listen", "127.0.0.1:99999")])
def test_a_wrong_option_is_refused_before_anything_starts(run: Run, config: Path, option: tuple[str, str]) -> None:
    code, out, err = run("run", "-c", config, *option)
    assert (code, out) == (2, "")
    assert option[0] in err
    assert "Traceback" not in err
    assert not (config.parent / "spool").exists()


def test_check_says_that_rocketmq_does_not_answer(run: Run, config: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        data = yaml.safe_load(config.read_text())
        data["rocketmq"] = {"namesrv": f"127.0.0.1:{unused.getsockname()[1]}"}
        config.write_text(yaml.safe_dump(data))
        code, out, err = run("check", "-c", config)
    assert (code, err) == (1, "")
    assert out.startswith("ok ")
    assert "PROBLEM  rocketmq.namesrv" in out


def test_a_database_that_is_away_is_one_line_and_exit_code_1(run: Run, config: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        data = yaml.safe_load(config.read_text())
        data["store"] = {"url": f"postgresql+asyncpg://u:hunter2@127.0.0.1:{unused.getsockname()[1]}/db"}
        data["rocketmq"] = {"namesrv": f"127.0.0.1:{unused.getsockname()[1]}"}
        config.write_text(yaml.safe_dump(data))
        problem = data["store"]["url"].replace("hunter2", "***") + ": Connection refused\n"
        code, out, err = run("run", "-c", config)
        assert (code, out) == (1, ""), err
        assert err.endswith(f"mq2mqtt: store.url: {problem}")
        assert "Traceback" not in err
        code, out, _ = run("check", "-c", config)
    assert code == 1
    assert f"PROBLEM  store.url: {problem}" in out


def test_a_port_in_use_is_one_line_and_exit_code_2(run: Run, config: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        data = yaml.safe_load(config.read_text())
        data["admin"] = {"listen": f"127.0.0.1:{taken.getsockname()[1]}"}
        data["mqtt"] = {"listen": "127.0.0.1:0"}
        config.write_text(yaml.safe_dump(data))
        code, _, err = run("run", "-c", config)
    assert code == 2
    assert "admin.listen: cannot listen on" in err
    assert "Traceback" not in err


def test_lanes_are_listed_and_shown(run: Run, config: Path, tmp_path: Path) -> None:
    lane = Lane.open(tmp_path / "spool" / "sensors-out", max_bytes=1 << 20, target="mq_sensors")
    message = MqttMessage("sensors/room", b"21.5\xff", 1, retain=True, client_id="GID_dev@@@1")
    offset = lane.append(encode_publish(message, accepted_us=1_700_000_000_000_000))
    code, out, _ = run("spool", "ls", "-c", config)
    assert code == 0
    assert out.splitlines()[1].split()[:3] == ["sensors-out", "mq_sensors", "1"]
    code, out, _ = run("spool", "show", "sensors-out", "-c", config)
    assert code == 0
    assert f"offset {offset}" in out
    assert "MQTT topic 'sensors/room', client 'GID_dev@@@1', QoS 1, clean session, retain" in out
    assert r"b'21.5\xff'" in out
    lane.close()


def test_an_unknown_lane_is_named_with_those_there_are(run: Run, config: Path) -> None:
    code, _, err = run("spool", "show", "nope", "-c", config)
    assert code == 2
    assert "there is no lane nope" in err
    for outside in ("../..", "..", ".", ""):
        assert run("spool", "show", outside, "-c", config)[0] == 2


def test_a_damaged_lane_is_a_problem_that_names_the_file(run: Run, config: Path, tmp_path: Path) -> None:
    lane = Lane.open(tmp_path / "spool" / "sensors-out", max_bytes=1 << 20, target="mq_sensors")
    for _ in range(3):
        lane.append(encode_publish(MqttMessage("sensors/room", b"x" * 100), accepted_us=1))
    lane.close()
    (segment,) = (tmp_path / "spool" / "sensors-out").glob("*.seg")
    data = bytearray(segment.read_bytes())
    data[-150] ^= 0xFF
    segment.write_bytes(data)
    for arguments in (("ls",), ("show", "sensors-out")):
        code, out, _ = run("spool", *arguments, "-c", config)
        assert code == 1
        assert "PROBLEM" in out
        assert segment.name in out


def test_parked_messages_are_listed_and_shown(run: Run, config: Path, tmp_path: Path) -> None:
    parked = ParkedStore(tmp_path / "spool" / "commands-in", max_bytes=1 << 20)
    frame = Frame(
        FrameKind.ROCKETMQ, 0, 0, "", "mq_commands", b"mqttSecondTopic\x01/a/+\x02TAGS\x01MQ2MQTT\x02", b"body"
    )
    parked.append(frame, key="broker-a/0/7", reason="topic contains the wildcard +")
    code, out, _ = run("parked", "ls", "-c", config)
    assert code == 0
    assert "commands-in" in out
    assert "broker-a/0/7" in out
    assert "topic contains the wildcard +" in out
    code, out, _ = run("parked", "show", "commands-in", "-c", config)
    assert code == 0
    assert "mqttSecondTopic = /a/+" in out
    assert "b'body'" in out
    damaged = tmp_path / "spool" / "commands-in" / "parked" / "1.parked"
    damaged.write_bytes(b"")
    for command in (("ls",), ("show", "commands-in")):
        code, out, _ = run("parked", *command, "-c", config)
        assert code == 1
        assert "broker-a/0/7" in out
        assert f"PROBLEM  {damaged}: damaged; restore it or move it away" in out


def test_whatever_a_producer_said_is_shown(run: Run, config: Path, tmp_path: Path) -> None:
    parked = ParkedStore(tmp_path / "spool" / "commands-in", max_bytes=1 << 20)
    topic, born_us = b"t\xc4".decode("utf-8", "surrogateescape"), 2**64 - 1
    parked.append(
        Frame(FrameKind.ROCKETMQ, 0, born_us, "", topic, b"mqttSecondTopic\x01/\xc4\x02", b"body"),
        key="broker-a/0/7",
        reason="why",
    )
    code, out, _ = run("parked", "show", "commands-in", "-c", config)
    assert code == 0
    assert rf"RocketMQ topic t\udcc4, born {born_us} us after 1970" in out
    assert r"mqttSecondTopic = /\xc4" in out


def test_a_parked_receipt_is_shown_as_one(run: Run, config: Path, tmp_path: Path) -> None:
    parked = ParkedStore(tmp_path / "spool" / "commands-in.receipts", max_bytes=1 << 20)
    parked.append(Frame(FrameKind.ROCKETMQ, 0, 0, "", "devices/a", b"TAGS\x01queued\x02", b"{}"), key="5", reason="why")
    code, out, _ = run("parked", "show", "commands-in.receipts", "-c", config)
    assert code == 0
    assert "receipt for MQTT topic 'devices/a'" in out


SENSORS = ("parked", "replay", "sensors-out")


@pytest.fixture
def parked(tmp_path: Path) -> ParkedStore:
    """Two publishes that rule sensors-out has parked, with the keys 1 and 2."""
    store = ParkedStore(tmp_path / "spool" / "sensors-out", max_bytes=1 << 20)
    for key in ("1", "2"):
        store.append(Frame(FrameKind.PUBLISH, 1, 0, "dev", "sensors/a", b"", b"body"), key=key, reason="too large")
    return store


def test_parked_messages_are_replayed_by_key_or_all(run: Run, config: Path, parked: ParkedStore) -> None:
    code, out, _ = run(*SENSORS, "2", "-c", config)
    assert (code, out.splitlines()[0].split(":")[0]) == (0, "1 to be replayed")
    assert parked.replays() == ["2"]
    _, out, _ = run("parked", "ls", "-c", config)
    assert [line.split()[:2] + line.split()[3:4] for line in out.splitlines()[1:]] == [
        ["sensors-out", "1", "parked"],
        ["sensors-out", "2", "replay"],
    ]
    code, out, _ = run(*SENSORS, "--all", "-c", config)
    assert (code, parked.replays()) == (0, ["1", "2"])
    assert "2 to be replayed" in out


def test_parked_messages_are_dropped_by_key_or_all(run: Run, config: Path, parked: ParkedStore) -> None:
    assert run("parked", "drop", "sensors-out", "1", "-c", config)[:2] == (0, "1 dropped\n")
    assert parked.count == 1
    code, out, _ = run("parked", "drop", "sensors-out", "1", "2", "-c", config)
    assert (code, out) == (1, "1 dropped\nPROBLEM  there is no parked message 1 of sensors-out\n")
    assert run("parked", "drop", "sensors-out", "--all", "-c", config)[:2] == (0, "0 dropped\n")


@pytest.mark.parametrize("command", ["replay", "drop"])
@pytest.mark.parametrize("arguments", [(), ("1", "--all")])
def test_replay_and_drop_want_keys_or_all(
    run: Run, config: Path, parked: ParkedStore, command: str, arguments: tuple[str, ...]
) -> None:
    code, _, err = run("parked", command, "sensors-out", *arguments, "-c", config)
    assert code == 2
    assert "give keys or --all" in err
    assert (parked.count, parked.replays()) == (2, [])


def test_what_cannot_be_replayed_is_named_and_holds_up_no_other(
    run: Run, config: Path, parked: ParkedStore, tmp_path: Path
) -> None:
    damaged = tmp_path / "spool" / "sensors-out" / "parked" / "1.parked"
    damaged.write_bytes(b"")
    code, out, err = run(*SENSORS, "nope", "1", "2", "-c", config)
    assert (code, err) == (1, "")
    assert out.splitlines()[1:] == [
        "PROBLEM  nope: there is no parked message nope of sensors-out",
        f"PROBLEM  {damaged}: damaged; restore it or move it away",
    ]
    assert parked.replays() == ["2"]


def test_a_replay_for_a_rule_that_is_gone_is_one_line_and_exit_code_2(
    run: Run, config: Path, parked: ParkedStore
) -> None:
    config.write_text(config.read_text().replace("sensors-out", "other-out"))
    code, out, err = run(*SENSORS, "--all", "-c", config)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "no rule sensors-out in the configuration" in err
    assert "add it again" in err
    assert parked.replays() == []
    assert run("parked", "drop", "sensors-out", "--all", "-c", config)[0] == 0


def test_a_replay_for_a_rule_of_another_type_is_refused(run: Run, config: Path, parked: ParkedStore) -> None:
    config.write_text(config.read_text().replace("outbound", "inbound"))
    code, out, _ = run(*SENSORS, "1", "-c", config)
    assert code == 1
    assert "PROBLEM  1: parked by a rule of type outbound, and sensors-out is of type inbound now" in out
    assert parked.replays() == []


@pytest.mark.parametrize("receipts", [True, False])
def test_a_parked_receipt_goes_the_way_of_its_rules_receipts(
    run: Run, config: Path, tmp_path: Path, *, receipts: bool
) -> None:
    rule = {"id": "commands-in", "type": "inbound", "source": "mq_commands", "target": "devices"}
    data = yaml.safe_load(config.read_text())
    config.write_text(yaml.safe_dump(data | {"rules": [rule | ({"receipts": "mq_receipts"} if receipts else {})]}))
    store = ParkedStore(tmp_path / "spool" / "commands-in.receipts", max_bytes=1 << 20)
    store.append(Frame(FrameKind.ROCKETMQ, 0, 0, "", "devices/a", b"", b"{}"), key="7", reason="why")
    code, out, _ = run("parked", "replay", "commands-in.receipts", "7", "-c", config)
    assert (code, store.replays()) == ((0, ["7"]) if receipts else (1, []))
    assert receipts or "PROBLEM  7: a receipt, and commands-in has no `receipts` now" in out


def test_a_replay_for_a_disabled_rule_says_that_it_may_wait(run: Run, config: Path, parked: ParkedStore) -> None:
    config.write_text(config.read_text().replace("- id", "- enabled: false\n  id"))
    code, out, _ = run(*SENSORS, "1", "-c", config)
    assert (code, parked.replays()) == (0, ["1"])
    assert "rule sensors-out is disabled" in out


@pytest.mark.parametrize("lane", ["nope", "..", ".", "", "x" * 300, "sensors-out/parked"])
def test_replay_and_drop_in_no_lane_are_exit_code_2(run: Run, config: Path, parked: ParkedStore, lane: str) -> None:
    for command in ("replay", "drop"):
        code, out, err = run("parked", command, "-c", config, "--all", "--", lane)
        assert (code, out) == (2, "")
        assert f"there is no lane {lane} in" in err
    assert (parked.count, parked.replays()) == (2, [])


def test_the_journal_of_who_is_connected_is_no_lane(run: Run, config: Path, tmp_path: Path) -> None:
    (tmp_path / "spool" / ".presence").mkdir(parents=True)
    (tmp_path / "spool" / ".presence" / "journal").write_bytes(b"")
    for command in (("spool", "ls"), ("parked", "ls")):
        code, out, _ = run(*command, "-c", config)
        assert (code, len(out.splitlines())) == (0, 1)
    assert run("spool", "show", ".presence", "-c", config)[0] == 2


def test_with_nothing_there_the_lists_are_empty(run: Run, config: Path) -> None:
    assert run("spool", "ls", "-c", config)[0] == 0
    assert run("parked", "ls", "-c", config)[0] == 0


def test_explain_shows_both_directions(run: Run, config: Path) -> None:
    code, out, _ = run("explain", "-c", config, "--topic", "sensors/t", "--payload", "21.5", "--qos", "2")
    assert code == 0
    assert "qoslevel = 2" in out
    assert "body b'21.5'" in out
    code, out, _ = run("explain", "-c", config, "--rocketmq-topic", "mq_commands", "--property", "TAGS=MQ2MQTT")
    assert code == 1
    assert "no inbound rule has this source" in out
    code, out, _ = run("explain", "-c", config, "--connects", "GID_dev@@@1")
    assert code == 1
    assert "no status rule" in out


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--topic", "a", "--rocketmq-topic", "b"),
        ("--topic", "a", "--connects", "GID_dev@@@1"),
        ("--rocketmq-topic", "b", "--property", "novalue"),
        ("--topic", "sensors/t", "--client-id", "ä" * 32_768),
    ],
)
def test_explain_with_wrong_options_is_exit_code_2(run: Run, config: Path, arguments: tuple[str, ...]) -> None:
    assert run("explain", "-c", config, *arguments)[0] == 2


@pytest.mark.parametrize("command_name", ["run", "sidecar"])
def test_a_reload_asked_for_before_the_bridge_is_up_does_not_end_it(command_name: str, tmp_path: Path) -> None:
    config = tmp_path / "mq2mqtt.yaml"
    os.mkfifo(config)
    command = [sys.executable, "-m", "mq2mqtt", command_name, "-c", str(config)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        # Opens when it reads its configuration, which it then waits for.
        with config.open("w") as file:
            process.send_signal(signal.SIGHUP)
            file.write("no configuration")
        _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert str(config) in err

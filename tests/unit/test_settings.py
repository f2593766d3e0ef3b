"""The settings: what a file and the environment may say, and the one line for each thing that is wrong."""

import os
import ssl
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, SecretStr, ValidationError
from pydantic_core import ErrorDetails

from mq2mqtt import settings
from mq2mqtt.errors import ConfigError
from mq2mqtt.settings import HostSettings, MqttSettings, Settings, TlsSettings, docgen, tls_context
from mq2mqtt.settings.fields import split_address
from mq2mqtt.settings.problems import describe
from tests.certificates import Authority

Write = Callable[[str], Path]
DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.upper().startswith("MQ2MQTT_"):
            monkeypatch.delenv(name)


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write `mq2mqtt.yaml` in an own directory that is the working directory too; return its name alone."""
    monkeypatch.chdir(tmp_path)

    def write(text: str) -> Path:
        path = Path("mq2mqtt.yaml")
        path.write_text(text, encoding="utf-8")
        return path

    return write


def problems(path: Path) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        settings.load(path)
    return str(caught.value).splitlines()


# What is right


def test_defaults(write: Write, tmp_path: Path) -> None:
    loaded = settings.load(write("node: default\n"))

    assert loaded.rocketmq.namesrv == "127.0.0.1:9876"
    assert (loaded.rocketmq.access_key, loaded.rocketmq.secret_key, loaded.rocketmq.tls) == (None, None, False)
    assert (loaded.rocketmq.driver, loaded.rocketmq.address_map) == ("native", {})
    assert (loaded.spool.path, loaded.spool.durability, loaded.spool.max_bytes) == (
        tmp_path / "var/spool",
        "process",
        1 << 30,
    )
    assert loaded.store.url == f"sqlite+aiosqlite:///{tmp_path}/var/mq2mqtt.db"
    assert (loaded.offline.retention, loaded.offline.per_client, loaded.offline.total) == (259_200, 10_000, 1_000_000)
    assert loaded.admin.listen == "127.0.0.1:9883"
    assert (loaded.host.type, loaded.host.url) == ("mosquitto", "mqtt://127.0.0.1:1883")
    assert (loaded.host.username, loaded.host.password, loaded.host.token) == (None, None, None)
    assert (loaded.limits.topic_chars, loaded.limits.payload_bytes) == (None, None)
    assert loaded.stop_deadline == 10
    assert (loaded.mqtt.listen, loaded.mqtt.allow_anonymous, loaded.mqtt.amqtt) == ("127.0.0.1:1883", None, {})
    assert loaded.rules == ()


def test_everything_set(write: Write) -> None:
    loaded = settings.load(
        write("""
node: edge_7
rocketmq:
  namesrv: "rmq1:9876; [::1]:9877"
  access_key: AK
  secret_key: s3cret
  tls: true
  address_map: {10.0.0.1:10911: 127.0.0.1:10911}
spool: {path: /data/spool, durability: power, max_bytes: 512 MiB}
store: {url: "postgresql+asyncpg://u:p@db/x"}
offline: {retention: 60, per_client: 1, total: 2}
admin: {listen: "0.0.0.0:0"}
host: {type: mosquitto, url: "unix:///run/m.sock", username: u, password: p, token: t}
limits: {topic_chars: 64, payload_bytes: 64KiB}
stop_deadline: 2.5
mqtt: {listen: "[::]:1883", allow_anonymous: false, amqtt: {listeners: {ws: {type: ws}}}}
rules:
  - {id: in-1, type: inbound, source: mq, target: devices, from: earliest}
""")
    )

    assert loaded.node == "edge_7"
    assert loaded.rocketmq.namesrv == "rmq1:9876;[::1]:9877"
    assert loaded.rocketmq.secret_key == SecretStr("s3cret")
    assert loaded.rocketmq.address_map == {"10.0.0.1:10911": "127.0.0.1:10911"}
    assert (loaded.spool.path, loaded.spool.max_bytes) == (Path("/data/spool"), 512 << 20)
    assert loaded.store.url == "postgresql+asyncpg://u:p@db/x"
    assert (loaded.offline.retention, loaded.offline.per_client, loaded.offline.total) == (60, 1, 2)
    assert loaded.limits.payload_bytes == 65_536
    assert loaded.mqtt.amqtt == {"listeners": {"ws": {"type": "ws"}}}
    assert loaded.rule_set.inbound("devices") == loaded.rules[0]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("65536", 65_536),
        ("70000B", 70_000),
        ("100 KiB", 102_400),
        ("2MiB", 2 << 20),
        ("3GiB", 3 << 30),
        ("1TiB", 1 << 40),
        ("'65536'", 65_536),
    ],
)
def test_sizes(write: Write, text: str, size: int) -> None:
    assert settings.load(write(f"spool: {{max_bytes: {text}}}")).spool.max_bytes == size


def test_sections_that_are_empty_have_their_defaults(write: Write) -> None:
    loaded = settings.load(write("rocketmq:\n  # namesrv: a:1\nrules:\nnode: n\n"))

    assert loaded.rocketmq == Settings().rocketmq
    assert loaded.rules == ()


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("sqlite+aiosqlite:///a/x.db", "sqlite+aiosqlite:///{base}/a/x.db"),
        ("sqlite+aiosqlite:////abs/x.db", "sqlite+aiosqlite:////abs/x.db"),
        ("postgresql+asyncpg://h/db", "postgresql+asyncpg://h/db"),
    ],
)
def test_store_url_is_relative_to_the_file(write: Write, tmp_path: Path, url: str, expected: str) -> None:
    assert settings.load(write(f"store: {{url: '{url}'}}")).store.url == expected.format(base=tmp_path)


def test_paths_are_relative_to_the_file_not_to_the_working_directory(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / write("spool: {path: lanes}\n")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")

    assert settings.load(path).spool.path == tmp_path / "lanes"
    assert settings.load(str(path)).spool.path == tmp_path / "lanes"


def test_it_is_known_whether_a_file_has_a_broker_for_the_sidecar(write: Write) -> None:
    assert settings.load(write("node: a\nspool: {path: s}\n")).host.model_fields_set == set()
    assert settings.load(write("host: {url: 'mqtt://h:1', token: t}\n")).host.model_fields_set == {"url", "token"}


def test_secrets_from_files(write: Write, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("s3cret\n")
    (tmp_path / "token").write_text(" t \r\n")
    loaded = settings.load(
        write(f"rocketmq: {{access_key: a, secret_key: 'file://key'}}\nhost: {{token: 'file://{tmp_path}/token'}}\n")
    )

    assert loaded.rocketmq.secret_key == SecretStr("s3cret")
    assert loaded.host.token == SecretStr(" t ")


def test_secrets_are_not_shown() -> None:
    shown = Settings.model_validate(
        {"rocketmq": {"access_key": "a", "secret_key": "s3cret"}, "host": {"password": "hunter2", "token": "tok1"}}
    )

    assert "s3cret" not in repr(shown)
    assert "hunter2" not in repr(shown)
    assert "tok1" not in repr(shown)


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Settings().node = "x"
    with pytest.raises(ValidationError, match="frozen"):
        Settings().spool.max_bytes = 1


@pytest.mark.parametrize(
    ("address", "parts"),
    [("127.0.0.1:1883", ("127.0.0.1", 1883)), ("[::1]:0", ("::1", 0)), ("h-1.x:65535", ("h-1.x", 65_535))],
)
def test_split_address(address: str, parts: tuple[str, int]) -> None:
    assert split_address(Settings(mqtt=MqttSettings(listen=address)).mqtt.listen) == parts


# The environment


def test_environment_wins_over_the_file(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write("node: file\nrocketmq: {namesrv: 'a:1', tls: true}\nrules: []\n")
    monkeypatch.setenv("MQ2MQTT_NODE", "env")
    monkeypatch.setenv("MQ2MQTT_ROCKETMQ__NAMESRV", "b:2")
    monkeypatch.setenv("MQ2MQTT_ROCKETMQ__ADDRESS_MAP", '{"c:1": "d:1"}')
    monkeypatch.setenv("mq2mqtt_spool__max_bytes", "1MiB")
    monkeypatch.setenv("MQ2MQTT_STOP_DEADLINE", "")
    monkeypatch.setenv("MQ2MQTT_SERVICE_HOST", "10.0.0.1")  # Kubernetes sets such for a service called mq2mqtt
    monkeypatch.setenv("MQ2MQTT_RULES", '[{"id": "out", "type": "outbound", "source": "a", "target": "b"}]')
    loaded = settings.load(path)

    assert (loaded.node, loaded.rocketmq.namesrv, loaded.rocketmq.tls) == ("env", "b:2", True)
    assert loaded.rocketmq.address_map == {"c:1": "d:1"}
    assert loaded.spool.max_bytes == 1 << 20
    assert loaded.stop_deadline == 10
    assert [rule.id for rule in loaded.rules] == ["out"]


@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        (
            "MQ2MQTT_NODE",
            "a b",
            "environment MQ2MQTT_NODE: node: 'a b' is no node name: use 1 to 32 letters, digits, '-' and '_'",
        ),
        ("mq2mqtt_stop_deadline", "x", "environment MQ2MQTT_STOP_DEADLINE: stop_deadline: must be a number, not 'x'"),
        (
            "MQ2MQTT_LIMITS__TOPIC",
            "1",
            "environment MQ2MQTT_LIMITS__TOPIC: limits.topic: unknown field; there are topic_chars, payload_bytes",
        ),
        ("MQ2MQTT_RULES", "[{", "environment MQ2MQTT_RULES: no valid JSON, which lists and mappings must be"),
        (
            "MQ2MQTT_ROCKETMQ__ADDRESS_MAP",
            "a=b",
            "environment MQ2MQTT_ROCKETMQ__ADDRESS_MAP: no valid JSON, which lists and mappings must be",
        ),
        (
            "MQ2MQTT_RULES",
            '[{"id": "env-1", "type": "x"}]',
            "environment MQ2MQTT_RULES: rules[0]: type: must be one of 'outbound', 'inbound', 'status', not 'x'",
        ),
        (
            "MQ2MQTT_ROCKETMQ__ACCESS_KEY",
            "a",
            "mq2mqtt.yaml: rocketmq: access_key and secret_key go together, secret_key is missing; set both or neither",
        ),
    ],
)
def test_problems_in_the_environment(
    write: Write, monkeypatch: pytest.MonkeyPatch, name: str, value: str, line: str
) -> None:
    monkeypatch.setenv(name, value)
    assert problems(write("rules: [{id: file-1, type: outbound, source: a, target: b}]\n")) == [line]


def test_of_several_variables_of_a_section_one_is_no_json(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("mq2mqtt_rocketmq__address_map", "a=b")
    monkeypatch.setenv("MQ2MQTT_ROCKETMQ__NAMESRV", "b:2")
    monkeypatch.setenv("MQ2MQTT_ROCKETMQ__PROXY", "")
    (line,) = problems(write("rules: []\n"))
    assert line.startswith(
        "environment MQ2MQTT_ROCKETMQ__ADDRESS_MAP, MQ2MQTT_ROCKETMQ__NAMESRV: one of these is no valid JSON"
    )


# What is wrong with the file itself

# A few lines that stand for 10^30 values.
BOMB = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 31))
MERGE_BOMB = "a0: &a0 {x: 1}\n" + "".join(
    f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}\n" for n in range(1, 31)
)


def test_missing_file(write: Write) -> None:
    write("")
    assert problems(Path("absent.yaml")) == ["absent.yaml: cannot be read: No such file or directory"]
    assert problems(Path()) == [".: cannot be read: Is a directory"]


@pytest.mark.parametrize("text", ["", "\n", "# all commented out\n", "---\n"])
def test_empty_file(write: Write, text: str) -> None:
    (line,) = problems(write(text))
    assert line in (
        "mq2mqtt.yaml: is empty; `mq2mqtt config example` prints a configuration to start from",
        "mq2mqtt.yaml: must hold `name: value` lines; `mq2mqtt config example` prints some",
    )


@pytest.mark.parametrize("text", ["- a\n", "text\n", "1\n"])
def test_no_mapping(write: Write, text: str) -> None:
    assert problems(write(text)) == [
        "mq2mqtt.yaml: must hold `name: value` lines; `mq2mqtt config example` prints some"
    ]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: [1\nb: 2\n", "mq2mqtt.yaml:2:2: no valid YAML: expected ',' or ']', but got ':'"),
        ("a: 1\n\tb: 2\n", "mq2mqtt.yaml:2:1: no valid YAML: found character '\\t' that cannot start any token"),
        ("a: *x\n", "mq2mqtt.yaml:1:4: no valid YAML: found undefined alias 'x'"),
        ("a: 1\n---\nb: 1\n", "mq2mqtt.yaml:2:1: no valid YAML: but found another document"),
        ("a: !!set x\n", "mq2mqtt.yaml:1:4: no valid YAML: expected a mapping node, but found scalar"),
        ("a: \x07\n", "mq2mqtt.yaml: no valid YAML: character #x0007 is not allowed"),
        ("node: 2026-13-45\n", "mq2mqtt.yaml: no valid YAML: month must be in 1..12"),
        ("node: a\nnode: b\n", "mq2mqtt.yaml:2:1: the key 'node' is there twice; remove one"),
        ("spool:\n  path: a\n  path: b\n", "mq2mqtt.yaml:3:3: the key 'path' is there twice; remove one"),
        ("rules: [{id: a, id: b}]\n", "mq2mqtt.yaml:1:17: the key 'id' is there twice; remove one"),
        ("1: a\n", "mq2mqtt.yaml:1:1: the key '1' is no text; write it in quotes"),
        ("? [a]\n: b\n", "mq2mqtt.yaml:1:3: the key here is no text; write it in quotes"),
        ("rules: &r\n  - *r\n", "mq2mqtt.yaml:1:8: an alias refers to what it is part of"),
        *(
            (f"a: {value}\n", "mq2mqtt.yaml: no valid YAML: a value is not what its tag says")
            for value in ('!!int ""', '!!float ""', "!!bool x", "!!timestamp x")
        ),
        ("a: " + "[" * 5000 + "\n", "mq2mqtt.yaml: no valid YAML: nested too deep"),
        (BOMB, "mq2mqtt.yaml: no valid YAML: more than 100000 values"),
        (MERGE_BOMB, "mq2mqtt.yaml: no valid YAML: more than 100000 values"),
    ],
)
def test_yaml_problems(write: Write, text: str, line: str) -> None:
    assert problems(write(text)) == [line]


def test_a_yaml_problem_without_a_place(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise yaml.MarkedYAMLError(context="somewhere")

    monkeypatch.setattr(yaml, "compose", fail)
    assert problems(write("a: 1\n")) == ["mq2mqtt.yaml: no valid YAML: somewhere"]


def test_a_file_that_is_not_utf8(write: Write) -> None:
    path = write("")
    path.write_bytes(b"node: \xff\n")
    assert problems(path) == ["mq2mqtt.yaml: is not UTF-8 at byte 6; save it as UTF-8"]


def test_merge_keys_and_aliases_work(write: Write) -> None:
    loaded = settings.load(
        write("""
rules:
  - &first {id: out-1, type: outbound, source: a, target: b}
  - {<<: *first, id: out-2, source: c}
""")
    )
    assert [(rule.id, rule.source, rule.target) for rule in loaded.rules] == [("out-1", "a", "b"), ("out-2", "c", "b")]


# What is wrong with a field

SIZE_WORDS = "is no size: write bytes as a number, or with B, KiB, MiB, GiB or TiB, as in 512MiB"
ADDRESS_WORDS = "is no host:port: write for example 127.0.0.1:9876, or [::1]:9876 for IPv6"
STORE_URL_WORDS = (
    "is no database URL: write for example sqlite+aiosqlite:///var/mq2mqtt.db, or "
    "postgresql+asyncpg://USER:PASSWORD@HOST/DATABASE"
)
URL_WORDS = (
    "is no broker URL: write mqtt://HOST:PORT, mqtts://HOST:PORT or unix:///PATH; user and password go into "
    "host.username and host.password"
)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("nodes: x", "nodes: unknown field; did you mean 'node'?"),
        ("_env_file: x", ("_env_file: unknown field; there are node, rocketmq, spool, store, offline, admin, "
         "host, limits, stop_deadline, mqtt, rules")),
        ("node: 7", "node: must be text, not 7: write it in quotes"),
        ("node: yes", "node: must be text, not True: write it in quotes"),
        ("node: [a]", "node: must be text, not a list"),
        ("node: {a: b}", "node: must be text, not a mapping"),
        ("node: " + "x" * 33, f"node: '{'x' * 33}' is no node name: use 1 to 32 letters, digits, '-' and '_'"),
        ("rocketmq: text", "rocketmq: must be a mapping (`name: value` lines), not 'text'"),
        ("rocketmq: {namesrv: null}", "rocketmq.namesrv: must be text, not nothing"),
        ("rocketmq: {namesrv: host}", f"rocketmq.namesrv: 'host' {ADDRESS_WORDS}"),
        ("rocketmq: {namesrv: 'a:1;'}", f"rocketmq.namesrv: '' {ADDRESS_WORDS}"),
        ("rocketmq: {namesrv: 'a:1,b:2'}", f"rocketmq.namesrv: 'a:1,b:2' {ADDRESS_WORDS}"),
        ("rocketmq: {namesrv: 'a:65536'}", f"rocketmq.namesrv: 'a:65536' {ADDRESS_WORDS}"),
        ("rocketmq: {namesrv: '::1:9876'}", f"rocketmq.namesrv: '::1:9876' {ADDRESS_WORDS}"),
        ("rocketmq: {namesrv: 'http://a:1'}", f"rocketmq.namesrv: 'http://a:1' {ADDRESS_WORDS}"),
        ("rocketmq: {namesrv: 'a:0'}", "rocketmq.namesrv: 'a:0' has port 0, which nobody can connect to"),
        ("rocketmq: {address_map: {a: 'b:1'}}", f"rocketmq.address_map: 'a' {ADDRESS_WORDS}"),
        ("rocketmq: {address_map: {'a:1': 2}}", "rocketmq.address_map.a:1: must be text, not 2: write it in quotes"),
        ("rocketmq: {address_map: []}", "rocketmq.address_map: must be a mapping (`name: value` lines), not a list"),
        ("rocketmq: {access_key: a}", ("rocketmq: access_key and secret_key go together, secret_key is missing; "
         "set both or neither")),
        ("rocketmq: {secret_key: a}", ("rocketmq: access_key and secret_key go together, access_key is missing; "
         "set both or neither")),
        ("rocketmq: {secret_key: 98765}", "rocketmq.secret_key: must be text, not this: write it in quotes"),
        ("host: {type: mqtt, token: a}",
         "host: token is for the hook, type mosquitto; with type mqtt use username and password"),
        ("host: {password: ''}", "host.password: is empty; give it a value or leave it out"),
        ("host: {username: ''}", "host.username: is empty; give it a value or leave it out"),
        (
            "rocketmq: {driver: grpc}",
            "rocketmq: driver grpc needs proxy: name RocketMQ 5's proxy, as in 127.0.0.1:8081",
        ),
        (
            "rocketmq: {proxy: 'localhost:8081'}",
            "rocketmq: proxy is for driver grpc, and driver is native; change one of them",
        ),
        ("rocketmq: {driver: grpc, proxy: localhost}", f"rocketmq.proxy: 'localhost' {ADDRESS_WORDS}"),
        ("rocketmq: {driver: java}", "rocketmq.driver: must be 'native', 'librocketmq' or 'grpc'"),
        ("rocketmq: {tls: maybe}", "rocketmq.tls: must be true or false, not 'maybe'"),
        ("rocketmq: {tls: {ca_fil: x}}", "rocketmq.tls.ca_fil: unknown field; did you mean 'ca_file'?"),
        ("rocketmq: {tls: {ca_file: 7}}", "rocketmq.tls.ca_file: must be a path, not 7"),
        ("rocketmq: {tls: {cert_file: x}}", ("rocketmq.tls: cert_file and key_file go together, key_file is missing; "
         "set both or neither")),
        ("rocketmq: {tls: {key_file: x}}", ("rocketmq.tls: cert_file and key_file go together, cert_file is missing; "
         "set both or neither")),
        ("rocketmq: {acces_key: x}", "rocketmq.acces_key: unknown field; did you mean 'access_key'?"),
        ("spool: {path: 7}", "spool.path: must be a path, not 7"),
        ("spool: {durability: disk}", "spool.durability: must be 'process' or 'power'"),
        ("spool: {max_bytes: 1GB}", f"spool.max_bytes: '1GB' {SIZE_WORDS}"),
        ("spool: {max_bytes: big}", f"spool.max_bytes: 'big' {SIZE_WORDS}"),
        ("spool: {max_bytes: -5MiB}", f"spool.max_bytes: '-5MiB' {SIZE_WORDS}"),
        ("spool: {max_bytes: 1.5}", "spool.max_bytes: must be a whole number, not 1.5"),
        ("spool: {max_bytes: 1KiB}", "spool.max_bytes: must be 65536 or more"),
        ("store: {url: var/x.db}", f"store.url: {STORE_URL_WORDS}"),
        ("store: {url: 'sqlite:///x.db'}", f"store.url: {STORE_URL_WORDS}"),
        ("store: {url: 'sqlite+aiosqlite:///:memory:'}", f"store.url: {STORE_URL_WORDS}"),
        ("store: {url: 'mysql://u:hunter2@h/db'}", f"store.url: {STORE_URL_WORDS}"),
        ("offline: {retention: 0}", "offline.retention: must be 1 or more"),
        ("offline: {total: 0}", "offline.total: must be 1 or more"),
        ("admin: {listen: 9883}", "admin.listen: must be text, not 9883: write it in quotes"),
        ("admin: {listen: ':9883'}", f"admin.listen: ':9883' {ADDRESS_WORDS}"),
        ("host: {type: emqx}", "host.type: must be 'mosquitto' or 'mqtt'"),
        ("host: {url: 'mqtt://u:hunter2@h'}", f"host.url: {URL_WORDS}"),
        ("host: {url: 'mqtt://h:65536'}", f"host.url: {URL_WORDS}"),
        ("host: {url: 'mqtt://h:0'}", f"host.url: {URL_WORDS}"),
        ("host: {url: 'mqtt://h:port'}", f"host.url: {URL_WORDS}"),
        ("host: {url: 'mqtt://:1883'}", f"host.url: {URL_WORDS}"),
        ("host: {url: 'mqtts://[::1'}", f"host.url: {URL_WORDS}"),
        ("host: {tls: yes}", "host.tls: must be a mapping (`name: value` lines), not True"),
        ("host: {url: 'mqtts://h', tls: {ca_fil: x}}", "host.tls.ca_fil: unknown field; did you mean 'ca_file'?"),
        ("host: {url: 'mqtts://h', tls: {ca_file: 7}}", "host.tls.ca_file: must be a path, not 7"),
        ("host: {tls: {ca_file: x}}", ("host: tls is for mqtts://, and url is mqtt://127.0.0.1:1883; change url, "
         "or leave tls out")),
        ("limits: {topic_chars: 0}", "limits.topic_chars: must be 1 or more"),
        ("limits: {payload_bytes: 0}", "limits.payload_bytes: must be 1 or more"),
        ("stop_deadline: 0", "stop_deadline: must be more than 0"),
        ("stop_deadline: 3601", "stop_deadline: must be 3600 or less"),
        ("stop_deadline: .nan", "stop_deadline: must be a finite number"),
        ("stop_deadline: [1]", "stop_deadline: must be a number, not a list"),
        ("mqtt: {amqtt: x}", "mqtt.amqtt: must be a mapping (`name: value` lines), not 'x'"),
        ("rules: {}", "rules: must be a list (lines that begin with `- `), not a mapping"),
        ("rules: [x]", "rules[0]: must be a mapping (`name: value` lines), not 'x'"),
        ("rules: [{id: abc}]", "rules[0] (abc): type: is missing: 'outbound', 'inbound' or 'status'"),
        ("rules: [{id: abc, type: out}]", ("rules[0] (abc): type: must be one of 'outbound', 'inbound', 'status', "
         "not 'out'")),
        ("rules: [{id: 111, type: outbound, source: a, target: b}]", ("rules[0]: id: must be text, not 111: "
         "write it in quotes")),
        ("rules: [{id: abc, type: outbound, source: a}]", "rules[0] (abc): target: is missing"),
        ("rules: [{id: abc, type: outbound, source: a, target: b, tags: c}]", ("rules[0] (abc): tags: unknown field; "
         "there are id, type, source, target, description, enabled")),
        ("rules: [{id: abc, type: inbound, source: a, target: b, start: latest}]", ("rules[0] (abc): start: "
         "unknown field; there are id, type, source, target, description, enabled, tags, group, from, receipts")),
        ("rules: [{id: abc, type: inbound, source: a, target: b, from: now}]", ("rules[0] (abc): from: must be "
         "'latest' or 'earliest'")),
        ("rules: [{id: abc, type: outbound, source: a/b, target: b}]", ("rules[0] (abc): source: MQTT parent topic "
         "'a/b' has more than one level: use the first one, 'a'; it covers all below it")),
    ],
)  # fmt: skip
def test_field_problems(write: Write, text: str, line: str) -> None:
    assert problems(write(f"# a comment\n{text}\n")) == [f"mq2mqtt.yaml:2: {line}"]


def test_a_problem_without_words_of_ours() -> None:
    error = ErrorDetails(type="json_invalid", loc=("x",), msg="Pydantic's words", input="s3cret")
    assert describe(error, secret=False) == "Pydantic's words"


def test_all_problems_at_once_in_the_order_of_the_file(write: Write) -> None:
    path = write("""
rules:
  - {id: out-1, type: outbound, source: a, target: b}
  - id: out-2
    type: outbound
    source: $a
    target: b c
node: a b
extra: 1
rocketmq:
  tls: 3
""")
    assert [line.split(": ")[:3] for line in problems(path)] == [
        ["mq2mqtt.yaml:6", "rules[1] (out-2)", "source"],
        ["mq2mqtt.yaml:7", "rules[1] (out-2)", "target"],
        ["mq2mqtt.yaml:8", "node", "'a b' is no node name"],
        ["mq2mqtt.yaml:9", "extra", ("unknown field; there are node, rocketmq, spool, store, offline, admin, host, "
         "limits, stop_deadline, mqtt, rules")],
        ["mq2mqtt.yaml:11", "rocketmq.tls", "must be true or false, not 3"],
    ]  # fmt: skip


def test_conflicts_and_secrets_that_cannot_be_read(write: Write, tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "binary").write_bytes(b"s3cret\xff")
    path = write("""
rocketmq: {access_key: a, secret_key: file://absent}
host:
  password: file://empty
  token: file://binary
rules:
  - {id: out-1, type: outbound, source: a, target: b}
  - {id: out-2, type: outbound, source: a, target: c}
""")
    assert problems(path) == [
        f"mq2mqtt.yaml:2: rocketmq.secret_key: {tmp_path}/absent cannot be read: No such file or directory",
        f"mq2mqtt.yaml:4: host.password: {tmp_path}/empty is empty",
        f"mq2mqtt.yaml:5: host.token: {tmp_path}/binary is not UTF-8",
        (
            "mq2mqtt.yaml:8: rules[1] (out-2): source: 'a' is already the source of rules[0] (out-1); "
            "an MQTT topic has one outbound rule, disabled ones count"
        ),
    ]


# What is made from the settings


def test_the_example_loads_and_shows_the_defaults(write: Write) -> None:
    loaded = settings.load(write(settings.example()))
    plain = settings.load(write("node: default"))

    assert loaded.model_copy(update={"rules": ()}) == plain
    assert [(rule.id, rule.type, rule.enabled) for rule in loaded.rules] == [
        ("telemetry-out", "outbound", True),
        ("commands-in", "inbound", True),
        ("presence", "status", True),
    ]
    assert loaded.rule_set.outbound("sensors/x") is not None


def test_the_example_has_every_field(write: Write) -> None:
    data: dict[str, Any] = yaml.safe_load(write(settings.example()).read_text())

    assert list(data) == list(Settings.model_fields)
    for name, field in Settings.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            assert list(data[name]) == list(field.annotation.model_fields)


def test_every_field_is_described_in_schema_and_reference() -> None:
    schema = settings.schema()
    page = settings.markdown()
    for section in [schema, *schema["$defs"].values()]:
        for name, field in section["properties"].items():
            assert "description" in field or "$ref" in field, name
            assert f"`{name}`" in page


def test_secrets_are_marked_in_the_schema() -> None:
    host = settings.schema()["$defs"]["HostSettings"]["properties"]
    assert host["token"]["anyOf"][0]["format"] == "password"


# TLS


def test_tls_is_a_flag_or_a_mapping_and_its_paths_are_relative_to_the_file(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert settings.load(write("rocketmq: {tls: on}")).rocketmq.tls is True
    loaded = settings.load(write("rocketmq: {tls: {ca_file: ca.pem, check_hostname: false}}"))
    assert loaded.rocketmq.tls == TlsSettings(ca_file=tmp_path / "ca.pem", check_hostname=False)
    monkeypatch.setenv("MQ2MQTT_ROCKETMQ__TLS__CA_FILE", "other.pem")
    assert settings.load(write("rocketmq: {tls: true}")).rocketmq.tls == TlsSettings(ca_file=tmp_path / "other.pem")


def test_tls_context(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    own = authority.issue("own")
    assert (tls_context(tls=False), tls_context(tls=True)) == (False, True)
    context = tls_context(TlsSettings(ca_file=authority.ca, cert_file=own.certificate, key_file=own.key))
    assert isinstance(context, ssl.SSLContext)
    assert (context.verify_mode, context.check_hostname) == (ssl.CERT_REQUIRED, True)
    assert [dict(*certificate["subject"]) for certificate in context.get_ca_certs()] == [
        {"commonName": "test authority"}
    ]
    context = tls_context(TlsSettings(check_hostname=False))
    assert isinstance(context, ssl.SSLContext)
    assert (context.verify_mode, context.check_hostname) == (ssl.CERT_REQUIRED, False)


def test_tls_files_that_are_no_use_are_named(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    own, other = authority.issue("own"), authority.issue("other")
    encrypted = ["openssl", "pkey", "-in", str(own.key), "-aes256", "-passout", "pass:x", "-out", f"{tmp_path}/locked"]
    subprocess.run(encrypted, check=True)
    absent, locked = tmp_path / "absent", tmp_path / "locked"
    for tls, words in (
        (TlsSettings(ca_file=absent), f"rocketmq.tls.ca_file: {absent} cannot be read: No such file or directory"),
        (TlsSettings(ca_file=own.key), f"rocketmq.tls.ca_file: {own.key} holds no certificate in PEM form"),
        (TlsSettings(cert_file=absent, key_file=own.key), f"rocketmq.tls.cert_file: {absent} cannot be read"),
        (TlsSettings(cert_file=own.certificate, key_file=absent), f"rocketmq.tls.key_file: {absent} cannot be read"),
        (TlsSettings(cert_file=own.certificate, key_file=other.key), f"{other.key} are no certificate and its key"),
        (TlsSettings(cert_file=own.certificate, key_file=locked), f"{locked} are no certificate and its key"),
    ):
        with pytest.raises(ConfigError) as caught:
            tls_context(tls)
        assert words in str(caught.value)
    with pytest.raises(ConfigError, match=r"^host\.tls\.ca_file: .* cannot be read"):
        HostSettings(url="mqtts://h", tls=TlsSettings(ca_file=absent)).tls_context()
    verified = HostSettings(url="mqtts://h", tls=TlsSettings(ca_file=authority.ca, check_hostname=False)).tls_context()
    assert verified is not None
    assert not verified.check_hostname
    assert HostSettings().tls_context() is None


def test_docs_are_up_to_date() -> None:
    """Renew it with: python -c 'from mq2mqtt import settings; print(settings.markdown(), end="")'."""
    assert (DOCS / "configuration.md").read_text(encoding="utf-8") == settings.markdown()


def test_reference_of_a_small_schema() -> None:
    schema = {
        "properties": {
            "n": {"type": "integer", "default": 1, "description": "A number.", "examples": [2, {"a": 1}]},
            "s": {"$ref": "#/$defs/S"},
            "t": {"$ref": "#/$defs/S", "description": "Another."},
        },
        "$defs": {"S": {"description": "A section.", "properties": {"x": {"const": "a||b", "description": "Fixed."}}}},
    }
    assert docgen.markdown(schema, header="# H\n") == (
        "# H\n\n## Top level\n\n| Field | Value | Default | Meaning |\n|---|---|---|---|\n"
        '| `n` | number | `1` | A number. Example: `2`, `{"a": 1}`. |\n\n'
        "## `s`\n\nA section.\n\n| Field | Value | Default | Meaning |\n|---|---|---|---|\n"
        "| `x` | `a\\|\\|b` | required | Fixed. |\n\n"
        "## `t`\n\nAnother.\n\n| Field | Value | Default | Meaning |\n|---|---|---|---|\n"
        "| `x` | `a\\|\\|b` | required | Fixed. |\n"
    )

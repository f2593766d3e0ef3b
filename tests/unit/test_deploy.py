"""What `deploy/` holds: valid, closed to other machines by default, and every alert tested and documented."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from mq2mqtt import settings
from mq2mqtt.host import DropReason
from mq2mqtt.message import MqttMessage
from mq2mqtt.metrics import METRICS
from mq2mqtt.quickstart.rocketmq import DEFAULT_VERSION
from mq2mqtt.spool.frame import encode_publish
from tests.promtool import need_promtool

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
PROMETHEUS = DEPLOY / "prometheus"
HISTOGRAM_SUFFIXES = ("_bucket", "_sum", "_count")


def loaded(path: Path) -> Any:  # noqa: ANN401 - YAML
    return yaml.safe_load(path.read_text())


def alerts() -> dict[str, dict[str, Any]]:
    return {rule["alert"]: rule for group in loaded(PROMETHEUS / "alerts.yml")["groups"] for rule in group["rules"]}


@pytest.fixture(scope="module")
def promtool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return need_promtool(tmp_path_factory.mktemp("promtool"))


@pytest.mark.parametrize(
    "arguments",
    [("check", "config", "prometheus.yml"), ("check", "rules", "alerts.yml"), ("test", "rules", "alerts_test.yml")],
    ids=" ".join,
)
def test_promtool_finds_nothing_wrong(promtool: Path, arguments: tuple[str, ...]) -> None:
    answer = subprocess.run([promtool, *arguments], cwd=PROMETHEUS, check=False, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stdout + answer.stderr


def test_every_alert_is_seen_firing() -> None:
    cases = [case for test in loaded(PROMETHEUS / "alerts_test.yml")["tests"] for case in test["alert_rule_test"]]
    assert {case["alertname"] for case in cases if case["exp_alerts"]} == set(alerts())


def test_every_alert_has_a_section_for_the_one_it_wakes_and_no_section_is_left_over() -> None:
    sections = re.findall(r"^### (Mq2mqtt\w+)$", (ROOT / "docs" / "operations.md").read_text(), re.MULTILINE)
    assert sections == list(alerts())


def test_alerts_ask_for_what_the_bridge_exports() -> None:
    for name, alert in alerts().items():
        for metric in re.findall(r"\bmq2mqtt_\w+", alert["expr"]):
            base = next((metric.removesuffix(end) for end in HISTOGRAM_SUFFIXES if metric.endswith(end)), metric)
            assert base in METRICS, name
        for reasons in re.findall(r'reason=~"([^"]+)"', alert["expr"]):
            assert set(reasons.split("|")) <= set(DropReason), name


def test_the_alert_for_lost_messages_names_the_reasons_that_its_section_explains() -> None:
    text = (ROOT / "docs" / "operations.md").read_text()
    section = text.partition("### Mq2mqttMessagesLost\n")[2].partition("\n### ")[0]
    explained = re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)
    named = re.findall(r'reason=~"([^"]+)"', alerts()["Mq2mqttMessagesLost"]["expr"])
    assert len(named) == 2
    assert [set(reasons.split("|")) for reasons in named] == [set(explained)] * 2


def test_every_reason_of_a_drop_is_explained_to_the_one_it_wakes() -> None:
    text = (ROOT / "docs" / "operations.md").read_text()
    assert [reason for reason in DropReason if f"`{reason}`" not in text] == []


def compose(file: str = "compose.yaml") -> dict[str, Any]:
    # What Compose adds to YAML says how a value is merged, not what it is.
    content: dict[str, Any] = yaml.safe_load(re.sub(r"!(reset|override)\b", "", (DEPLOY / file).read_text()))
    return content


@pytest.mark.parametrize(("file", "ports"), [("compose.yaml", 5), ("compose.mosquitto.yaml", 2)])
def test_every_port_is_published_on_loopback_unless_a_variable_says_otherwise(file: str, ports: int) -> None:
    # The others of compose.mosquitto.yaml are those of compose.yaml.
    published = [port for service in compose(file)["services"].values() for port in service.get("ports", ())]
    assert len(published) == ports
    assert [
        port for port in published if not re.match(r"\$\{[A-Z]+_ADDRESS:-127\.0\.0\.1\}:\$\{[A-Z]+_PORT:-", port)
    ] == []


@pytest.mark.parametrize("file", ["compose.yaml", "compose.mosquitto.yaml"])
def test_every_variable_of_the_deployment_is_listed_at_its_top(file: str) -> None:
    introduction, _, rest = (DEPLOY / file).read_text().partition("\nname: ")
    if file != "compose.yaml":
        rest += (DEPLOY / "compose.yaml").read_text()
    assert [name for name in sorted(set(re.findall(r"\$\{([A-Z_0-9]+)", rest))) if name not in introduction] == []


def test_the_bridge_gets_more_time_to_stop_than_it_takes() -> None:
    grace = re.fullmatch(r"(\d+)s", compose()["services"]["bridge"]["stop_grace_period"])
    assert grace is not None
    assert int(grace[1]) > settings.load(DEPLOY / "config" / "mq2mqtt.yaml").stop_deadline


def test_the_deployed_configuration_keeps_spool_and_store_in_the_volume() -> None:
    (volume,) = (mount.partition(":")[2] for mount in compose()["x-bridge"]["volumes"] if mount.startswith("spool:"))
    deployed = settings.load(DEPLOY / "config" / "mq2mqtt.yaml")
    assert deployed.spool.path.is_relative_to(volume)
    assert deployed.store.url.startswith(f"sqlite+aiosqlite:///{volume}/")
    assert f"\nVOLUME {volume}\n" in (DEPLOY / "Dockerfile").read_text()


def test_mosquitto_and_the_sidecar_share_the_spool_and_the_socket_in_volumes() -> None:
    services, image = compose("compose.mosquitto.yaml")["services"], (DEPLOY / "Dockerfile.mosquitto").read_text()
    deployed = settings.load(DEPLOY / "config-mosquitto" / "mq2mqtt.yaml")
    broker = (DEPLOY / "config-mosquitto" / "mosquitto.conf").read_text()
    socket = deployed.host.url.removeprefix("unix://")
    assert f"\nplugin_opt_spool {deployed.spool.path}\n" in broker
    assert f"\nplugin_opt_socket {socket}\n" in broker
    assert f"\nlistener 0 {socket}\n" in broker
    assert deployed.store.url == "sqlite+aiosqlite:////var/lib/mq2mqtt/mq2mqtt.db"
    assert "store:/var/lib/mq2mqtt" in services["bridge"]["volumes"]
    for volume in (f"spool:{deployed.spool.path}", f"socket:{Path(socket).parent}"):
        assert volume in services["mosquitto"]["volumes"]
        assert volume in services["bridge"]["volumes"]
        directory = volume.partition(":")[2]
        # Made with the same owner in both images: a new volume gets it from the one that comes first.
        assert f" -m 0700 /var/lib/mosquitto {deployed.spool.path} {Path(socket).parent}\n" in image
        assert re.search(rf" -m 0700 .*{directory}\b", (DEPLOY / "Dockerfile").read_text())


def test_both_deployments_run_the_same_broker_of_rocketmq() -> None:
    def lines(file: str) -> list[str]:
        text = compose(file)["configs"]["broker"]["content"]
        return [line for line in text.splitlines() if not line.startswith("#")]

    assert lines("compose.mosquitto.yaml") == lines("compose.yaml")


def test_the_deployment_runs_the_rocketmq_that_is_tested_most() -> None:
    images = [service["image"] for service in compose()["services"].values() if "rocketmq" in service["image"]]
    assert set(images) == {f"apache/rocketmq:${{ROCKETMQ_VERSION:-{DEFAULT_VERSION}}}"}


def test_the_frame_that_the_backlog_is_reckoned_with_is_the_real_one() -> None:
    text = (ROOT / "docs" / "operations.md").read_text()
    stated = re.search(r"makes frames of (\d+) bytes", text)
    assert stated is not None
    message = MqttMessage("sensors/room1/temp", bytes(64), client_id="GID_dev@@@1")
    frame = len(encode_publish(message, accepted_us=1))
    assert frame == int(stated[1])
    hours = 2**30 / (100 * frame) / 3600
    assert f"| 100 | {hours:.0f} hours |" in text

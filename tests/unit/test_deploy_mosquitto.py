"""What `deploy/` holds for Mosquitto on Debian: one set of names, and what systemd and Mosquitto say to it."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from mq2mqtt import settings
from mq2mqtt.quickstart.ports import free_port
from mq2mqtt.quickstart.prerequisites import find_program
from tests.bridge_process import wait_for
from tests.mosquitto import hook_library

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
SYSTEMD = DEPLOY / "systemd"
SIDECAR = SYSTEMD / "mq2mqtt-sidecar.service"
EXPOSURE_AT_MOST = 15
"""Tenths of the points of `systemd-analyze security`."""


def broker_options() -> dict[str, str]:
    lines = (DEPLOY / "mosquitto.conf").read_text().splitlines()
    return dict(line.split(maxsplit=1) for line in lines if line and not line.startswith("#"))


def unit(path: Path) -> dict[str, str]:
    return dict(re.findall(r"^(\w+)=(.*)$", path.read_text(), re.MULTILINE))


def need(program: str) -> str:
    found = shutil.which(program)
    if found is None:
        pytest.skip(f"there is no {program}")
    return found


def test_the_broker_the_sidecar_and_the_machine_mean_the_same_files(tmp_path: Path) -> None:
    broker, sidecar, text = broker_options(), unit(SIDECAR), (SYSTEMD / "mq2mqtt.yaml").read_text()
    token = f"token: file://{broker['plugin_opt_token_file']}\n"
    assert token in text
    (tmp_path / "mq2mqtt.yaml").write_text(text.replace(token, "token: not from a file\n"))
    loaded = settings.load(tmp_path / "mq2mqtt.yaml")
    spool = broker["plugin_opt_spool"]
    assert str(loaded.spool.path) == spool
    assert sidecar["ReadWritePaths"] == unit(SYSTEMD / "mosquitto.conf")["ReadWritePaths"] == spool
    assert loaded.store.url == f"sqlite+aiosqlite:////var/lib/{sidecar['StateDirectory']}/mq2mqtt.db"
    assert f"d {spool} 2770 mq2mqtt mq2mqtt -\n" in (SYSTEMD / "mq2mqtt.tmpfiles").read_text()
    assert loaded.host.url == "mqtt://{1}:{0}".format(*broker["listener"].split())
    assert int(sidecar["TimeoutStopSec"]) > loaded.stop_deadline


def test_the_walk_through_names_files_that_are_there() -> None:
    page = (ROOT / "docs" / "mosquitto.md").read_text()
    named = set(re.findall(r"(?<![\w/])(?:deploy|plugins|requirements|scripts)/[\w./-]*\w", page))
    assert len(named) >= 8
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_the_hook_is_installed_where_mosquitto_looks_for_it(tmp_path: Path) -> None:
    hook = hook_library()
    # It is built: make only copies it.
    command = ["make", "-s", f"--directory={ROOT / 'plugins' / 'mosquitto_hook'}", "install"]
    command += [f"BUILD={hook.parent}", f"--assume-old={hook}", f"DESTDIR={tmp_path}"]
    subprocess.run(command, check=True)
    assert (tmp_path / broker_options()["plugin"].removeprefix("/")).is_file()


def test_systemd_finds_nothing_wrong(tmp_path: Path) -> None:
    analyze = need("systemd-analyze")
    (tmp_path / SIDECAR.name).write_text(SIDECAR.read_text().replace("/opt/mq2mqtt/bin/mq2mqtt", "/bin/true"))
    (tmp_path / "mosquitto.service").write_text("[Service]\nExecStart=/bin/true\n")
    drop_in = tmp_path / "mosquitto.service.d" / "mq2mqtt.conf"
    drop_in.parent.mkdir()
    shutil.copy(SYSTEMD / "mosquitto.conf", drop_in)
    units = [str(tmp_path / SIDECAR.name), str(tmp_path / "mosquitto.service")]
    answer = subprocess.run([analyze, "verify", *units], check=False, capture_output=True, text=True)
    assert (answer.returncode, answer.stdout + answer.stderr) == (0, "")


def test_the_sidecar_is_confined() -> None:
    command = [need("systemd-analyze"), "security", "--offline=true", f"--threshold={EXPOSURE_AT_MOST}", str(SIDECAR)]
    answer = subprocess.run(command, check=False, capture_output=True, text=True, env=os.environ | {"LC_ALL": "C"})
    assert answer.returncode == 0, answer.stdout


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files to others")
def test_users_and_directories_let_both_write_the_lanes(tmp_path: Path) -> None:
    sysusers, tmpfiles = need("systemd-sysusers"), need("systemd-tmpfiles")
    (tmp_path / "etc").mkdir()
    for program, file in ((sysusers, "mq2mqtt.sysusers"), (tmpfiles, "mq2mqtt.tmpfiles")):
        create = ["--create"] if program == tmpfiles else []
        command = [program, *create, f"--root={tmp_path}", str(SYSTEMD / file)]
        subprocess.run(command, check=True, capture_output=True)
    groups = dict(line.split(":", 1) for line in (tmp_path / "etc" / "group").read_text().splitlines())
    number, members = groups["mq2mqtt"].split(":")[1:]
    assert members == "mosquitto"
    spool = (tmp_path / "var" / "spool" / "mq2mqtt").stat()
    assert (oct(spool.st_mode), spool.st_gid) == ("0o42770", int(number))


def _has_ended(mosquitto: subprocess.Popen[bytes]) -> bool:
    # It forgets a signal that comes between its last line in the log and the beginning of its loop.
    mosquitto.terminate()
    return mosquitto.poll() is not None


def test_mosquitto_takes_the_configuration_and_complains_about_nothing(tmp_path: Path) -> None:
    hook, mosquitto, port = hook_library(), find_program("mosquitto"), free_port()
    assert mosquitto is not None
    (tmp_path / "spool").mkdir()
    (tmp_path / "token").write_text("of no more use than this test\n")
    text = (DEPLOY / "mosquitto.conf").read_text()
    for there, here in (
        ("listener 1883", f"listener {port}"),
        (broker_options()["plugin"], str(hook)),
        ("plugin_opt_spool /var/spool/mq2mqtt", f"plugin_opt_spool {tmp_path / 'spool'}"),
        (broker_options()["plugin_opt_token_file"], str(tmp_path / "token")),
    ):
        assert there in text
        text = text.replace(there, here)
    config, log = tmp_path / "mosquitto.conf", tmp_path / "log"
    # As root it would become another user, who cannot read this directory.
    config.write_text(text + "user root\nlog_type all\n")
    with log.open("wb") as output:
        process = subprocess.Popen([mosquitto, "-c", str(config)], stdout=output, stderr=output)
    try:
        wait_for(lambda: re.search(r"version \S+ running", log.read_text()), what=log.read_text)
    finally:
        wait_for(lambda: _has_ended(process), what=log.read_text)
    assert process.returncode == 0
    lines = [line for line in log.read_text().splitlines() if "should not be run as root" not in line]
    assert [line for line in lines if re.search("error|warning|deprecated", line, re.IGNORECASE)] == []
    assert any("hook: version" in line for line in lines)

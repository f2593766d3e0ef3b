"""What `mq2mqtt check --mosquitto-conf` makes of Mosquitto's configuration."""

import shutil
from pathlib import Path

import pytest

from mq2mqtt.errors import ConfigError
from mq2mqtt_mosquitto.mosquitto_conf import advice, read_conf

DEPLOYED = Path(__file__).parents[3] / "deploy" / "mosquitto.conf"
SPOOL = Path("/var/spool/mq2mqtt")


def wrong(path: Path) -> list[str]:
    return [found.text for found in advice(read_conf(path), spool=SPOOL) if found.wrong]


@pytest.fixture
def conf(tmp_path: Path) -> Path:
    """Return what is deployed, with what Debian's own file has."""
    path = Path(shutil.copy(DEPLOYED, tmp_path / "mosquitto.conf"))
    path.write_text(f"{path.read_text()}\npersistence true\n\n")
    return path


def test_what_is_deployed_is_right(conf: Path) -> None:
    assert wrong(conf) == []


@pytest.mark.parametrize(
    ("line", "instead", "reason"),
    [
        ("set_tcp_nodelay true", "", "set_tcp_nodelay is false"),
        ("max_queued_messages 1000000", "", "max_queued_messages is 1000: "),
        ("max_queued_messages 1000000", "max_queued_messages 0", "max_queued_messages is 0: "),
        ("max_queued_bytes 67108864", "", "max_queued_bytes is not set"),
        ("persistence true", "persistence true\nmessage_size_limit 65536", "message_size_limit is 65536: "),
        ("persistence true", "", "persistence is false"),
        ("autosave_interval 300", "autosave_interval 0", "autosave_interval is 0"),
        ("per_listener_settings false", "per_listener_settings true", "per_listener_settings is true"),
        ("plugin_opt_spool /var/spool/mq2mqtt", "plugin_opt_spool /elsewhere", "plugin_opt_spool is /elsewhere"),
        ("plugin /usr/lib/mq2mqtt/mq2mqtt_hook.so", "plugin /usr/lib/other.so", "no line `plugin .../mq2mqtt_hook.so`"),
        ("allow_anonymous true", "allow_anonymous false", "plugin_opt_auth is allow, which lets everybody in"),
        ("allow_anonymous true", "password_file /p", "plugin_opt_auth is allow, which lets everybody in"),
        ("plugin_opt_auth allow", "plugin_opt_auth defer", "plugin_opt_auth is defer without a password_file"),
        ("plugin_opt_acl allow", "plugin_opt_acl defer", "plugin_opt_acl is defer without an acl_file"),
        ("allow_anonymous true", "allow_anonymous true\nacl_file /a", "plugin_opt_acl is allow, so that acl_file is"),
    ],
)
def test_what_is_otherwise_is_named(conf: Path, line: str, instead: str, reason: str) -> None:
    text = conf.read_text()
    assert f"\n{line}\n" in text
    conf.write_text(text.replace(f"\n{line}\n", f"\n{instead}\n"))
    (found,) = wrong(conf)
    assert found.startswith(reason)


def test_logins_go_with_defer(conf: Path) -> None:
    text = conf.read_text().replace("\nplugin_opt_auth allow\n", "\nplugin_opt_auth defer\n")
    conf.write_text(text.replace("\nallow_anonymous true\n", "\nallow_anonymous false\npassword_file /p\n"))
    assert wrong(conf) == []


def test_a_token_that_everybody_can_read_is_named(conf: Path, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("of no more use than this test\n")
    token.chmod(0o644)
    conf.write_text(conf.read_text().replace("/etc/mq2mqtt/token", str(token)))
    assert [text.partition(",")[0] for text in wrong(conf)] == [f"{token} is open to everybody"]


def test_files_of_include_dir_count(conf: Path, tmp_path: Path) -> None:
    (tmp_path / "conf.d").mkdir()
    (tmp_path / "conf.d" / "b.conf").write_text("set_tcp_nodelay false\n")
    (tmp_path / "conf.d" / "a.conf").write_text("set_tcp_nodelay true\n# max_queued_bytes 0\n")
    (tmp_path / "conf.d" / "c.bak").write_text("set_tcp_nodelay true\n")
    conf.write_text(f"{conf.read_text()}include_dir {tmp_path / 'conf.d'}\n")
    (found,) = wrong(conf)
    assert found.startswith("set_tcp_nodelay is false")


def test_options_of_another_plugin_are_not_the_hooks(conf: Path) -> None:
    conf.write_text(f"{conf.read_text()}plugin /usr/lib/other.so\nplugin_opt_spool /elsewhere\n")
    assert wrong(conf) == []


@pytest.mark.parametrize("name", ["global_plugin", "plugin_load mq2mqtt"])
def test_lines_of_mosquitto_2_1_load_the_hook_too(conf: Path, name: str) -> None:
    conf.write_text(conf.read_text().replace("\nplugin /usr", f"\n{name} /usr"))
    assert wrong(conf) == []


def test_a_file_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^--mosquitto-conf: cannot read .*no\.conf: No such file or directory$"):
        read_conf(tmp_path / "no.conf")

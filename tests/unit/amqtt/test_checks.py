import pytest

from mq2mqtt.errors import ConfigError
from mq2mqtt.settings import Settings
from mq2mqtt_amqtt.checks import check_plugins
from mq2mqtt_amqtt.run import _broker_config, run_broker

PLUGIN = "amqtt.plugins.authentication.AnonymousAuthPlugin"


@pytest.mark.parametrize("options", [{}, None, {"allow_anonymous": True}])
def test_a_plugin_that_makes_sessions_anonymous_is_a_problem(
    options: object, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check_plugins(Settings.model_validate({"mqtt": {"amqtt": {"plugins": {PLUGIN: options}}}})) == 1
    out = capsys.readouterr().out
    assert out.startswith(f"PROBLEM  mqtt.amqtt.plugins: {PLUGIN}")
    assert "mqtt.allow_anonymous" in out


@pytest.mark.parametrize(
    "amqtt",
    [{}, {"plugins": None}, {"plugins": {"some.AuthPlugin": {}}}, {"plugins": {PLUGIN: {"allow_anonymous": False}}}],
)
def test_other_plugins_are_none(amqtt: dict[str, object], capsys: pytest.CaptureFixture[str]) -> None:
    assert check_plugins(Settings.model_validate({"mqtt": {"amqtt": amqtt}})) == 0
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    ("amqtt", "problem"),
    [
        ({"plugins": ["a"]}, "mqtt.amqtt.plugins: write a mapping of plugin class to its settings"),
        ({"listeners": ["a"]}, "mqtt.amqtt.listeners: write a mapping of listener name to its settings"),
        (
            {"listeners": {"ws": "a"}},
            "mqtt.amqtt.listeners.ws: write a mapping of its settings, as in {type: ws, bind: HOST:PORT}",
        ),
    ],
)
async def test_what_is_no_mapping_is_said_in_one_line(amqtt: dict[str, object], problem: str) -> None:
    settings = Settings.model_validate({"mqtt": {"amqtt": amqtt}})
    with pytest.raises(ConfigError) as checked:
        check_plugins(settings)
    with pytest.raises(ConfigError) as run:
        await run_broker(settings)
    assert str(checked.value) == str(run.value) == problem


@pytest.mark.parametrize("listeners", [None, {}, {"default": None}, {"default": {}, "ws": None}])
def test_an_empty_section_is_left_out(listeners: object) -> None:
    settings = Settings.model_validate({"mqtt": {"amqtt": {"listeners": listeners, "plugins": None}}})
    assert _broker_config(settings, None)["listeners"] == {"default": {"type": "tcp", "bind": "127.0.0.1:1883"}}

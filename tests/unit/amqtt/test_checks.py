import pytest

from mq2mqtt.settings import Settings
from mq2mqtt_amqtt.checks import check_plugins

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
    [{}, {"plugins": ["a"]}, {"plugins": {"some.AuthPlugin": {}}}, {"plugins": {PLUGIN: {"allow_anonymous": False}}}],
)
def test_other_plugins_are_none(amqtt: dict[str, object], capsys: pytest.CaptureFixture[str]) -> None:
    assert check_plugins(Settings.model_validate({"mqtt": {"amqtt": amqtt}})) == 0
    assert not capsys.readouterr().out

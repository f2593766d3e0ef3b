"""An amqtt broker of one's own, started by its `amqtt` command, with the bridge's plugin in it."""

import signal
import sys
from pathlib import Path

import yaml

from tests.bridge_process import BridgeProcess

_COMMAND = Path(sys.executable).parent / "amqtt"


class StockAmqtt(BridgeProcess):
    """Like `mq2mqtt run`, but the process is amqtt's, which dies of SIGHUP: the plugin watches the file itself.

    `auth` is the plugin that lets everybody in.
    """

    auth = "amqtt.plugins.authentication.AnonymousAuthPlugin"

    def write_config(self) -> None:
        super().write_config()
        config = {
            "listeners": {"default": {"type": "tcp", "bind": f"127.0.0.1:{self.mqtt_port}"}},
            "plugins": {
                self.auth: {"allow_anonymous": True},
                "mq2mqtt_amqtt.BridgePlugin": {"config_file": str(self.config_file)},
            },
        }
        (self.directory / "amqtt.yaml").write_text(yaml.safe_dump(config))

    def command_line(self) -> list[str]:
        return [str(_COMMAND), "-c", str(self.directory / "amqtt.yaml")]

    def ask_for_reload(self) -> None:
        """Nobody asks: the plugin sees it."""

    def stop(self) -> int:
        assert self.process is not None
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(timeout=60)

"""Mosquitto without the hook, and `mq2mqtt sidecar` as a client of it: what `BridgeProcess` is for amqtt."""

from pathlib import Path
from typing import Any

from tests.bridge_process import BridgeProcess
from tests.plain_mosquitto import PlainMosquitto


class PlainBridge(BridgeProcess):
    """Two processes. `process` is the sidecar; `kill` ends it alone, `stop` both."""

    def __init__(self, directory: Path, *, namesrv: str, rules: list[dict[str, Any]]) -> None:
        super().__init__(directory, namesrv=namesrv, rules=rules)
        del self.config["mqtt"]
        self.config["host"] = {"type": "mqtt", "url": f"mqtt://127.0.0.1:{self.mqtt_port}"}
        self.broker = PlainMosquitto(directory / "mosquitto", port=self.mqtt_port)

    def launch(self) -> None:
        """Start both and wait for nothing; a broker that runs goes on."""
        if self.broker.process is None or self.broker.process.poll() is not None:
            self.broker.launch()
        super().launch()

    def command_line(self) -> list[str]:
        return self._command_line("sidecar")

    def log(self) -> str:
        return f"{super().log()}\n-- mosquitto --\n{self.broker.log()}"

    def stop(self) -> int:
        """SIGTERM to both, the sidecar first; return its exit code."""
        try:
            return super().stop()
        finally:
            assert self.broker.stop() == 0, self.broker.log()

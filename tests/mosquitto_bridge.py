"""Mosquitto with the hook, and `mq2mqtt sidecar` beside it: what `BridgeProcess` is for amqtt."""

import sys
from pathlib import Path
from typing import Any

from tests.bridge_process import BridgeProcess
from tests.mosquitto import TOKEN, Mosquitto


class MosquittoBridge(BridgeProcess):
    """Two processes. `process` is the sidecar; what ends the bridge, ends the broker too."""

    def __init__(self, directory: Path, *, namesrv: str, rules: list[dict[str, Any]]) -> None:
        super().__init__(directory, namesrv=namesrv, rules=rules)
        del self.config["mqtt"]
        self.config["host"] = {"url": f"mqtt://127.0.0.1:{self.mqtt_port}", "token": TOKEN}
        self.broker = Mosquitto(directory / "mosquitto", spool=self.spool, port=self.mqtt_port)

    @property
    def spool(self) -> Path:
        return self.directory / str(self.config["spool"]["path"])

    def launch(self) -> None:
        """Start both and wait for nothing; what runs goes on."""
        if self.broker.process is None or self.broker.process.poll() is not None:
            self.broker.spool = self.spool
            self.broker.launch()
        if self.process is None or self.process.poll() is not None:
            super().launch()

    def command_line(self) -> list[str]:
        return [sys.executable, "-m", "mq2mqtt", "sidecar", "-c", str(self.config_file)]

    def _answers(self, *, ready: bool) -> bool:
        # Until the hook knows the rules, it leaves what devices publish to the broker.
        return super()._answers(ready=ready) and (self.spool / "lanes.table").exists()

    def log(self) -> str:
        return f"{super().log()}\n-- mosquitto --\n{self.broker.log()}"

    def kill_sidecar(self) -> None:
        """`kill -9` the sidecar alone; `broker.kill` does the same to Mosquitto."""
        super().kill()

    def kill(self) -> None:
        """`kill -9` both."""
        self.kill_sidecar()
        self.broker.kill()

    def stop(self) -> int:
        """SIGTERM to both, the sidecar first; return its exit code."""
        code = super().stop()
        assert self.broker.stop() == 0, self.broker.log()
        return code

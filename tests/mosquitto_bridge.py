"""Mosquitto with the hook, and `mq2mqtt sidecar` beside it: what `BridgeProcess` is for amqtt."""

from pathlib import Path
from typing import Any

from mq2mqtt import settings
from mq2mqtt_mosquitto.table import lane_table
from tests.bridge_process import BridgeProcess, wait_for
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
        return self._command_line("sidecar")

    def reload(self, *, text: str | None = None, outcome: str = "applied") -> None:
        super().reload(text=text, outcome=outcome)
        if text is None:
            wait_for(self._hook_knows_the_rules, what=self.describe_reload)

    def _answers(self, *, ready: bool) -> bool:
        return super()._answers(ready=ready) and self._hook_knows_the_rules()

    def _hook_knows_the_rules(self) -> bool:
        """Until then it leaves what devices publish to the broker, or goes by the rules before."""
        wanted = settings.load(self.config_file)
        table = self.spool / "lanes.table"
        return table.exists() and table.read_bytes() == lane_table(wanted, wanted.rule_set)

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
        try:
            code = super().stop()
        finally:
            ended = self.broker.stop()
        assert ended == 0, self.broker.log()
        return code

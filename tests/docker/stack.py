"""A file of `deploy/` for Compose brought up under a project name of its own, on free ports."""

import json
import os
import shutil
import subprocess
import urllib.parse
import urllib.request
import uuid
from pathlib import Path
from typing import Any

from docker import DockerClient
from docker.models.containers import Container

from mq2mqtt.quickstart.ports import free_ports
from tests.bridge_process import wait_for

_DEPLOY = Path(__file__).parents[2] / "deploy"
_PORTS = ("MQTT_PORT", "NAMESRV_PORT", "BROKER_PORT", "ADMIN_PORT", "PROMETHEUS_PORT")
_COMPOSE_SECONDS = 600
# As in compose.yaml, and without keys for TLS, which take half of the CPU time until they are up.
_JAVA = {
    "NAMESRV_JAVA_OPT": "-Xms128m -Xmx256m -Xmn64m -XX:TieredStopAtLevel=1 -Dtls.server.mode=disabled",
    "BROKER_JAVA_OPT": "-Xms256m -Xmx512m -Xmn128m -XX:MaxDirectMemorySize=512m -Dtls.server.mode=disabled",
}


class Stack:
    """The services of a Compose file. `up` before anything else; `down` leaves nothing behind."""

    def __init__(
        self, engine: DockerClient, directory: Path, *, file: str = "compose.yaml", config: str = "config"
    ) -> None:
        self._engine = engine
        self._file = _DEPLOY / file
        self.config_file = shutil.copytree(_DEPLOY / config, directory / "config") / "mq2mqtt.yaml"
        self.project = f"mq2mqtt-test-{uuid.uuid4().hex[:8]}"
        self._ports = dict(zip(_PORTS, free_ports(len(_PORTS)), strict=True))
        self.mqtt_port = self._ports["MQTT_PORT"]
        self.namesrv = f"127.0.0.1:{self._ports['NAMESRV_PORT']}"

    def compose(self, *arguments: str, **variables: str) -> str:
        """Run `docker compose ARGUMENTS` with more environment `variables`; return what it says."""
        command = ["docker", "compose", "--project-name", self.project, "--file", str(self._file)]
        ports = {name: str(port) for name, port in self._ports.items()}
        answer = subprocess.run(
            [*command, *arguments],
            # No .env of a developer, and no variable of the test's own environment.
            env={name: os.environ[name] for name in ("PATH", "HOME", "DOCKER_HOST") if name in os.environ}
            | ports
            | _JAVA
            | {"CONFIG_DIRECTORY": str(self.config_file.parent), "MQ2MQTT_VERSION": self.project}
            | {"COMPOSE_DISABLE_ENV_FILE": "1"}
            | variables,
            check=False,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=_COMPOSE_SECONDS,
        )
        assert answer.returncode == 0, f"docker compose {' '.join(arguments)}:\n{answer.stdout[-4000:]}"
        return answer.stdout

    def up(self) -> None:
        """Bring everything up, and wait until the topics are there and every rule is up."""
        self.compose("up", "--build", "--detach")
        self.wait_ready()

    def down(self) -> None:
        """Take everything down, with volumes and the images that were built."""
        self.compose("down", "--volumes", "--remove-orphans", "--timeout", "1")
        for image in self._images():
            self._engine.images.remove(image)

    def _images(self) -> list[str]:
        # Under this name nobody else has any.
        tags = (tag for image in self._engine.images.list() for tag in image.tags)
        return [tag for tag in tags if tag.endswith(f":{self.project}")]

    def leftovers(self) -> list[str]:
        """Name the containers, volumes, networks and images of this project that the engine still has."""
        mine = {"label": f"com.docker.compose.project={self.project}"}
        containers = self._engine.containers.list(all=True, filters=mine)
        things = [*containers, *self._engine.volumes.list(filters=mine), *self._engine.networks.list(filters=mine)]
        return [thing.name for thing in things] + self._images()

    def container(self, service: str) -> Container:
        """Return the one container of `service`, as it is now."""
        labels = [f"com.docker.compose.project={self.project}", f"com.docker.compose.service={service}"]
        (container,) = self._engine.containers.list(all=True, filters={"label": labels})
        return container

    def wait_ready(self) -> None:
        """Wait until `/readyz` says 200."""
        wait_for(self._is_ready, seconds=120, what=self._describe)

    def _is_ready(self) -> bool:
        try:
            return bool(self._get("ADMIN_PORT", "/readyz")["ready"])
        except OSError:
            return False

    def rules_up(self) -> set[str]:
        """Return the ids of the rules that `/readyz` calls up."""
        try:
            rules = self._get("ADMIN_PORT", "/readyz")["rules"]
        except OSError:
            return set()
        return {rule["id"] for rule in rules if rule["state"] == "up"}

    def _describe(self) -> str:
        return "not ready\n" + self.compose("ps", "--all") + self.compose("logs", "--tail", "20")

    def asked_of_prometheus(self, query: str) -> list[tuple[dict[str, str], float]]:
        """Return labels and value of each series that `query` finds now; none while Prometheus does not answer."""
        try:
            answer = self._get("PROMETHEUS_PORT", "/api/v1/query?" + urllib.parse.urlencode({"query": query}))
        except OSError:
            return []
        return [(series["metric"], float(series["value"][1])) for series in answer["data"]["result"]]

    def alerts_of_prometheus(self) -> dict[str, dict[str, Any]]:
        """Return the alert rules that Prometheus has loaded, by name."""
        groups = self._get("PROMETHEUS_PORT", "/api/v1/rules")["data"]["groups"]
        return {rule["name"]: rule for group in groups for rule in group["rules"]}

    def _get(self, port: str, path: str) -> dict[str, Any]:
        url = f"http://127.0.0.1:{self._ports[port]}{path}"
        with urllib.request.urlopen(url, timeout=20) as response:
            content: dict[str, Any] = json.load(response)
        return content

"""An engine to deploy on, or the reason why there is none."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import docker
import pytest
import yaml
from docker import DockerClient
from docker.errors import APIError, DockerException, ImageNotFound

from tests.docker.stack import Stack

_COMPOSE_FILE = Path(__file__).parents[2] / "deploy" / "compose.yaml"


def _give_up(reason: str) -> None:
    if os.environ.get("MQ2MQTT_REQUIRE_DOCKER") == "1":
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def engine() -> Iterator[DockerClient]:
    """A Docker engine with `docker compose`."""
    with contextlib.ExitStack() as stack:
        try:
            client = stack.enter_context(contextlib.closing(docker.from_env()))
            client.ping()
        except DockerException as error:
            _give_up(f"no Docker engine answers here: {error}")
        if subprocess.run(["docker", "compose", "version"], check=False, capture_output=True).returncode != 0:
            _give_up("this Docker has no `docker compose`")
        yield client


def _need_prometheus(engine: DockerClient) -> None:
    """Get the image of `compose.yaml`, or build Debian's Prometheus under its name where it cannot be pulled."""
    variable: str = yaml.safe_load(_COMPOSE_FILE.read_text())["services"]["prometheus"]["image"]
    name = variable.replace("${PROMETHEUS_VERSION:-", "").rstrip("}")
    try:
        engine.images.get(name)
    except ImageNotFound:
        try:
            engine.images.pull(name)
        except APIError:
            directory = Path(__file__).parent
            engine.images.build(path=str(directory), dockerfile="prometheus.Dockerfile", tag=name, rm=True)


@pytest.fixture(scope="module")
def stack(
    request: pytest.FixtureRequest, engine: DockerClient, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stack]:
    """The deployment that a module's DEPLOYMENT names, up and ready. Its tests share it and leave it ready."""
    _need_prometheus(engine)
    stack = Stack(engine, tmp_path_factory.mktemp("deployment"), **request.module.DEPLOYMENT)
    try:
        stack.up()
        yield stack
    finally:
        stack.down()

import socket
import subprocess
import sys

import pytest

from mq2mqtt.quickstart import ports as module
from mq2mqtt.quickstart.ports import free_base, free_port, free_ports, is_free


def test_a_port_that_listens_is_not_free() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert not is_free(port)
        assert free_port(port) != port


def test_the_preferred_port_is_taken_when_free() -> None:
    port = free_port()
    assert free_port(port) == port


def test_ports_are_different_and_free() -> None:
    ports = free_ports(3)
    assert len(set(ports)) == 3
    assert all(is_free(port) for port in ports)


def test_a_base_has_all_its_neighbours_free() -> None:
    base = free_base((-2, 0, 1))
    assert all(is_free(base + offset) for offset in (-2, 0, 1))


def test_nobody_gets_what_another_one_got_and_does_not_use_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RANGE", range(31_900, 31_950))
    given = [port for _ in range(5) for port in (free_port(), *free_ports(3))]
    assert len(set(given)) == len(given)
    assert set(given) <= set(module.RANGE)


def test_no_other_process_gets_it_either() -> None:
    port = free_port()
    assert is_free(port)
    program = f"from mq2mqtt.quickstart.ports import free_port; print(free_port({port}))"
    ended = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert int(ended.stdout) != port

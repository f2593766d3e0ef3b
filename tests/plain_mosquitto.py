"""Mosquitto as it is packaged, without the hook, for tests."""

from pathlib import Path

from tests.mosquitto import Mosquitto


class PlainMosquitto(Mosquitto):
    """A broker that anybody may use. `options` are more lines of its configuration."""

    def __init__(self, directory: Path, *, port: int | None = None, options: tuple[str, ...] = ()) -> None:
        super().__init__(directory, spool=directory, port=port, options=options)

    def hook_lines(self) -> list[str]:
        return []

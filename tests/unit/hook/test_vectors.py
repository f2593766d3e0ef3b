"""The golden vectors of batches that hook and sidecar share."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.unit.hook.batches import Operation
from tests.unit.hook.driver import Driver, text

VECTORS: dict[str, list[dict[str, Any]]] = json.loads(
    (Path(__file__).parents[2] / "data" / "control_v1.json").read_text("utf-8")
)


def name_of(vector: dict[str, Any]) -> str:
    return str(vector["name"])


@pytest.mark.parametrize("vector", VECTORS["batches"], ids=name_of)
def test_a_batch(vector: dict[str, Any], driver: Driver) -> None:
    operations = [
        Operation(
            one["code"],
            one["qos"],
            one["client_id"].encode(),
            one["topic"].encode(),
            bytes.fromhex(one["properties"]),
            bytes.fromhex(one["payload"]),
        )
        for one in vector["operations"]
    ]
    fields = [[str(one.code), str(one.qos), *map(text, one[2:])] for one in operations]
    expected = ["sound", str(len(operations)), str(vector["number"]), *(field for one in fields for field in one)]
    assert driver.ask("control", vector["bytes"]) == " ".join(expected)


@pytest.mark.parametrize("vector", VECTORS["refused_batches"], ids=name_of)
def test_a_batch_that_is_refused(vector: dict[str, Any], driver: Driver) -> None:
    assert driver.ask("control", vector["bytes"]).startswith(f"refused {vector['position']} ")

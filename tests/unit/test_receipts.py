import json
from pathlib import Path

from mq2mqtt.host import Outcome
from mq2mqtt.receipts import Receipt, ReceiptBook
from mq2mqtt.spool.lane import Lane
from mq2mqtt.spool.reader import LaneReader
from mq2mqtt.telemetry import Direction, RuleTelemetry


def test_a_client_id_makes_no_properties_of_its_own(tmp_path: Path) -> None:
    lane = Lane.open(tmp_path / "commands-in.receipts", max_bytes=1 << 20, target="t")
    book = ReceiptBook(node="n1")
    book.attach("commands-in", lane, RuleTelemetry("commands-in.receipts", direction=Direction.UPLINK))
    client_id = "a\x02TAGS\x01delivered"
    receipt = Receipt("7F00", "order-1").text()
    book.tell("commands-in", Outcome.QUEUED, receipt, client_id=client_id, topic="devices/a")
    reader = LaneReader(lane)
    (entry,) = reader.read(max_messages=1)
    pairs = [item.split("\x01") for item in entry.frame.properties.decode().split("\x02") if item]
    assert pairs == [
        ["TAGS", "queued"],
        ["KEYS", "order-1"],
        ["mq2mqttNode", "n1"],
        ["mqttTopic", "devices/a"],
        ["origMsgId", "7F00"],
    ]
    assert json.loads(entry.frame.payload)["clientId"] == client_id
    reader.close()
    lane.close()

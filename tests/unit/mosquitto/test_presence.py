import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from mq2mqtt.message import ClientEvent
from mq2mqtt.spool.frame import Frame, FrameKind
from mq2mqtt_mosquitto.control import ConnectedClient
from mq2mqtt_mosquitto.presence import Presence


def frame(client_id: str, kind: str, channel: str, **more: Any) -> Frame:  # noqa: ANN401 - fields of JSON
    payload = {"type": kind, "channelId": channel, "clientIp": "10.0.0.1", "time": 5, "cleanSession": True, **more}
    return Frame(FrameKind.EVENT, 0, 0, client_id, "", b"", json.dumps(payload).encode())


class Table:
    def __init__(self) -> None:
        self.told: list[tuple[str, str, str]] = []
        self.asked = 0
        self.presence = Presence(tell=self._tell, ask=self._ask)

    def _tell(self, event: ClientEvent) -> None:
        self.told.append((event.client_id, event.type.value, event.channel_id))

    def _ask(self) -> None:
        self.asked += 1

    def take(self, offset: int, client_id: str, kind: str, channel: str = "") -> None:
        self.presence.take(offset, frame(client_id, kind, channel))

    @property
    def online(self) -> dict[str, str]:
        return {name: client.channel_id for name, client in self.presence.online.items()}


def listed(**clients: str) -> list[ConnectedClient]:
    return [ConnectedClient(name, channel, "", 0, clean_session=True) for name, channel in clients.items()]


def test_comings_and_goings() -> None:
    table = Table()
    table.take(1, "a", "connect", "1")
    table.take(2, "b", "connect", "2")
    table.take(3, "a", "disconnect", "1")
    table.take(4, "b", "tcpclean", "2")
    assert table.online == {}
    assert table.told == [
        ("a", "connect", "1"),
        ("b", "connect", "2"),
        ("a", "disconnect", "1"),
        ("a", "tcpclean", "1"),
        ("b", "tcpclean", "2"),
    ]


def test_a_take_over_in_either_order() -> None:
    table = Table()
    table.take(1, "a", "connect", "1")
    table.take(2, "a", "connect", "2")
    table.take(3, "a", "tcpclean", "1")
    assert table.online == {"a": "2"}
    assert [kind for _, kind, _ in table.told] == ["connect", "tcpclean", "connect"]


def test_a_broker_that_ends_or_begins_has_no_clients() -> None:
    for kind in ("boot", "shutdown"):
        table = Table()
        table.take(1, "a", "connect", "1")
        table.take(2, "", kind)
        assert table.online == {}
        assert table.told[-1] == ("a", "tcpclean", "1")


def test_a_list_says_what_was_missed() -> None:
    table = Table()
    table.take(1, "gone", "connect", "1")
    table.take(2, "same", "connect", "2")
    table.take(3, "other", "connect", "3")
    table.presence.list_asked()
    table.presence.listed(4, listed(same="2", other="4", new="5"))
    assert table.online == {"same": "2", "other": "4", "new": "5"}
    assert table.told[3:] == [
        ("gone", "tcpclean", "1"),
        ("other", "tcpclean", "3"),
        ("other", "connect", "4"),
        ("new", "connect", "5"),
    ]


def test_lost_events_make_it_ask() -> None:
    table = Table()
    table.take(1, "", "overflow")
    assert table.asked == 1


def test_what_cannot_be_read_changes_nothing() -> None:
    table = Table()
    for payload in (b"", b"{", b"[]", b"1", b'{"a": 1}', b'{"type": "party"}', b"\xff"):
        table.presence.take(1, Frame(FrameKind.EVENT, 0, 0, "a", "", b"", payload))
    assert table.online == {}
    assert table.told == []


@settings(deadline=None)
@given(data=st.data())
def test_a_list_at_any_moment_leaves_the_truth(data: st.DataObject) -> None:
    """Events are read with a delay of their own; the list is as of some event, and comes at another."""
    channel = 0
    truth: dict[str, str] = {}
    history: list[tuple[str, str, str]] = []
    states = [dict(truth)]
    for name in data.draw(st.lists(st.sampled_from(["a", "b", "c"]), max_size=12)):
        if name in truth:
            history.append((name, "tcpclean", truth.pop(name)))
        else:
            channel += 1
            truth[name] = str(channel)
            history.append((name, "connect", truth[name]))
        states.append(dict(truth))
    first = data.draw(st.integers(0, len(history)))  # events before are lost
    asked = data.draw(st.integers(first, len(history)))
    taken = data.draw(st.integers(asked, len(history)))
    as_of = data.draw(st.integers(asked, len(history)))
    table = Table()
    for offset in range(first, len(history)):
        if offset == asked:
            table.presence.list_asked()
        if offset == taken and taken > asked:
            table.presence.listed(as_of, listed(**states[as_of]))
        table.take(offset, *history[offset])
    if not asked < taken < len(history):
        table.presence.list_asked()
        table.presence.listed(len(history), listed(**truth))
    assert table.online == truth
    online: dict[str, str] = {}
    for name, kind, told in table.told:
        if kind == "connect":
            assert name not in online
            online[name] = told
        else:
            assert online.pop(name) == told
    assert online == truth

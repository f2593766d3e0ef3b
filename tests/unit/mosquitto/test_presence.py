import contextlib
import json
from collections import Counter
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from mq2mqtt.message import ClientEvent, ClientEventType
from mq2mqtt.spool.frame import Frame, FrameKind
from mq2mqtt_mosquitto.control import ConnectedClient
from mq2mqtt_mosquitto.presence import Presence
from tests.thorough import searching


def frame(client_id: str, kind: str, channel: str, **more: Any) -> Frame:  # noqa: ANN401 - fields of JSON
    payload = {"type": kind, "channelId": channel, "clientIp": "10.0.0.1", "time": 5, "cleanSession": True, **more}
    return Frame(FrameKind.EVENT, 0, 0, client_id, "", b"", json.dumps(payload).encode())


class Killed(BaseException):
    """The end of a sidecar's life, between two things that it tells."""


class Table:
    """The core as far as it matters here: notes what it is told, each with its source, in one piece.

    `kill_after`: it ends after so many things told.
    """

    def __init__(self, *, kill_after: int | None = None) -> None:
        self.told: list[tuple[str, str, str]] = []
        self.events: list[ClientEvent] = []
        self.ends: list[tuple[int, str, int]] = []
        self.known: dict[str, ConnectedClient] = {}
        self.source = -1
        self.read = 0
        """Up to where events are settled."""
        self.asked = 0
        self._kill_after = kill_after
        self.presence = Presence(tell=self._tell, ended=self._end, ask=self._ask)

    def _tell(self, event: ClientEvent) -> None:
        self.told.append((event.client_id, event.type.value, event.channel_id))
        self.events.append(event)
        if event.type is ClientEventType.CONNECT:
            assert event.client_id not in self.known
            self.known[event.client_id] = ConnectedClient(
                event.client_id, event.channel_id, event.client_ip, event.time_ms, event.clean_session
            )
        elif event.type is ClientEventType.TCPCLEAN:
            assert self.known.pop(event.client_id).channel_id == event.channel_id
        assert event.source is not None
        self._noted(event.source)

    def _end(self, time_ms: int, reason: str, source: int) -> None:
        self.ends.append((time_ms, reason, source))
        self.told += [(name, "tcpclean", client.channel_id) for name, client in self.known.items()]
        self.known.clear()
        self._noted(source)

    def _noted(self, source: int) -> None:
        self.source = max(self.source, source)
        if self._kill_after is not None:
            self._kill_after -= 1
            if self._kill_after < 0:
                raise Killed

    def _ask(self) -> None:
        self.asked += 1

    def know(self, known: dict[str, ConnectedClient], source: int) -> None:
        """Go on from what another core has noted."""
        self.known, self.source = dict(known), source
        self.presence.know(known.values(), source=source)

    def take(self, offset: int, client_id: str, kind: str, channel: str = "", reason: str = "") -> None:
        self.presence.take(offset, frame(client_id, kind, channel, reason=reason))
        self.read = offset + 1

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


def test_it_is_known_from_a_list_in_force_to_the_end_of_the_broker() -> None:
    for kind in ("boot", "shutdown"):
        table = Table()
        presence = table.presence
        table.take(1, "a", "connect", "1")
        assert not presence.known.is_set()
        presence.list_asked()
        # The lane is behind.
        presence.listed(3, listed(a="1", b="2"))
        assert not presence.known.is_set()
        table.take(2, "b", "connect", "2")
        presence.caught_up()
        assert presence.known.is_set()
        presence.list_asked()
        assert presence.known.is_set()
        table.take(3, "", kind)
        assert not presence.known.is_set()
        presence.listed(3, listed(a="1", b="2"))
        assert (table.online, presence.known.is_set()) == ({}, False)
        presence.list_asked()
        presence.listed(4, listed(a="3"))
        assert (table.online, presence.known.is_set()) == ({"a": "3"}, True)


def test_a_broker_that_ends_or_begins_has_no_clients() -> None:
    for kind, reason in (("boot", "broker restarted"), ("shutdown", "broker stopped")):
        table = Table()
        table.take(1, "a", "connect", "1")
        table.take(2, "", kind)
        assert table.online == {}
        assert table.ends == [(5, reason, 2)]
        assert table.told[-1] == ("a", "tcpclean", "1")


def test_reasons_and_sources() -> None:
    table = Table()
    table.take(1, "a", "connect", "1")
    table.take(2, "a", "disconnect", "1", "disconnect")
    table.take(3, "a", "connect", "2")
    table.take(4, "a", "connect", "3")
    table.take(5, "a", "tcpclean", "3", "keepalive")
    for number, word in enumerate(("close", "kick", "invalid", "takeover", "unknown", "else"), 3):
        table.take(2 * number, "b", "connect", f"b{number}")
        table.take(2 * number + 1, "b", "tcpclean", f"b{number}", word)
    assert [(event.type.value, event.reason, event.source) for event in table.events[:7]] == [
        ("connect", "", 1),
        ("disconnect", "", 1),
        ("tcpclean", "disconnected by client", 2),
        ("connect", "", 3),
        ("tcpclean", "clientId conflict", 3),
        ("connect", "", 4),
        ("tcpclean", "no heart", 5),
    ]
    assert [event.reason for event in table.events[8::2]] == [
        "closed by client",
        "kicked",
        "invalid packet",
        "clientId conflict",
        "unknown",
        "unknown",
    ]


def test_an_address_of_any_bytes_hides_nobody() -> None:
    table = Table()
    sound = frame("a", "connect", "1", clientIp="ADDRESS")
    table.presence.take(0, sound._replace(payload=sound.payload.replace(b"ADDRESS", b"\xff")))
    assert (table.online, [event.client_ip for event in table.events]) == ({"a": "1"}, ["\udcff"])


def test_what_was_known_before_is_not_told_again() -> None:
    table = Table()
    table.know({client.client_id: client for client in listed(a="1", b="2")}, 10)
    for offset, kind in ((9, "connect"), (10, "tcpclean")):
        table.take(offset, "a", kind, "1")
    assert table.online == {"a": "1", "b": "2"}
    assert table.told == []
    table.presence.list_asked()
    table.presence.listed(11, listed(a="1"))
    assert table.told == [("b", "tcpclean", "2")]
    assert (table.events[0].reason, table.events[0].source) == ("unknown", 10)


def test_a_list_waits_for_the_events_before_it() -> None:
    for last in ("event", "end"):
        table = Table()
        table.take(1, "a", "connect", "1")
        table.presence.list_asked()
        table.presence.listed(4, listed(b="3"))
        assert table.online == {"a": "1"}
        table.take(2, "a", "disconnect", "1", "disconnect")
        if last == "event":
            table.take(4, "c", "connect", "4")
        else:
            table.presence.caught_up()
        assert [kind for name, kind, _ in table.told if name == "a"] == ["connect", "disconnect", "tcpclean"]
        assert table.online == ({"b": "3", "c": "4"} if last == "event" else {"b": "3"})


def test_lists_are_all_there_is_while_events_cannot_be_read() -> None:
    table = Table()
    table.presence.list_asked()
    table.presence.listed(4, listed(a="1"))
    assert table.online == {}
    table.presence.reads(events=False)
    assert table.online == {"a": "1"}
    table.presence.list_asked()
    table.presence.listed(6, listed(b="2"))
    assert table.online == {"b": "2"}
    table.presence.reads(events=True)
    table.take(5, "b", "connect", "2")
    assert table.told == [("a", "connect", "1"), ("a", "tcpclean", "1"), ("b", "connect", "2")]


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


class Past:
    """What a broker wrote, and who was connected before each event."""

    def __init__(self, steps: list[tuple[str, str]]) -> None:
        truth: dict[str, str] = {}
        self.events: list[tuple[str, str, str]] = []
        self.states: list[dict[str, str]] = []
        channel = 0
        for name, ending in steps:
            if name == "boot":
                self._add(truth, "", "boot", "")
                truth.clear()
            elif name in truth and ending != "takeover":
                self._add(truth, name, ending, truth[name])
                del truth[name]
            else:
                if name in truth:
                    self._add(truth, name, "tcpclean", truth.pop(name))
                channel += 1
                self._add(truth, name, "connect", str(channel))
                truth[name] = str(channel)
        self.states.append(truth)

    def _add(self, truth: dict[str, str], name: str, kind: str, channel: str) -> None:
        self.states.append(dict(truth))
        self.events.append((name, kind, channel))


pasts = st.builds(
    Past,
    st.lists(
        st.tuples(st.sampled_from(["a", "b", "c", "boot"]), st.sampled_from(["tcpclean", "disconnect", "takeover"])),
        max_size=14,
    ),
)


def live(table: Table, past: Past, data: st.DataObject, *, first: int, last: int) -> None:
    """Read the events from `first` to before `last`, with a list as of some event coming at any later one."""
    asked = data.draw(st.integers(first, last))
    # It was made in this life, so after all that was told in an earlier one.
    as_of = data.draw(st.integers(max(asked, table.source + 1), last))
    answered = data.draw(st.integers(asked, last))
    for offset in range(first, last + 1):
        if offset == asked:
            table.presence.list_asked()
        if offset == answered:
            table.presence.listed(as_of, listed(**past.states[as_of]))
        if offset < last:
            table.take(offset, *past.events[offset])
    table.presence.caught_up()


@searching(150)
@given(past=pasts, data=st.data())
def test_a_list_at_any_moment_leaves_the_truth(past: Past, data: st.DataObject) -> None:
    """Events are read with a delay of their own; the list is as of some event, and comes at another."""
    lost = data.draw(st.integers(0, len(past.events)))
    table = Table()
    live(table, past, data, first=lost, last=len(past.events))
    assert table.online == {name: client.channel_id for name, client in table.known.items()}
    if lost == 0:
        assert table.online == past.states[-1]


@searching(150)
@given(past=pasts, data=st.data())
def test_every_connection_comes_once_and_goes_once_over_kill_9(past: Past, data: st.DataObject) -> None:
    told: list[tuple[str, str, str]] = []
    known: dict[str, ConnectedClient] = {}
    source, last, read = -1, 0, 0
    for _ in range(data.draw(st.integers(0, 3))):
        table = Table(kill_after=data.draw(st.integers(0, 6)))
        table.know(known, source)
        first = data.draw(st.integers(0, read))  # the cursor is written later, or not at all
        last = data.draw(st.integers(last, len(past.events)))
        with contextlib.suppress(Killed):
            live(table, past, data, first=first, last=last)
        told += table.told
        known, source, read = table.known, table.source, max(read, table.read)
    table = Table()
    table.know(known, source)
    live(table, past, data, first=data.draw(st.integers(0, read)), last=len(past.events))
    times = Counter(told + table.told)
    assert table.online == past.states[-1]
    for name, kind, channel in past.events:
        if kind == "connect":
            assert times[name, "connect", channel] == 1
            assert times[name, "tcpclean", channel] == (0 if past.states[-1].get(name) == channel else 1)

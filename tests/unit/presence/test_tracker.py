"""`StatusTracker`: any order, any repetition, the same end."""

import json
import re
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mq2mqtt.errors import MalformedEventError
from mq2mqtt.presence import StatusTracker

Body = dict[str, Any]
_CLIENTS = ("GID_dev@@@a", "GID_dev@@@b")


def body(kind: str, channel: str, *, client: str = _CLIENTS[0], **own: Any) -> Body:  # noqa: ANN401 - JSON
    return {"eventType": kind, "clientId": client, "channelId": channel, "clientIp": "ip", "time": 1, **own}


class Life:
    """What a bridge tells of its clients, and who is connected at the end."""

    def __init__(self, steps: list[tuple[str, str]], *, node: str = "n1", numbered: bool = True) -> None:
        self.bodies: list[Body] = []
        self.online: dict[str, str] = {}
        self._node = node
        self._numbered = numbered
        self._seq = self._epoch = 1000
        for step, client in steps:
            getattr(self, f"_{step}")(client)

    def _say(self, kind: str, client: str, channel: str) -> None:
        self._seq += 1
        own: Body = {"seq": self._seq, "epoch": self._epoch, "node": self._node} if self._numbered else {}
        self.bodies.append(body(kind, channel, client=client, **own))

    def _come(self, client: str) -> None:
        self._go(client)
        self.online[client] = f"{self._node}-c{self._seq}"
        self._say("connect", client, self.online[client])

    def _say_goodbye(self, client: str) -> None:
        if client in self.online:
            self._say("disconnect", client, self.online[client])

    def _go(self, client: str) -> None:
        if client in self.online:
            self._say("tcpclean", client, self.online.pop(client))

    def _restart(self, _: str) -> None:
        self._seq += 1
        self._epoch = self._seq
        for client in list(self.online):
            self._go(client)


_steps = st.lists(
    st.tuples(st.sampled_from(["come", "come", "go", "say_goodbye", "restart"]), st.sampled_from(_CLIENTS)), max_size=12
)


def fed(bodies: list[Body]) -> StatusTracker:
    tracker = StatusTracker()
    for each in bodies:
        tracker.feed(each)
    return tracker


@pytest.mark.parametrize("numbered", [True, False])
@given(steps=_steps, data=st.data())
def test_any_order_and_any_repetition_end_the_same(
    *, numbered: bool, steps: list[tuple[str, str]], data: st.DataObject
) -> None:
    life = Life(steps, numbered=numbered)
    repeated = life.bodies + data.draw(st.lists(st.sampled_from(life.bodies), max_size=8)) if life.bodies else []
    tracker = fed(data.draw(st.permutations(repeated)))
    assert tracker.online == life.online.keys()
    for client in _CLIENTS:
        assert tracker.channels(client) == ({life.online[client]} if client in life.online else set())
        assert tracker.is_online(client) == (client in life.online)


@given(steps=_steps, other=_steps, data=st.data())
def test_two_bridges_tell_each_of_its_own_connections(
    steps: list[tuple[str, str]], other: list[tuple[str, str]], data: st.DataObject
) -> None:
    lives = Life(steps), Life(other, node="n2")
    tracker = fed(data.draw(st.permutations(lives[0].bodies + lives[1].bodies)))
    assert tracker.online == lives[0].online.keys() | lives[1].online.keys()
    for client in _CLIENTS:
        assert tracker.channels(client) == {life.online[client] for life in lives if client in life.online}


@pytest.mark.parametrize("order", list(permutations(range(5))))
def test_a_take_over_and_a_goodbye_in_every_order(order: tuple[int, ...]) -> None:
    events = [("connect", "c1"), ("disconnect", "c1"), ("tcpclean", "c1"), ("connect", "c2"), ("disconnect", "c2")]
    numbered = [body(*event, seq=10 + at, epoch=5, node="n1") for at, event in enumerate(events)]
    for bodies in (numbered, [body(*event) for event in events]):
        assert fed([bodies[at] for at in order]).channels(_CLIENTS[0]) == {"c2"}


def test_a_new_life_of_the_broker_ends_what_nobody_told_the_end_of() -> None:
    lost = body("connect", "c1", seq=11, epoch=10, node="n1")
    news = body("tcpclean", "x", client="GID_dev@@@other", seq=21, epoch=20, node="n1")
    for bodies in ([lost, news], [news, lost]):
        assert fed(bodies).online == set()
    elsewhere = {**news, "node": "n2"}
    assert fed([lost, elsewhere]).online == {_CLIENTS[0]}


def test_json_is_taken_as_bytes_as_text_and_as_read() -> None:
    told = body("connect", "c1", seq=1, epoch=1, node="n1")
    tracker = fed([])
    for form in (json.dumps(told).encode(), json.dumps(told), told):
        tracker.feed(form)
    assert tracker.online == {_CLIENTS[0]}


@pytest.mark.parametrize("numbered", [True, False])
def test_what_is_over_is_forgotten_by_number_and_by_time(*, numbered: bool) -> None:
    now = 0.0
    tracker = StatusTracker(tombstones=10, tombstone_seconds=60, clock=lambda: now)

    def end(number: int, kind: str = "tcpclean") -> None:
        own = {"seq": number * 2 + (kind == "tcpclean"), "epoch": 0, "node": "n1"} if numbered else {}
        tracker.feed(body(kind, f"c{number}", client=str(number), **own))

    for number in range(30):
        end(number)
    for number in range(30):
        end(number, "connect")
    assert tracker.online == {str(number) for number in range(20)}
    now = 61.0
    end(99)
    end(25, "connect")
    assert tracker.is_online("25")


@pytest.mark.parametrize(
    "bad",
    [
        b"",
        b"\xff",
        b"[]",
        b"1",
        b"{}",
        "[" * 100_000,
        {},
        body("connect", "c", client=None),  # type: ignore[arg-type]
        body("ping", "c"),
        body([], "c"),  # type: ignore[arg-type]
        {"eventType": "connect", "clientId": "a"},
        body("connect", "c", seq="1"),
        body("connect", "c", seq=True),
        body("connect", "c", seq=1.5),
        body("connect", "c", seq=1, epoch=None),
        body("connect", "c", seq=1, node=7),
        body("connect", "c", seq=1, epoch=-1),
        body("tcpclean", "c", seq=-1),
    ],
    ids=lambda bad: str(bad)[:40],
)
def test_what_is_no_event_raises_the_one_error(bad: Any) -> None:  # noqa: ANN401 - the point
    tracker = StatusTracker()
    with pytest.raises(MalformedEventError):
        tracker.feed(bad)
    assert tracker.online == set()


def test_the_example_of_the_docs_works(capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parents[3] / "docs" / "status.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)  # noqa: S102 - our own
    names["on_message"](json.dumps(body("connect", "c1")).encode())
    names["on_message"](b"hello")
    assert names["tracker"].online == {_CLIENTS[0]}
    assert "not a status message" in capsys.readouterr().out

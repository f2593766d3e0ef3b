"""The puller against a broker that answers what a test wants: what real brokers do too seldom to wait for."""

import asyncio
import struct
import zlib
from collections.abc import AsyncIterator, Callable
from typing import cast

import pytest

from mq2mqtt.rocketmq import Client, DecodeError, NotConnected, ReadQueue, Response, codec
from mq2mqtt.rocketmq.liveness import Liveness
from mq2mqtt.rocketmq.puller import PrefetchBudget, Puller
from mq2mqtt.rocketmq.tags import TagFilter

Answer = Callable[[dict[str, str]], Response]


def stored(offset: int, body: bytes = b"body", *, tag: str = "t", magic: int = -626843481, sys_flag: int = 0) -> bytes:
    """Return a message as brokers store it (V1)."""
    properties = b"TAGS\x01%s\x02" % tag.encode()
    rest = struct.pack(">i", len(body)) + body + b"\x01t" + struct.pack(">H", len(properties)) + properties
    head = struct.pack(">iiiiqqiq8sq8siq", magic, 0, 0, 0, offset, 0, sys_flag, 1, bytes(8), 1, bytes(8), 0, 0)
    return struct.pack(">i", 4 + len(head) + len(rest)) + head + rest


def answer(code: int, following: int, body: bytes = b"", *, end: int = 100) -> Response:
    fields = {"nextBeginOffset": str(following), "minOffset": "0", "maxOffset": str(end)}
    return Response(code, 1, 1, "remark", fields, body)


class Broker:
    """Answers pulls from a script, and holds the next one for ever; stands for the client too."""

    client_id = "me"

    def __init__(self) -> None:
        self.script: list[Answer | Exception] = []
        self.pulls: list[dict[str, str]] = []
        self.moved = asyncio.Event()
        self.committed: int | None = 0
        self.knows_group = True
        self.hold = 0.0

    async def call(
        self,
        address: str,
        code: int,
        fields: dict[str, str],
        body: bytes = b"",
        *,
        timeout: float | None = None,  # noqa: ASYNC109 - the client's signature
    ) -> Response:
        assert (address, timeout is None or timeout > 0) == ("broker:1", True)
        if code == 34:  # the heartbeat of Liveness
            return Response(0, 1, 1, "", {}, body)
        if code == 14:  # the group's offset
            if not self.knows_group or (self.committed is None and fields["topic"] == "t"):
                return Response(22, 1, 1, "", {}, b"")
            return Response(0, 1, 1, "", {"offset": str(self.committed)}, b"")
        self.pulls.append(fields)
        self.moved.set()
        if not self.script:
            await asyncio.Event().wait()
        step = self.script.pop(0)
        if fields["sysFlag"] == "6":
            await asyncio.sleep(self.hold)
        if isinstance(step, Exception):
            raise step
        return step(fields)


class Events:
    def __init__(self) -> None:
        self.errors: list[DecodeError] = []
        self.recoveries = 0
        self.losses = 0

    def ready(self, puller: Puller) -> None:
        """Nothing to do: tests look for themselves."""

    def advanced(self) -> None:
        """Nothing to do."""

    def recovered(self) -> None:
        self.recoveries += 1

    def forgotten(self) -> None:
        self.losses += 1

    def cannot_decode(self, puller: Puller, error: DecodeError) -> None:
        assert puller.topic == "t"
        self.errors.append(error)


class World:
    def __init__(self, *, tags: str = "*", offset: int = 0, budget: int = 1 << 20) -> None:
        self.broker = Broker()
        self.events = Events()
        self.budget = PrefetchBudget(budget)
        client = cast("Client", self.broker)
        self.liveness = Liveness(client)
        self.liveness.watch("broker:1")
        self.puller = Puller(
            client,
            group="g",
            topic="t",
            sibling="%RETRY%g",
            queue=ReadQueue("b", 0),
            address="broker:1",
            offset=offset,
            tags=TagFilter(tags),
            shown_topic_property=None,
            events=self.events,
            liveness=self.liveness,
            budget=self.budget,
        )

    async def play(self, *script: Answer | Exception) -> None:
        """Let the broker answer in turn, and wait until it holds the pull after that."""
        self.broker.script += script
        async with asyncio.timeout(30):
            while self.broker.script or len(self.broker.pulls) < len(script) + 1:
                self.broker.moved.clear()
                await self.broker.moved.wait()

    def offsets(self) -> list[int]:
        taken: list[int] = []
        self.broker.moved.clear()
        while self.puller.can_hand_out():
            taken += [message.offset for message in self.puller.take()]
        return taken

    @property
    def asked(self) -> list[int]:
        return [int(fields["queueOffset"]) for fields in self.broker.pulls]


@pytest.fixture
async def world() -> AsyncIterator[Callable[..., World]]:
    made: list[World] = []

    def make(**settings: object) -> World:
        made.append(World(**settings))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for one in made:
        await one.puller.stop()
        await one.liveness.close()


@pytest.mark.parametrize("code", [0, 19, 20, 21])
async def test_offsets_of_a_topic_that_was_made_again_are_outdated(world: Callable[..., World], code: int) -> None:
    one = world(offset=5)
    problems: list[str | None] = []

    def look(_: dict[str, str]) -> Response:
        problems.append(one.puller.problem)
        assert not one.puller.outdated
        return answer(code, 6, stored(5), end=6)

    await one.play(lambda _: answer(17, 0), look)

    assert "17" in (problems[0] or "")
    assert one.puller.outdated
    assert one.puller.problem is not None
    assert one.events.recoveries == 1
    assert not one.puller.can_hand_out()


async def test_a_message_that_cannot_be_decoded_is_told_and_left_out(world: Callable[..., World]) -> None:
    one = world()
    await one.play(lambda _: answer(0, 3, stored(0) + stored(1, magic=7) + stored(2)))

    assert one.offsets() == [0, 2]
    assert [error.offset for error in one.events.errors] == [1]
    assert one.puller.progress.frontier == 3


async def test_what_swells_too_much_for_one_answer_is_pulled_again(
    world: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(codec, "MAX_INFLATED", 1000)
    one = world()
    swelling = [stored(offset, zlib.compress(bytes(1000)), sys_flag=1) for offset in range(3)]
    await one.play(
        lambda _: answer(0, 3, b"".join(swelling)),
        lambda _: answer(0, 3, b"".join(swelling[1:])),
        lambda _: answer(0, 3, swelling[2]),
    )

    assert one.asked == [0, 1, 2, 3]
    assert one.budget.used == 3000
    assert one.offsets() == [0, 1, 2]


async def test_an_answer_without_sense_is_pulled_again_message_by_message(world: Callable[..., World]) -> None:
    one = world()
    await one.play(
        lambda _: answer(0, 3, stored(0) + b"\xff" * 60),
        lambda _: answer(0, 1, stored(0)),
        lambda _: answer(0, 3, b"\xff" * 60),
        lambda _: answer(0, 2, b"\xff" * 60),
        lambda _: answer(0, 3, stored(2)),
    )

    assert one.offsets() == [0, 2]
    assert [fields["maxMsgNums"] for fields in one.broker.pulls] == ["256", "1", "256", "1", "256", "256"]
    assert one.asked == [0, 0, 1, 1, 2, 3]
    assert len(one.events.errors) == 1


async def test_the_first_pull_and_the_first_after_a_failure_are_not_held(world: Callable[..., World]) -> None:
    one = world()
    assert one.puller.problem is not None
    await one.play(lambda _: answer(19, 0), NotConnected("broker:1", "cut"), lambda _: answer(19, 0))

    assert [fields["sysFlag"] for fields in one.broker.pulls] == ["4", "6", "4", "6"]
    assert one.puller.problem is None
    assert one.events.recoveries == 1
    assert one.puller.commit_again


@pytest.mark.parametrize(("code", "word"), [(16, "16"), (26, "26"), (1, "remark")])
async def test_a_refusal_is_told_in_words(world: Callable[..., World], code: int, word: str) -> None:
    one = world()
    problems: list[str | None] = []

    def look(_: dict[str, str]) -> Response:
        problems.append(one.puller.problem)
        return answer(19, 0)

    await one.play(lambda _: answer(code, 0), look)

    assert word in (problems[0] or "")
    assert one.puller.problem is None


async def test_a_strange_answer_does_not_end_the_queue(
    world: Callable[..., World], caplog: pytest.LogCaptureFixture
) -> None:
    one = world()
    await one.play(lambda _: Response(0, 1, 1, "", {}, b""), lambda _: answer(0, 1, stored(0)))

    assert one.offsets() == [0]
    assert "pulling t" in caplog.text


async def test_passed_over_messages_can_be_committed_only_behind_those_before_them(
    world: Callable[..., World],
) -> None:
    one = world(tags="a")
    await one.play(
        lambda _: answer(20, 10),
        lambda _: answer(0, 12, stored(10, tag="a") + stored(11, tag="b")),
        lambda _: answer(20, 30),
    )

    assert one.asked == [0, 10, 12, 30]
    assert one.puller.progress.committable == 10
    (message,) = one.puller.take()
    assert one.puller.progress.committable == 10
    one.puller.progress.settle(message)
    assert one.puller.progress.committable == 30


async def test_a_move_forward_keeps_what_is_held(world: Callable[..., World]) -> None:
    one = world()
    await one.play(lambda _: answer(0, 1, stored(0)), lambda _: answer(21, 50))

    assert one.offsets() == [0]
    assert one.asked == [0, 1, 50]
    assert one.puller.progress.frontier == 50


async def test_a_move_back_forgets_what_is_held(world: Callable[..., World]) -> None:
    one = world(offset=10)
    await one.play(lambda _: answer(0, 11, stored(10)), lambda _: answer(21, 4), lambda _: answer(0, 5, stored(4)))

    assert one.offsets() == [4]
    assert one.puller.progress.frontier == 5


async def test_pulling_ahead_is_bounded_and_goes_on_when_something_is_taken(world: Callable[..., World]) -> None:
    one = world(budget=1)
    body = stored(0)
    one.broker.script.append(lambda _: answer(0, 1, body))
    async with asyncio.timeout(30):
        while not one.puller.can_hand_out():
            await asyncio.sleep(0)
    for _ in range(10):
        await asyncio.sleep(0)
    assert (one.asked, one.budget.used, one.puller.waits) == ([0], len(body), True)

    assert one.offsets() == [0]
    async with asyncio.timeout(30):
        await one.broker.moved.wait()

    assert (one.asked, one.budget.used, one.puller.waits) == ([0, 1], 0, False)


async def test_stopping_gives_back_the_budget(world: Callable[..., World]) -> None:
    one = world()
    await one.play(lambda _: answer(0, 1, stored(0)))
    assert one.budget.used

    await one.puller.stop()
    await one.puller.stop()

    assert one.budget.used == 0
    assert not one.puller.can_hand_out()


async def test_a_poll_in_doubt_is_not_waited_for(world: Callable[..., World]) -> None:
    one = world()
    await one.play(lambda _: answer(19, 0))
    problems: list[str | None] = []

    def look(_: dict[str, str]) -> Response:
        problems.append(one.puller.problem)
        return answer(19, 0)

    one.puller.doubt()
    await one.play(lambda _: answer(17, 0), look)

    # The second is held and abandoned; the one after it asks at once, and so does the one after the refusal.
    assert [fields["sysFlag"] for fields in one.broker.pulls] == ["4", "6", "4", "4"]
    assert "17" in (problems[0] or "")


async def test_a_doubt_that_is_unfounded_changes_nothing(world: Callable[..., World]) -> None:
    one = world()
    await one.play(lambda _: answer(0, 1, stored(0)))
    one.puller.doubt()
    await one.play(lambda _: answer(0, 2, stored(1)))

    assert one.offsets() == [0, 1]
    assert one.puller.problem is None
    assert one.events.recoveries == 0


async def test_a_topic_made_again_while_a_poll_was_held_is_known_by_the_forgotten_offset(
    world: Callable[..., World],
) -> None:
    one = world(offset=5)
    one.puller.committed = 5
    one.broker.committed = None
    one.broker.hold = 0.2
    await one.play(lambda _: answer(19, 5, end=5), lambda _: answer(0, 9, stored(5), end=9))

    assert one.puller.outdated
    assert one.events.losses == 0
    assert not one.puller.can_hand_out()


async def test_a_group_that_was_deleted_while_a_poll_was_held_reads_on(world: Callable[..., World]) -> None:
    one = world(offset=5)
    one.puller.committed = 5
    one.broker.knows_group = False
    one.broker.hold = 0.2
    await one.play(lambda _: answer(19, 5, end=5), lambda _: answer(0, 6, stored(5), end=6))

    assert not one.puller.outdated
    assert one.events.losses == 1
    assert one.offsets() == [5]


async def test_after_a_failure_a_forgotten_offset_says_nothing(world: Callable[..., World]) -> None:
    one = world(offset=5)
    one.puller.committed = 5
    one.broker.committed = None
    one.broker.hold = 0.2
    await one.play(
        lambda _: answer(19, 5, end=5),
        NotConnected("broker:1", "cut"),
        lambda _: answer(19, 5, end=5),
        lambda _: answer(0, 6, stored(5), end=6),
    )

    assert not one.puller.outdated
    assert one.offsets() == [5]


@pytest.mark.parametrize(("committed", "outdated"), [(10, False), (None, True)])
async def test_a_move_back_is_followed_unless_the_topic_was_made_again(
    world: Callable[..., World],
    committed: int | None,
    outdated: bool,  # noqa: FBT001 - a case of the table
) -> None:
    one = world(offset=10)
    one.puller.committed = 10
    one.broker.committed = committed
    await one.play(lambda _: answer(21, 4))

    assert one.puller.outdated == outdated
    assert one.puller.progress.frontier == (10 if outdated else 4)

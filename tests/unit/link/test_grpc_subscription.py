"""A subscription over gRPC whose proxy answers when and what a test says: receipts that change, and bugs."""

import asyncio
import importlib
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from loguru import logger

from mq2mqtt.link.grpc.incoming import GrpcMessage
from mq2mqtt.message import ReceivedMessage
from tests.waiting import until

if TYPE_CHECKING:
    from mq2mqtt.link import Subscription

_DEADLINE = 60.0


@pytest.fixture(autouse=True)
def _with_its_package(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--driver") != "grpc":
        pytest.skip("runs in the environment of its driver: scripts/test --driver grpc")


def incoming(offset: int, receipt: str) -> Any:  # noqa: ANN401 - the client's, which is not here
    message = GrpcMessage("t", b"x", {}, 0, broker="b", queue_id=0, offset=offset)
    return SimpleNamespace(message=message, receipt=receipt, problem=None, endpoints=None)


class Consumer:
    """In the place of the client's consumer: notes what is asked; a test answers."""

    def __init__(self) -> None:
        self.polls: list[Future[Any]] = []
        self.acknowledgements: list[tuple[list[str], Future[Any]]] = []
        self.renewals: list[tuple[str, Future[Any]]] = []
        self.bug: Exception | None = None
        """What every request raises."""

    def queues(self) -> dict[str, str]:
        return {"b": "queue"}

    def _asked(self) -> Future[Any]:
        if self.bug is not None:
            raise self.bug
        return Future()

    def take(self, _queue: str, *, hidden: int) -> Future[Any]:
        assert hidden == 20
        self.polls.append(self._asked())
        return self.polls[-1]

    def acknowledge(self, done: Sequence[Any]) -> Future[Any]:
        self.acknowledgements.append(([one.receipt for one in done], self._asked()))
        return self.acknowledgements[-1][1]

    def hide(self, one: Any, _seconds: int) -> Future[Any]:  # noqa: ANN401
        self.renewals.append((one.receipt, self._asked()))
        return self.renewals[-1][1]

    def shutdown(self) -> None:
        pass


class Scene:
    """A subscription that is connected, with a real reader in between."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        module = importlib.import_module("mq2mqtt.link.grpc.subscription")
        self._code = importlib.import_module("rocketmq.grpc_protocol").Code
        self._answers = importlib.import_module("rocketmq.grpc_protocol.service_pb2")
        monkeypatch.setattr(module, "_RETRY_SECONDS", 0.01)
        monkeypatch.setattr(module, "_RENEW_SECONDS", 0.05)
        self.consumer = Consumer()
        reader = module.Reader(config=None, tls=False, topic="t", group="g", tags="*")
        monkeypatch.setattr(reader, "_consumer", self.consumer)
        monkeypatch.setattr(reader, "connect", self._connect)
        monkeypatch.setattr(reader, "require_order", self._connect)
        self.left = 0
        self.subscription: Subscription = module.GrpcSubscription(reader, name="one", left=self._leave)

    async def _connect(self, *_: object) -> dict[str, str]:
        return self.consumer.queues()

    def _leave(self) -> None:
        self.left += 1

    async def bring(self, *messages: Any) -> None:  # noqa: ANN401
        """Answer the poll, and wait until what it brought is taken in: the next one is asked for."""
        count = len(self.consumer.polls)
        self.consumer.polls[-1].set_result(list(messages))
        await until(lambda: len(self.consumer.polls) > count, seconds=_DEADLINE)

    async def receive(self, *messages: Any) -> ReceivedMessage:  # noqa: ANN401
        await until(lambda: self.consumer.polls, seconds=_DEADLINE)
        await self.bring(*messages)
        async with asyncio.timeout(_DEADLINE):
            (message,) = await anext(aiter(self.subscription))
        return message

    async def acknowledged(self, count: int) -> tuple[list[str], Future[Any]]:
        """Return the last of `count` acknowledgements: its receipts, and what its answer goes to."""
        await until(lambda: len(self.consumer.acknowledgements) >= count, seconds=_DEADLINE)
        assert len(self.consumer.acknowledgements) == count
        return self.consumer.acknowledgements[-1]

    def answer(self, refused: Sequence[str] = (), taken: Sequence[str] = ()) -> Any:  # noqa: ANN401
        """Return the answer to an acknowledgement."""
        code = self._code
        response = self._answers.AckMessageResponse()
        response.status.code = code.MULTIPLE_RESULTS if refused else code.OK
        for receipt in (*refused, *taken):
            entry = response.entries.add(receipt_handle=receipt)
            entry.status.code = code.INVALID_RECEIPT_HANDLE if receipt in refused else code.OK
        return response

    def renewed(self, receipt: str) -> Any:  # noqa: ANN401
        """Return the answer to a renewal."""
        response = self._answers.ChangeInvisibleDurationResponse(receipt_handle=receipt)
        response.status.code = self._code.OK
        return response


@pytest.fixture
async def scene(_with_its_package: None, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Scene]:
    made = Scene(monkeypatch)
    yield made
    if made.left:
        return
    closing = asyncio.create_task(made.subscription.close(), name="closing")
    async with asyncio.timeout(_DEADLINE):
        while not closing.done():
            # The last polls and requests have answers too, so that closing waits for nothing.
            for poll in made.consumer.polls:
                if not poll.done():
                    poll.set_result([])
            for receipts, future in made.consumer.acknowledgements:
                if not future.done():
                    future.set_result(made.answer(taken=receipts))
            for receipt, future in made.consumer.renewals:
                if not future.done():
                    future.set_result(made.renewed(receipt))
            await asyncio.sleep(0.01)
    await closing


@pytest.fixture
def errors() -> Any:  # noqa: ANN401
    """Return what is logged as an error."""
    lines: list[str] = []
    number = logger.add(lines.append, level="ERROR", format="{message}")
    yield lines
    logger.remove(number)


@pytest.mark.parametrize("is_refused", [True, False])
async def test_what_comes_again_while_it_is_acknowledged_is_acknowledged_with_the_new_receipt(
    scene: Scene, errors: list[str], *, is_refused: bool
) -> None:
    scene.subscription.settle(await scene.receive(incoming(0, "old")))
    receipts, answer = await scene.acknowledged(1)
    assert receipts == ["old"]

    await scene.bring(incoming(0, "new"))
    answer.set_result(scene.answer(refused=["old"]) if is_refused else scene.answer(taken=["old"]))

    receipts, answer = await scene.acknowledged(2)
    assert receipts == ["new"]
    answer.set_result(scene.answer(taken=["new"]))
    scene.subscription.settle(await scene.receive(incoming(1, "next")))
    receipts, answer = await scene.acknowledged(3)
    assert receipts == ["next"], "the one before was forgotten once it was taken"
    assert scene.subscription.problem is None
    assert errors == []


async def test_a_receipt_that_was_refused_and_renewed_meanwhile_is_tried_again(scene: Scene, errors: list[str]) -> None:
    message = await scene.receive(incoming(0, "old"))
    await until(lambda: scene.consumer.renewals, seconds=_DEADLINE)
    scene.subscription.settle(message)
    receipts, answer = await scene.acknowledged(1)
    assert receipts == ["old"]

    scene.consumer.renewals[0][1].set_result(scene.renewed("new"))
    # The next message is renewed by the same loop: it has read the answer.
    await scene.receive(incoming(1, "other"))
    await until(lambda: len(scene.consumer.renewals) > 1, seconds=_DEADLINE)
    answer.set_result(scene.answer(refused=["old"]))

    receipts, _ = await scene.acknowledged(2)
    assert receipts == ["new"]
    assert errors == []


async def test_a_renewal_does_not_bring_back_a_receipt_that_is_older_than_the_last(scene: Scene) -> None:
    message = await scene.receive(incoming(0, "old"))
    await until(lambda: scene.consumer.renewals, seconds=_DEADLINE)
    await scene.bring(incoming(0, "new"))
    scene.consumer.renewals[0][1].set_result(scene.renewed("old, renewed"))

    await until(lambda: len(scene.consumer.renewals) > 1, seconds=_DEADLINE)
    assert scene.consumer.renewals[1][0] == "new"
    scene.subscription.settle(message)
    assert (await scene.acknowledged(1))[0] == ["new"]


async def test_the_refusal_of_a_receipt_that_nobody_sent_is_one_of_all(scene: Scene, errors: list[str]) -> None:
    scene.subscription.settle(await scene.receive(incoming(0, "one")))
    _, answer = await scene.acknowledged(1)
    answer.set_result(scene.answer(refused=["another"]))

    assert (await scene.acknowledged(2))[0] == ["one"]
    assert errors == []


async def test_a_bug_is_told_once_and_ends_no_task(scene: Scene, errors: list[str]) -> None:
    held = await scene.receive(incoming(0, "one"))
    settled = await scene.receive(incoming(1, "two"))
    await until(lambda: scene.consumer.renewals, seconds=_DEADLINE)
    asked = len(scene.consumer.polls), len(scene.consumer.renewals)
    scene.consumer.bug = RuntimeError("a bug")
    scene.subscription.settle(settled)
    scene.consumer.polls[-1].set_result([])
    for receipt, renewal in scene.consumer.renewals:
        renewal.set_result(scene.renewed(receipt))

    # Polling, renewing and acknowledging.
    await until(lambda: len(errors) == 3, seconds=_DEADLINE)
    await asyncio.sleep(0.2)

    assert scene.subscription.problem == "internal error, see the log: RuntimeError"
    assert len(errors) == 3
    assert "RuntimeError: a bug" in errors[0]

    scene.consumer.bug = None
    assert (await scene.acknowledged(1))[0] == ["two"]
    scene.consumer.acknowledgements[0][1].set_result(scene.answer(taken=["two"]))
    await until(lambda: len(scene.consumer.polls) > asked[0], seconds=_DEADLINE)
    await until(lambda: len(scene.consumer.renewals) > asked[1], seconds=_DEADLINE)
    for receipt, future in scene.consumer.renewals[asked[1] :]:
        future.set_result(scene.renewed(receipt))
    await scene.bring()
    await until(lambda: scene.subscription.problem is None, seconds=_DEADLINE)
    scene.subscription.settle(held)
    assert (await scene.acknowledged(2))[0] == ["one"]


async def test_a_bug_while_leaving_does_not_keep_the_group(scene: Scene) -> None:
    await scene.receive(incoming(0, "one"))
    await until(lambda: scene.consumer.polls, seconds=_DEADLINE)
    scene.consumer.bug = RuntimeError("a bug")
    closing = asyncio.create_task(scene.subscription.close(), name="closing it")
    await asyncio.sleep(0)
    scene.consumer.polls[-1].set_result([])

    with pytest.raises(RuntimeError, match="a bug"):
        await asyncio.wait_for(closing, _DEADLINE)
    assert scene.left == 1

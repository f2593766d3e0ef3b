"""Measures one driver of the link once, in the environment it is started in; prints JSON. `links.py` starts it."""

# ruff: noqa: T201 - a program

import argparse
import asyncio
import importlib.util
import json
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass

from mq2mqtt.cli import collect_rarely
from mq2mqtt.errors import LinkError
from mq2mqtt.link import ConsumeFrom, Queue, RocketLink, Subscription
from mq2mqtt.link.drivers import DRIVERS, library, open_link
from mq2mqtt.log import quiet_client
from mq2mqtt.message import ReceivedMessage, RocketMessage
from mq2mqtt.quickstart.drivers import make_group, make_topic
from mq2mqtt.settings import RocketMQSettings
from tests.bench.experiment import gather_bounded
from tests.bench.rocketmq_client import BATCH, batches_of, make_message

_QUEUES = 8
_IN_FLIGHT = 64
_RECEIVED = 100_000
_NUL_SECONDS = 30.0
_NUL_BODY = b"a\0b"


@dataclass(frozen=True)
class Speed:
    """One way of sending or receiving."""

    rate: float
    """Messages a second."""
    cpu_us: float
    """Processor time of this process, all its threads, for each message, in microseconds."""


@dataclass(frozen=True)
class Figures:
    """What one run says."""

    library: str
    speeds: dict[str, Speed]
    nul: dict[str, str]
    """What becomes of a body with a NUL byte, sent and received."""


class Bench:
    """One driver at one RocketMQ.

    Args:
        settings: of the driver.
        quick: little of everything.
    """

    def __init__(self, settings: RocketMQSettings, *, quick: bool) -> None:
        self._settings = settings
        self._seconds = 0.2 if quick else 3.0
        self._received = _RECEIVED // 50 if quick else _RECEIVED

    async def run(self) -> Figures:
        """Measure."""
        link = open_link(self._settings, client_id="bench")
        native = open_link(RocketMQSettings(namesrv=self._settings.namesrv), client_id="bench-native")
        await link.start()
        await native.start()
        try:
            queues = await link.queues(await self._topic())
            # Connections are made, threads are started.
            await self._sent(link, queues, in_flight=1, batch=1, seconds=self._seconds / 5)
            speeds = {
                "one by one": await self._sent(link, queues, in_flight=1, batch=1, seconds=self._seconds),
                "pipelined": await self._sent(link, queues, in_flight=_IN_FLIGHT, batch=1, seconds=self._seconds),
                "batched": await self._sent(link, queues, in_flight=_QUEUES, batch=BATCH, seconds=self._seconds),
                "received": await self._receive(link, native),
            }
            nul = {"sent": await self._nul(link, native), "received": await self._nul(native, link)}
        finally:
            await link.close()
            await native.close()
        return Figures(library(DRIVERS[self._settings.driver]), speeds, nul)

    async def _topic(self) -> str:
        name = f"bench_{uuid.uuid4().hex[:12]}"
        await make_topic(self._settings.driver, self._settings.namesrv, name, queues=_QUEUES)
        return name

    async def _subscription(self, link: RocketLink, topic: str) -> Subscription:
        group = f"GID_{topic}_{uuid.uuid4().hex[:4]}"
        await make_group(self._settings.driver, self._settings.namesrv, group)
        return await link.subscribe(topic, group, tags="*", start=ConsumeFrom.EARLIEST)

    async def _sent(
        self, link: RocketLink, queues: Sequence[Queue], *, in_flight: int, batch: int, seconds: float
    ) -> Speed:
        """Send for so long; `in_flight` callers, each to one queue, each waiting for its answer."""
        messages = [make_message(queues[0].topic, number) for number in range(batch)]
        until = time.perf_counter() + seconds
        sent = 0

        async def caller(number: int) -> None:
            nonlocal sent
            while time.perf_counter() < until:
                await _send(link, queues[number % len(queues)], messages)
                sent += batch

        return await _speed(lambda: asyncio.gather(*map(caller, range(in_flight))), lambda: sent)

    async def _receive(self, link: RocketLink, native: RocketLink) -> Speed:
        """Receive what is there already, settled at once, from the first batch on."""
        topic = await self._topic()
        queues = await native.queues(topic)
        batches = batches_of(topic, self._received)
        await gather_bounded(
            lambda number: _send(native, queues[number % len(queues)], batches[number]),
            count=len(batches),
            in_flight=_QUEUES,
        )
        subscription = await self._subscription(link, topic)
        batches_now = aiter(subscription)
        _settle(subscription, await anext(batches_now))
        received, until = 0, time.perf_counter() + 3 * self._seconds

        async def receive() -> None:
            nonlocal received
            async for batch in batches_now:
                _settle(subscription, batch)
                received += len(batch)
                # The first batch of each queue may have been taken before.
                if time.perf_counter() > until or received > self._received - _QUEUES * BATCH:
                    break

        speed = await _speed(receive, lambda: received)
        await subscription.close()
        return speed

    async def _nul(self, sender: RocketLink, receiver: RocketLink) -> str:
        """Say what `receiver` gets of a body with a NUL byte."""
        topic = await self._topic()
        subscription = await self._subscription(receiver, topic)
        try:
            queue, *_ = await sender.queues(topic)
            await _send(sender, queue, [RocketMessage(topic, _NUL_BODY, {"TAGS": "t"})])
            async with asyncio.timeout(_NUL_SECONDS):
                (message,) = await anext(aiter(subscription))
            subscription.settle(message)
        except TimeoutError:
            return "not handed out"
        finally:
            await subscription.close()
        return "whole" if message.body == _NUL_BODY else f"cut to {len(message.body)} bytes"


def _settle(subscription: Subscription, messages: Sequence[ReceivedMessage]) -> None:
    for message in messages:
        subscription.settle(message)


async def _send(link: RocketLink, queue: Queue, messages: Sequence[RocketMessage]) -> None:
    while True:
        try:
            await link.send(queue, messages)
        except LinkError:
            await asyncio.sleep(0.01)  # the broker sheds load
        else:
            return


async def _speed(work: Callable[[], Awaitable[object]], count: Callable[[], int]) -> Speed:
    started, cpu = time.perf_counter(), time.process_time()
    await work()
    cpu = time.process_time() - cpu
    return Speed(count() / (time.perf_counter() - started), 1e6 * cpu / count())


def main() -> None:
    """Parse arguments, measure, print."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.link_speed", description=__doc__)
    parser.add_argument("driver", choices=tuple(DRIVERS))
    parser.add_argument("--namesrv", required=True)
    parser.add_argument("--proxy")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    settings = RocketMQSettings(driver=arguments.driver, namesrv=arguments.namesrv, proxy=arguments.proxy)
    quiet_client()
    collect_rarely()
    factory = importlib.import_module("uvloop").new_event_loop if importlib.util.find_spec("uvloop") else None
    with asyncio.Runner(loop_factory=factory) as runner:
        figures = runner.run(Bench(settings, quick=arguments.quick).run())
    print(json.dumps(asdict(figures)))


if __name__ == "__main__":
    main()

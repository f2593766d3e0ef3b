"""A consumer of one topic in one group, as futures of the event loop."""

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Any

from mq2mqtt.errors import BridgeError, LinkError, NotConnectedError
from mq2mqtt.link.grpc import client
from mq2mqtt.link.grpc.answers import Answers

__all__ = ["HIDDEN_SECONDS", "Reader"]

HIDDEN_SECONDS = 20
"""What a bridge that is killed had received comes again after this."""
_SETTINGS_SECONDS = 3.0


class Reader:
    """A consumer that is in its group or on the way there.

    Args:
        config: as `client.configuration` makes it.
        tls: whether it connects with TLS.
        topic: what it reads.
        group: consumer group.
        tags: tag expression.
    """

    def __init__(self, *, config: Any, tls: bool, topic: str, group: str, tags: str) -> None:  # noqa: ANN401
        self.topic = topic
        self.group = group
        self.answers = Answers(client.translate)
        self._config, self._tls, self._tags = config, tls, tags
        self._consumer: client.LinkConsumer | None = None
        self._loop = asyncio.get_running_loop()
        self._in_order: bool | None = None
        """What the proxy last said of the group."""
        self._settings: set[asyncio.Future[bool]] = set()

    @property
    def consumer(self) -> client.LinkConsumer:
        """The client's; once connected.

        Raises:
            NotConnectedError: it is closed.
        """
        if self._consumer is None:
            raise NotConnectedError("closed")
        return self._consumer

    async def connect(self) -> dict[str, Any]:
        """Join the group; return one readable queue for each broker's name. May be called again after an error.

        Raises:
            BridgeError: the topic or the proxy is not there, or the group does not keep order.
        """
        # The first time that it hears of a proxy, the client asks for the settings.
        first = self._consumer is None
        if self._consumer is None:
            self._consumer = await asyncio.to_thread(self._start)
        consumer = self._consumer
        route = client.to_route(self.topic, await self.answers.of(client.ask_route(consumer, self.topic)))
        route.require_readable()
        try:
            queues = await asyncio.to_thread(consumer.hold_queues)
        except Exception as error:
            raise client.translate(error) from error
        if not queues:
            raise LinkError(f"topic {self.topic} has no readable queue")
        await self.require_order(next(iter(queues.values())), ask=not first)
        return queues

    def _start(self) -> client.LinkConsumer:
        consumer = client.LinkConsumer(
            self._config,
            group=self.group,
            topic=self.topic,
            tags=self._tags,
            tls=self._tls,
            on_settings=self._on_settings,
        )
        consumer.startup()
        return consumer

    async def require_order(self, queue: Any, *, ask: bool = True) -> None:  # noqa: ANN401
        """Return when the proxy of `queue` knows this consumer and the group keeps order.

        Raises:
            LinkError: it does not answer, or the group does not.
        """
        if ask or self._in_order is None:
            await self._next_settings(queue, ask=ask)
        if not self._in_order:
            raise LinkError(
                f"consumer group {self.group} does not exist, or gives its members no order: mqadmin updateSubGroup "
                f"-n NAMESRV -c CLUSTER -g {self.group} -o true -r 1000000"
            )

    async def _next_settings(self, queue: Any, *, ask: bool) -> None:  # noqa: ANN401
        answer: asyncio.Future[bool] = self._loop.create_future()
        self._settings.add(answer)
        try:
            if ask:
                self.consumer.ask_settings(queue)
            async with asyncio.timeout(_SETTINGS_SECONDS):
                await answer
        except TimeoutError:
            client.require_success(await self.answers.of(self.consumer.beat(queue)))
            raise LinkError("the proxy does not answer for the settings of the group") from None
        finally:
            self._settings.discard(answer)

    def _on_settings(self, in_order: bool) -> None:  # noqa: FBT001 - in the client's thread
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._have_settings, in_order)

    def _have_settings(self, in_order: bool) -> None:  # noqa: FBT001
        self._in_order = in_order
        for answer in self._settings:
            if not answer.done():
                answer.set_result(in_order)

    async def take(self, queue: Any) -> list[client.Incoming]:  # noqa: ANN401
        """Wait some seconds for messages of `queue`'s broker; raises `BridgeError`."""
        received: list[client.Incoming] = await self.answers.of(self.consumer.take(queue, hidden=HIDDEN_SECONDS))
        return received

    async def acknowledge(self, done: Sequence[client.Incoming]) -> list[tuple[client.Incoming, BridgeError]]:
        """Say that messages of one broker are done; return what is refused. Raises `BridgeError`."""
        # By the receipts that are sent: they may change before the answer comes.
        sent = {one.receipt: one for one in done}
        return client.acknowledged(sent, await self.answers.of(self.consumer.acknowledge(done)))

    async def hide(self, one: client.Incoming, seconds: int) -> None:
        """Have a message come again in `seconds`; raises `BridgeError`."""
        sent = one.receipt
        receipt = client.hidden(await self.answers.of(self.consumer.hide(one, seconds)))
        # It may have come again meanwhile, with a receipt that is newer than this one.
        if one.receipt == sent:
            one.receipt = receipt

    async def close(self) -> None:
        """Leave the group. Idempotent."""
        self.answers.close()
        consumer, self._consumer = self._consumer, None
        if consumer is not None:
            await asyncio.to_thread(consumer.shutdown)

"""Name servers: several of equal standing; one is asked until it fails."""

import logging
from collections.abc import Awaitable, Callable

from mq2mqtt.rocketmq.codes import RequestCode, ResponseCode
from mq2mqtt.rocketmq.errors import NotConnected, RequestTimeout, for_code
from mq2mqtt.rocketmq.remoting import Response
from mq2mqtt.rocketmq.route import TopicRoute, parse_cluster_masters, parse_route

__all__ = ["NameServers", "parse_addresses"]

logger = logging.getLogger(__name__)

Call = Callable[[str, int, dict[str, str]], Awaitable[Response]]


def parse_addresses(text: str) -> tuple[str, ...]:
    """Split `host:port;host:port`.

    Raises:
        ValueError: an address is missing or malformed.
    """
    addresses = tuple(part.strip() for part in text.split(";") if part.strip())
    for address in addresses:
        host, _, port = address.rpartition(":")
        if not host or not port.isascii() or not port.isdecimal() or not 0 < int(port) < 65536:  # noqa: PLR2004 - ports
            raise ValueError(f"{address!r} is not HOST:PORT")
    if not addresses:
        raise ValueError("no name server is given; write HOST:PORT, several with ';' between them")
    return addresses


class NameServers:
    """Asks a name server, and the next one when it does not answer."""

    def __init__(self, addresses: tuple[str, ...], call: Call) -> None:
        self.addresses = addresses
        self._call = call
        self._current = 0

    async def route(self, topic: str) -> TopicRoute:
        """Return the route of `topic`.

        Raises:
            TopicNotFound: no name server that answers knows it.
            NotConnected, RequestTimeout: none answers.
            AnswerError: one answered with another error.
        """
        fields = {"topic": topic, "acceptStandardJsonOnly": "true"}
        response = await self._ask(RequestCode.GET_ROUTEINFO_BY_TOPIC, fields)
        return parse_route(topic, response.body)

    async def cluster_masters(self) -> dict[str, str]:
        """Return the address of each broker's master by the broker's name; raises as `route`."""
        return parse_cluster_masters((await self._ask(RequestCode.GET_BROKER_CLUSTER_INFO, {})).body)

    async def _ask(self, code: RequestCode, fields: dict[str, str]) -> Response:
        """Ask from the current one on. A topic unknown to one, which may have just started, is asked of all."""
        problem: NotConnected | RequestTimeout | None = None
        unknown: tuple[str, Response] | None = None
        first = self._current
        for step in range(len(self.addresses)):
            index = (first + step) % len(self.addresses)
            address = self.addresses[index]
            try:
                response = await self._call(address, code, fields)
            except (NotConnected, RequestTimeout) as error:
                problem = error
                logger.debug("name server %s: %s", address, error)
                continue
            if response.code == ResponseCode.TOPIC_NOT_EXIST:
                if unknown is None:
                    unknown = (address, response)
                    self._current = index
                continue
            self._current = index
            if response.code != ResponseCode.SUCCESS:
                raise for_code(response.code, response.remark, address=address)
            return response
        if unknown is not None:
            address, response = unknown
            raise for_code(response.code, response.remark, address=address)
        assert problem is not None  # noqa: S101 - parse_addresses gives at least one address
        raise problem

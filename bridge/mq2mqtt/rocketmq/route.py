"""Where a topic lives: parsing of name-server answers. No I/O."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

from mq2mqtt.rocketmq.errors import FrameError

__all__ = [
    "MASTER",
    "ReadQueue",
    "TopicRoute",
    "WriteQueue",
    "parse_cluster_masters",
    "parse_json",
    "parse_members",
    "parse_route",
]

MASTER: Final = 0  # the broker id of a master
PERM_READ: Final = 4
PERM_WRITE: Final = 2

# A string, or an integer that stands where a key stands. Strings are matched first, so that text within them is safe;
# one that does not end is matched too, or the search would begin again at each of its bytes.
_LAX_KEY: Final = re.compile(rb'(?s)"(?:[^"\\]|\\.)*+"?|([{,]\s*)(-?\d+)(?=\s*:)')

# More than any cluster has: a few bytes can announce any number of them.
_MAX_QUEUES: Final = 65_536


@dataclass(frozen=True, slots=True, order=True)
class WriteQueue:
    """A queue that messages can be sent to. Sorted order is the same in every client."""

    broker: str
    queue_id: int


@dataclass(frozen=True, slots=True, order=True)
class ReadQueue:
    """A queue that messages can be pulled from."""

    broker: str
    queue_id: int


@dataclass(frozen=True, slots=True)
class TopicRoute:
    """The queues of a topic and the addresses of their brokers, as the name server announces them.

    `brokers` maps a broker's name to the addresses of its master (id 0) and replicas. Queues are sorted;
    `write_queues` has only those of brokers that have a master.
    """

    topic: str
    write_queues: tuple[WriteQueue, ...]
    read_queues: tuple[ReadQueue, ...]
    brokers: Mapping[str, Mapping[int, str]]

    def master(self, broker: str) -> str | None:
        """Return the address of the master of `broker`, if it has one now."""
        return self.brokers.get(broker, {}).get(MASTER)

    def reader(self, broker: str) -> str | None:
        """Return the address to pull from: the master's, or the first replica's while there is no master."""
        addresses = self.brokers.get(broker)
        return addresses[min(addresses)] if addresses else None


def parse_json(data: bytes) -> Any:  # noqa: ANN401 - JSON
    """Read standard JSON, or fastjson's with integer keys that have no quotes.

    Raises:
        FrameError: it is neither.
    """
    try:
        try:
            return json.loads(data)
        except ValueError:
            return json.loads(_LAX_KEY.sub(_quote_key, data))
    except (ValueError, RecursionError) as error:
        raise FrameError(f"the body of an answer is no JSON: {error}") from error


def _quote_key(match: re.Match[bytes]) -> bytes:
    return match[0] if match[2] is None else match[1] + b'"' + match[2] + b'"'


# Routes are asked for every few seconds and hardly ever change: parsing took an eighth of what a thousand
# idle rules cost.
@lru_cache(maxsize=2048)
def parse_route(topic: str, data: bytes) -> TopicRoute:
    """Read the body of an answered GET_ROUTEINFO_BY_TOPIC; the same one gives the same object.

    Raises:
        FrameError: it is no route.
    """
    try:
        value = parse_json(data)
        brokers = {
            _text(broker["brokerName"]): {
                int(number): _text(address) for number, address in broker["brokerAddrs"].items()
            }
            for broker in value.get("brokerDatas") or ()
        }
        write: list[WriteQueue] = []
        read: list[ReadQueue] = []
        for queues in value.get("queueDatas") or ():
            name, perm = _text(queues["brokerName"]), queues["perm"]
            if perm & PERM_WRITE and MASTER in brokers.get(name, {}):
                write += [WriteQueue(name, number) for number in _numbers(queues["writeQueueNums"], len(write))]
            if perm & PERM_READ and brokers.get(name):
                read += [ReadQueue(name, number) for number in _numbers(queues["readQueueNums"], len(read))]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise FrameError(f"the route of {topic} cannot be read: {error!r}") from error
    return TopicRoute(topic, tuple(sorted(write)), tuple(sorted(read)), brokers)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{type(value).__name__} in the place of a text")
    return value


def _numbers(count: int, before: int) -> range:
    """Return the numbers of a broker's queues, after `before` others of the topic."""
    if count + before > _MAX_QUEUES:
        raise ValueError(f"more than {_MAX_QUEUES} queues")
    return range(count)


def parse_cluster_masters(data: bytes) -> dict[str, str]:
    """Read the body of an answered GET_BROKER_CLUSTER_INFO: broker name -> address of its master.

    Raises:
        FrameError: it is no cluster information.
    """
    try:
        table = parse_json(data)["brokerAddrTable"]
        addresses = {name: broker["brokerAddrs"].get(str(MASTER)) for name, broker in table.items()}
        return {name: _text(address) for name, address in sorted(addresses.items()) if address}
    except (KeyError, TypeError, AttributeError) as error:
        raise FrameError(f"the cluster information cannot be read: {error!r}") from error


def parse_members(data: bytes) -> tuple[str, ...]:
    """Read the body of an answered GET_CONSUMER_LIST_BY_GROUP: the client ids of the group's members.

    Raises:
        FrameError: it is no such list.
    """
    try:
        return tuple(map(_text, parse_json(data).get("consumerIdList") or ()))
    except (TypeError, AttributeError) as error:
        raise FrameError(f"the members of a group cannot be read: {error!r}") from error

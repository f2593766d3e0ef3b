"""What several end-to-end modules need beside the RocketMQ that all tests share."""

from collections.abc import Iterator

import pytest

from tests.conftest import SharedRocketMQ
from tests.rocket_peer import RocketPeer


@pytest.fixture
def peer(rocketmq: SharedRocketMQ) -> Iterator[RocketPeer]:
    """Give an application at the shared RocketMQ."""
    with RocketPeer(rocketmq.namesrv) as peer:
        yield peer

"""The MQTT brokers that the bridge is measured with."""

from dataclasses import dataclass

from tests.bench.experiment import Bench
from tests.bench.mosquitto_servers import AloneMosquitto, MosquittoServer
from tests.bench.servers import Alone, AloneServer, BridgeServer


@dataclass(frozen=True)
class Host:
    """A broker, by itself and with the bridge."""

    name: str
    alone: type[Alone]
    bridge: type[BridgeServer]

    async def keep_alone(self, bench: Bench) -> Alone:
        """Return the one by itself that all runs of an experiment use."""
        return await bench.kept(f"{self.name} alone", lambda: self.alone.start(bench))

    async def keep_outbound(self, bench: Bench) -> BridgeServer:
        """Return the one with an outbound rule that all runs of an experiment use."""
        return await bench.kept(f"{self.name} outbound", lambda: self.bridge.outbound(bench))

    async def keep_inbound(self, bench: Bench) -> BridgeServer:
        """Return the one with an inbound rule that all runs of an experiment use."""
        return await bench.kept(f"{self.name} inbound", lambda: self.bridge.inbound(bench))


AMQTT = Host("amqtt", AloneServer, BridgeServer)
MOSQUITTO = Host("mosquitto", AloneMosquitto, MosquittoServer)

"""The Prometheus collectors: names, labels and meanings are a contract (design section 8)."""

from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from mq2mqtt import __version__
from mq2mqtt.host import DropReason
from mq2mqtt.telemetry import Direction, Ending, Histogram, ReloadOutcome, RuleState, RuleTelemetry, Telemetry

__all__ = ["METRICS", "build_registry", "markdown"]

METRICS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "mq2mqtt_messages_total": (
        "counter",
        ("rule", "direction", "outcome"),
        "Messages by what became of them.",
    ),
    "mq2mqtt_in_flight": (
        "gauge",
        ("rule", "direction"),
        "Messages being sent to RocketMQ (uplink), or received and not yet settled (downlink).",
    ),
    "mq2mqtt_lane_messages": ("gauge", ("rule",), "Messages in the lane that RocketMQ has not stored yet."),
    "mq2mqtt_lane_bytes": ("gauge", ("rule",), "Bytes in the lane that RocketMQ has not stored yet."),
    "mq2mqtt_lane_limit_bytes": ("gauge", ("rule",), "`spool.max_bytes`: the lane is full when so many bytes wait."),
    "mq2mqtt_lane_oldest_seconds": ("gauge", ("rule",), "Age of the oldest message in the lane; 0 when it is empty."),
    "mq2mqtt_dropped_total": (
        "counter",
        ("rule", "reason"),
        "Messages dropped, by reason: a downlink message's outcome, or a publish that its lane could not take.",
    ),
    "mq2mqtt_invalid_properties_total": (
        "counter",
        ("rule", "property"),
        "Properties of downlink messages that were ignored, or replaced by their default, because of a bad value.",
    ),
    "mq2mqtt_uplink_seconds": ("histogram", ("rule",), "From accepted into the lane to stored in RocketMQ."),
    "mq2mqtt_downlink_seconds": (
        "histogram",
        ("rule",),
        "From born in RocketMQ (the producer's clock) to handed to a device, once for each device.",
    ),
    "mq2mqtt_consumer_lag": (
        "gauge",
        ("rule",),
        "Messages in RocketMQ behind the committed offsets; only enabled rules, not with each driver.",
    ),
    "mq2mqtt_rule_up": ("gauge", ("rule",), "1 while the last send, fetch or probe succeeded; only enabled rules."),
    "mq2mqtt_connected_clients": ("gauge", (), "MQTT clients connected now."),
    "mq2mqtt_offline_messages": ("gauge", (), "Messages kept for clients, until they are delivered."),
    "mq2mqtt_offline_total": ("counter", ("outcome",), "Messages kept for clients, by what became of them."),
    "mq2mqtt_parked_messages": ("gauge", ("rule",), "Messages put aside because they can never go on as they are."),
    "mq2mqtt_auth_total": (
        "counter",
        ("mode", "outcome"),
        "Logins decided by the bridge's own authentication: none yet, it leaves them to the broker.",
    ),
    "mq2mqtt_reload_total": (
        "counter",
        ("outcome",),
        "Reloads of the configuration: `applied`, or `invalid` and changed nothing.",
    ),
    "mq2mqtt_configured_timestamp_seconds": (
        "gauge",
        (),
        "When the rules at work were read: at the start, or at the last reload that was applied.",
    ),
    "mq2mqtt_build_info": ("gauge", ("version",), "1, with the version of the bridge."),
}

_UPLINK_OUTCOMES = {
    "accepted": "in the lane",
    "sent": "stored in RocketMQ",
    "parked": "put aside: it can never be sent as it is",
}
_DOWNLINK_OUTCOMES = {
    "received": "came from RocketMQ",
    "delivered": "at least one device has it (QoS 0: it was written to the connection)",
    "no_subscriber": "no client subscribes to its topic",
    "queued": "kept for a client that is away, or did not acknowledge",
    "expired": "its time was over before it could be delivered or kept",
    "parked": "put aside: its topic or size is impossible in MQTT, or over a limit that is set",
    "skipped": "a bridge sent it (loop guard); what `tags` leaves out is not received at all",
    "dropped": "nobody got it; the reason is counted",
}
_OFFLINE_OUTCOMES = {
    "stored": "in the database",
    Ending.DELIVERED: "its client has it",
    Ending.EXPIRED: "its time, or `offline.retention`, was over",
    Ending.EVICTED: "made room for a newer one: `offline.per_client`, `offline.total`",
    Ending.DROPPED: "cannot be delivered to its client; `mq2mqtt_dropped_total` has the reason",
}
_REASONS = {
    DropReason.LANE_FULL: "uplink: a QoS 0 publish, a client event or a receipt found the lane full; of client events "
    "the difference is told later",
    DropReason.LANE_NOT_OPEN: "uplink: a QoS 0 publish, or a receipt, came before its rule's lane was open",
    DropReason.TOO_LARGE: "uplink: a publish, or a client event, larger than the whole lane, or with `host.type: mqtt` "
    "over `limits`; downlink: more than an operation of Mosquitto's hook holds, or with `host.type: mqtt` than the "
    "broker takes in a packet",
    DropReason.SLOW_DEVICE: "the device did not acknowledge, or did not read, within 5 s",
    DropReason.DISCONNECTED: "the device left before it acknowledged",
    DropReason.NOT_AUTHORIZED: "the broker's access control does not let the device receive it",
    DropReason.NOT_PERSISTENT: "the client is away, and the message is not one to be kept for it: QoS 0, or "
    "`cleansessionflag=true`; or its session is anonymous",
    DropReason.OFFLINE_QUOTA: "a kept message made room for a newer one (`offline.per_client`, `offline.total`)",
    DropReason.SESSION_ENDED: "kept for a persistent session, and the client came back with cleanSession=true",
    DropReason.NOT_STORABLE: "the database can never hold it; the log says why",
    DropReason.PARKING_FULL: "a parked message made room for a newer one, or one could not be parked: the log says why",
    DropReason.HOST_REFUSED: "downlink: the broker refused to take it; the log says why",
    DropReason.UNREADABLE: "downlink: cannot be decoded: compressed wrongly, properties that are not UTF-8",
}
_INTRODUCTION = (
    "`GET /metrics` on the admin port, for Prometheus. Labels are bounded: rules, directions, outcomes and reasons,",
    "never client ids or topics. Beside these there are Prometheus' usual ones of the process that the bridge runs in:",
    "`process_cpu_seconds_total`, `process_resident_memory_bytes`, `process_open_fds`, `process_max_fds`,",
    "`process_start_time_seconds`.",
    "",
    "`rule` is a rule's id; `<id>.receipts` for the lane of an inbound rule's receipts; `.p2p` for the lane of P2P",
    "messages from device to device that are to be kept, where `sent` means handed on.",
)
_INVARIANTS = (
    "## Invariants",
    "",
    "- uplink: `accepted = sent + parked + lane_messages`; `accepted` starts with the messages found in the lane",
    "- downlink: `received = delivered + no_subscriber + queued + expired + parked + skipped + dropped + in_flight`;",
    "  a message counts once, with the best outcome of its receivers (delivered, queued, dropped)",
    "- kept messages: `stored = delivered + expired + evicted + dropped + mq2mqtt_offline_messages`; `stored` starts",
    "  with the messages found in the database",
    "",
    "<!-- Generated from bridge/mq2mqtt/metrics.py; a test compares. -->",
)


class _BridgeCollector(Collector):
    """Reads the telemetry's plain counters at scrape time."""

    def __init__(self, telemetry: Telemetry, connected_clients: Callable[[], int], refresh: Callable[[], None]) -> None:
        self._telemetry = telemetry
        self._connected_clients = connected_clients
        self._refresh = refresh

    def collect(self) -> Iterator[Metric]:
        self._refresh()
        rules = list(self._telemetry.rules.values())
        relay = self._telemetry.relay
        # Without a lane it has taken nothing yet.
        if relay is not None and relay.lane_limit_bytes:
            rules.append(relay)
        yield _counter("mq2mqtt_messages_total", _messages(rules))
        yield _gauge("mq2mqtt_in_flight", (((r.rule_id, r.direction), r.in_flight) for r in rules))
        uplinks = [rule for rule in rules if rule.direction is Direction.UPLINK]
        downlinks = [rule for rule in rules if rule.direction is Direction.DOWNLINK]
        yield _gauge("mq2mqtt_lane_messages", (((r.rule_id,), r.lane_messages) for r in uplinks))
        yield _gauge("mq2mqtt_lane_bytes", (((r.rule_id,), r.lane_bytes) for r in uplinks))
        # A disabled rule has no lane unless something waits in it.
        yield _gauge(
            "mq2mqtt_lane_limit_bytes", (((r.rule_id,), r.lane_limit_bytes) for r in uplinks if r.lane_limit_bytes)
        )
        yield _gauge("mq2mqtt_lane_oldest_seconds", (((r.rule_id,), r.lane_oldest_seconds) for r in uplinks))
        yield _counter("mq2mqtt_dropped_total", (((r.rule_id, k), n) for r in rules for k, n in r.drops.items()))
        yield _counter(
            "mq2mqtt_invalid_properties_total",
            (((r.rule_id, k), n) for r in rules for k, n in r.invalid_properties.items()),
        )
        yield _histogram("mq2mqtt_uplink_seconds", uplinks)
        yield _histogram("mq2mqtt_downlink_seconds", downlinks)
        yield _gauge("mq2mqtt_consumer_lag", (((r.rule_id,), r.lag) for r in downlinks if r.lag is not None))
        yield _gauge(
            "mq2mqtt_rule_up",
            (((r.rule_id,), int(r.up)) for r in self._telemetry.told if r.state in (RuleState.UP, RuleState.DOWN)),
        )
        yield _gauge("mq2mqtt_connected_clients", [((), self._connected_clients())])
        yield _gauge("mq2mqtt_offline_messages", [((), self._telemetry.offline.messages)])
        kept = self._telemetry.offline.outcomes
        yield _counter("mq2mqtt_offline_total", (((k,), kept[k]) for k in _OFFLINE_OUTCOMES))
        yield _gauge("mq2mqtt_parked_messages", (((r.rule_id,), r.parked_messages) for r in rules))
        yield _counter("mq2mqtt_auth_total", ())
        yield _counter("mq2mqtt_reload_total", (((k,), self._telemetry.reloads[k]) for k in ReloadOutcome))
        yield _gauge("mq2mqtt_configured_timestamp_seconds", [((), self._telemetry.configured_at)])
        yield _gauge("mq2mqtt_build_info", [((__version__,), 1)])


def _messages(rules: Iterable[RuleTelemetry]) -> Iterator[tuple[tuple[str, ...], int]]:
    for rule in rules:
        outcomes = _UPLINK_OUTCOMES if rule.direction is Direction.UPLINK else _DOWNLINK_OUTCOMES
        for outcome in outcomes:
            yield (rule.rule_id, rule.direction, outcome), rule.outcomes[outcome]


def _counter(name: str, samples: Iterable[tuple[tuple[str, ...], int]]) -> Metric:
    _, labels, text = METRICS[name]
    family = CounterMetricFamily(name.removesuffix("_total"), text, labels=labels)
    for values, value in samples:
        family.add_metric(values, value)
    return family


def _gauge(name: str, samples: Iterable[tuple[tuple[str, ...], float]]) -> Metric:
    _, labels, text = METRICS[name]
    family = GaugeMetricFamily(name, text, labels=labels)
    for values, value in samples:
        family.add_metric(values, value)
    return family


def _histogram(name: str, rules: Iterable[RuleTelemetry]) -> Metric:
    _, labels, text = METRICS[name]
    family = HistogramMetricFamily(name, text, labels=labels)
    for rule in rules:
        family.add_metric((rule.rule_id,), _buckets(rule.latency), rule.latency.total)
    return family


def _buckets(histogram: Histogram) -> list[tuple[str, float]]:
    bounds = [*(str(bound) for bound in Histogram.bounds), "+Inf"]
    cumulated, buckets = 0, []
    for bound, count in zip(bounds, histogram.counts, strict=True):
        cumulated += count
        buckets.append((bound, float(cumulated)))
    return buckets


def build_registry(
    telemetry: Telemetry, *, connected_clients: Callable[[], int], refresh: Callable[[], None]
) -> CollectorRegistry:
    """Return a registry of the bridge's metrics and the process's own.

    `refresh` brings the gauges up to date before each scrape.
    """
    registry = CollectorRegistry()
    registry.register(_BridgeCollector(telemetry, connected_clients, refresh))
    # Registers itself.
    ProcessCollector(registry=registry)
    return registry


def markdown() -> str:
    """Return `docs/metrics.md`."""
    lines = ["# Metrics", "", *_INTRODUCTION, "", "| metric | type | labels | meaning |", "|---|---|---|---|"]
    for name, (kind, labels, text) in METRICS.items():
        lines.append(f"| `{name}` | {kind} | {_listed(labels)} | {text} |")
    lines += ["", "## Outcomes", "", "| direction | outcome | meaning |", "|---|---|---|"]
    for direction, outcomes in (("uplink", _UPLINK_OUTCOMES), ("downlink", _DOWNLINK_OUTCOMES)):
        lines += [f"| {direction} | `{outcome}` | {text} |" for outcome, text in outcomes.items()]
    lines += ["", "## Outcomes of `mq2mqtt_offline_total`", "", "| outcome | meaning |", "|---|---|"]
    lines += [f"| `{outcome}` | {text} |" for outcome, text in _OFFLINE_OUTCOMES.items()]
    lines += ["", "## Reasons of `mq2mqtt_dropped_total`", "", "| reason | meaning |", "|---|---|"]
    lines += [f"| `{reason}` | {text} |" for reason, text in _REASONS.items()]
    return "\n".join([*lines, "", *_INVARIANTS]) + "\n"


def _listed(words: Iterable[str]) -> str:
    return ", ".join(f"`{word}`" for word in words)

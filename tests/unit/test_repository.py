"""The rules of the house that a machine can hold (CONTRIBUTING.md)."""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted([*(ROOT / "bridge").rglob("*.py"), *(ROOT / "plugins").rglob("*.py")])
TESTS = sorted((ROOT / "tests").rglob("*.py"))

# Who may import whom: a module may import its own layer's package and any layer above it in this list.
# The parts of one layer do not know each other, but for the pure ones.
LAYERS = [
    {"mq2mqtt", "errors", "message", "topics"},
    {"mapping", "status", "rules", "settings", "log", "spool", "expiry"},
    {"link", "host", "store"},
    {"metrics", "telemetry", "lane_gauges"},
    {"uplink", "downlink", "presence", "offline", "intake", "outlet", "replay", "relay", "receipts"},
    {"workers", "status_worker", "receipts_worker", "running", "parking"},
    {"admin", "instance", "history"},
    {"bridge"},
    {"reload", "checks", "explain", "show"},
    {"quickstart"},
    {"cli", "__main__"},
]
MAY_NOT_KNOW_EACH_OTHER = {"link", "host", "store", "uplink", "downlink", "presence", "offline"}

# Sans-I/O: what they do depends on their arguments alone.
PURE = (
    "errors",
    "message",
    "topics",
    "mapping",
    "rules",
    "status",
    "presence/state",
    "presence/records",
    "expiry",
    "spool/frame",
    "store/changes",
    "store/checks",
    "store/properties",
    "rocketmq/remoting",
    "rocketmq/allocation",
    "offline/pacing",
    "offline/ledger",
)
IO_MODULES = {"asyncio", "socket", "ssl", "selectors", "subprocess", "threading", "loguru", "amqtt", "aiohttp"}

FUNCTION_LINES = 80
MODULE_LINES = 400

# Longer than the rule allows, each with the reason; none over MODULE_LINES_AT_MOST.
LONG_MODULES = {
    "bridge/mq2mqtt/rocketmq/consumer.py": "one state machine: who owns which queue",
    "bridge/mq2mqtt/settings/__init__.py": "one tree, a third of it descriptions",
    "bridge/mq2mqtt/spool/lane.py": "one format's one writer",
}
MODULE_LINES_AT_MOST = 650

# What bounds a queue that has no bound of its own is said on its line.
BOUNDED_ELSEWHERE = re.compile(r"#.*\b(un)?bounded\b.*\w")


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


def imports(path: Path) -> Iterator[str]:
    """Every module that `path` imports at run time, in functions too; not those for type checking alone."""
    for node in run_time_nodes(parsed(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def run_time_nodes(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}:
            continue
        yield child
        yield from run_time_nodes(child)


def part_of(module: str) -> str:
    """`mq2mqtt.spool.lane.Lane` -> `spool`; `mq2mqtt.__version__` -> `mq2mqtt`."""
    parts = module.split(".")
    if len(parts) > 1 and any((ROOT / "bridge" / "mq2mqtt" / file).exists() for file in (parts[1], f"{parts[1]}.py")):
        return parts[1]
    return "mq2mqtt"


def layer_of(part: str) -> int:
    for number, layer in enumerate(LAYERS):
        if part in layer:
            return number
    raise AssertionError(f"mq2mqtt.{part} is in no layer: say in LAYERS where it belongs")


def core_modules() -> Iterator[tuple[Path, str]]:
    for path in sorted((ROOT / "bridge" / "mq2mqtt").rglob("*.py")):
        inner = path.relative_to(ROOT / "bridge" / "mq2mqtt")
        part = inner.parts[0].removesuffix(".py")
        yield path, "mq2mqtt" if part == "__init__" else part


def test_imports_point_one_way() -> None:
    wrong = []
    for path, part in core_modules():
        if part == "rocketmq":
            continue
        for module in imports(path):
            if not module.startswith("mq2mqtt."):
                continue
            other = part_of(module)
            if other == "rocketmq":
                if part not in {"link", "quickstart"}:
                    wrong.append(
                        f"{name_of(path)} imports {module}: only link/ and what starts a RocketMQ know the client"
                    )
            elif layer_of(other) > layer_of(part):
                wrong.append(f"{name_of(path)} imports {module}, which is further out")
            elif other != part and {part, other} <= MAY_NOT_KNOW_EACH_OTHER and layer_of(other) == layer_of(part):
                wrong.append(f"{name_of(path)} imports {module}, its neighbour")
    assert wrong == []


def test_the_rocketmq_client_stands_alone() -> None:
    wrong = [
        f"{name_of(path)} imports {module}"
        for path in sorted((ROOT / "bridge" / "mq2mqtt" / "rocketmq").rglob("*.py"))
        for module in imports(path)
        if module.startswith("mq2mqtt") and not module.startswith("mq2mqtt.rocketmq")
    ]
    assert wrong == []


def test_the_store_knows_messages_and_errors_alone() -> None:
    wrong = [
        f"{name_of(path)} imports {module}"
        for path, part in core_modules()
        for module in imports(path)
        if part == "store" and module.startswith("mq2mqtt.") and part_of(module) not in {"store", "message", "errors"}
    ]
    assert wrong == []


def test_only_the_store_knows_the_database() -> None:
    wrong = [
        f"{name_of(path)} imports {module}"
        for path, part in core_modules()
        for module in imports(path)
        if module.split(".")[0] in {"sqlalchemy", "sqlite3", "aiosqlite", "asyncpg"} and part != "store"
    ]
    assert wrong == []


def test_only_the_command_line_knows_the_plugins() -> None:
    wrong = [
        f"{name_of(path)} imports {module}"
        for path, part in core_modules()
        for module in imports(path)
        if module.startswith(("mq2mqtt_amqtt", "mq2mqtt_mosquitto", "mq2mqtt_mqtt", "amqtt.")) and part != "cli"
        # The quickstart's device is made of amqtt's client.
        if not (part == "quickstart" and module.startswith(("amqtt.client", "amqtt.errors")))
    ]
    assert wrong == []


@pytest.mark.parametrize("module", PURE)
def test_the_pure_core_does_no_io(module: str) -> None:
    path = ROOT / "bridge" / "mq2mqtt" / f"{module}.py"
    assert {name.split(".")[0] for name in imports(path)} & IO_MODULES == set()


def test_every_task_has_a_name() -> None:
    wrong = [
        f"{name_of(path)}:{node.lineno}"
        for path in SOURCES
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "create_task"
        and not any(keyword.arg == "name" for keyword in node.keywords)
    ]
    assert wrong == []


def test_functions_are_short() -> None:
    wrong = [
        f"{name_of(path)}:{node.lineno} {node.name}: {lines} lines"
        for path in [*SOURCES, *TESTS]
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (lines := (node.end_lineno or node.lineno) - node.lineno + 1) > FUNCTION_LINES
    ]
    assert wrong == []


def test_modules_are_short() -> None:
    lengths = {name_of(path): len(path.read_text().splitlines()) for path in SOURCES}
    assert {name: lines for name, lines in lengths.items() if lines > MODULE_LINES_AT_MOST} == {}
    assert {name: lines for name, lines in lengths.items() if lines > MODULE_LINES and name not in LONG_MODULES} == {}


def queues_without_bound(path: Path) -> Iterator[str]:
    lines = path.read_text().splitlines()
    for node in ast.walk(parsed(path)):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func).rpartition(".")[2]
        position = {"Queue": 0, "PriorityQueue": 0, "LifoQueue": 0, "deque": 1, "SimpleQueue": None}.get(called, -1)
        if position == -1:
            continue
        bounds = [keyword.value for keyword in node.keywords if keyword.arg in {"maxsize", "maxlen"}]
        if position is not None:
            bounds += node.args[position : position + 1]
        unbounded = not bounds or ast.unparse(bounds[0]) in {"0", "None"}
        if unbounded and not BOUNDED_ELSEWHERE.search(lines[node.lineno - 1]):
            yield f"{name_of(path)}:{node.lineno}: {called}"


def test_queues_are_bounded_or_say_what_bounds_them() -> None:
    assert [place for path in SOURCES for place in queues_without_bound(path)] == []


def test_nothing_is_skipped_without_a_reason() -> None:
    wrong = []
    for path in TESTS:
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Attribute) and re.fullmatch(r"pytest\.mark\.(skip|xfail)", ast.unparse(node)):
                wrong.append(f"{name_of(path)}:{node.lineno} {ast.unparse(node)}")
            if (
                isinstance(node, ast.Call)
                and ast.unparse(node.func) in {"pytest.skip", "pytest.xfail", "pytest.mark.skipif"}
                and not ((node.args and (len(node.args) == 1 or node.keywords)) or node.keywords)
            ):
                wrong.append(f"{name_of(path)}:{node.lineno} {ast.unparse(node)}")
    assert wrong == []


def tracked_texts() -> Iterator[tuple[str, str]]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    for name in filter(None, listed.decode().split("\0")):
        path = ROOT / name
        if path != Path(__file__) and path.is_file():
            yield name, path.read_bytes().decode(errors="replace")


# Written in pieces, so that this file may be looked at too.
MACHINE_PATHS = re.compile(r"/(?:work|root|home/(?!rocketmq\b)[a-z]+|Users/[a-z]+)/|/tmp/(?!broker\.conf)\w")
REGISTRIES = re.compile(
    r"(?:files\.pythonhosted|pypi|repo1?\.maven\.apache|repo1\.maven|registry\.npmjs|proxy\.golang)"
    r"\.(?:org|com)|index-url[ =]http"
)


def test_no_file_speaks_of_a_machine_or_a_registry() -> None:
    wrong = [
        f"{name}: {found[0]}"
        for name, text in tracked_texts()
        for pattern in (MACHINE_PATHS, REGISTRIES)
        if (found := pattern.search(text))
    ]
    assert wrong == []


DRIVER_REQUIREMENTS = ("librocketmq", "grpc", "librocketmq-library")


def requirements(kind: str) -> dict[str, str]:
    """Package -> version of requirements/KIND.txt."""
    lines = (ROOT / "requirements" / f"{kind}.txt").read_text().splitlines()
    return {found[1]: found[2] for line in lines if (found := re.match(r"([\w.-]+)==(\S+)", line))}


def test_every_requirement_is_pinned_and_hashed_and_developers_have_what_users_have() -> None:
    run, dev = requirements("run"), requirements("dev")
    assert run
    assert run.items() <= dev.items()
    for driver in DRIVER_REQUIREMENTS:
        # They are installed beside what developers have.
        assert [name for name, version in requirements(driver).items() if dev.get(name, version) != version] == []
    for kind in ("run", "dev", *DRIVER_REQUIREMENTS):
        text = (ROOT / "requirements" / f"{kind}.txt").read_text()
        blocks = re.split(r"\n(?=\S)", text.strip())
        assert [block.splitlines()[0] for block in blocks if "--hash=sha256:" not in block] == []


@pytest.mark.parametrize("script", ["scripts/check", "scripts/test", "scripts/quickstart", "scripts/bench", ".ci/run"])
def test_scripts_are_strict_bash(script: str) -> None:
    path = ROOT / script
    assert path.stat().st_mode & 0o111 == 0o111
    assert path.read_text().startswith("#!/usr/bin/env bash\n")
    assert "set -euo pipefail" in path.read_text()
    subprocess.run(["bash", "-n", str(path)], check=True)

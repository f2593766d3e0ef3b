import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mq2mqtt.rocketmq.errors import FrameError
from mq2mqtt.rocketmq.route import (
    ReadQueue,
    WriteQueue,
    parse_cluster_masters,
    parse_json,
    parse_members,
    parse_route,
)

# As name servers of 4.9 and older write it: integer keys without quotes.
LAX = (
    b'{"brokerDatas":[{"brokerAddrs":{1:"10.0.0.2:10911",0:"10.0.0.1:10911"},"brokerName":"b","cluster":"C"},'
    b'{"brokerAddrs":{2:"10.0.0.4:10911"},"brokerName":"a","cluster":"C"}],"filterServerTable":{},'
    b'"queueDatas":[{"brokerName":"b","perm":6,"readQueueNums":3,"topicSysFlag":0,"writeQueueNums":2},'
    b'{"brokerName":"a","perm":6,"readQueueNums":1,"topicSysFlag":0,"writeQueueNums":1}]}'
)


def route_json(perm: int) -> bytes:
    return json.dumps(
        {
            "brokerDatas": [{"brokerName": "b", "brokerAddrs": {"0": "h:1"}}],
            "queueDatas": [{"brokerName": "b", "perm": perm, "readQueueNums": 2, "writeQueueNums": 1}],
        }
    ).encode()


def test_a_route_in_lax_json() -> None:
    route = parse_route("t", LAX)
    assert route.write_queues == (WriteQueue("b", 0), WriteQueue("b", 1))
    assert route.read_queues == (ReadQueue("a", 0), ReadQueue("b", 0), ReadQueue("b", 1), ReadQueue("b", 2))
    assert route.master("b") == "10.0.0.1:10911"
    assert route.master("a") is None
    assert route.master("unknown") is None
    assert (route.reader("a"), route.reader("b")) == ("10.0.0.4:10911", "10.0.0.1:10911")
    assert route.reader("unknown") is None


@pytest.mark.parametrize(("perm", "write", "read"), [(6, 1, 2), (2, 1, 0), (4, 0, 2), (0, 0, 0)])
def test_permissions_decide_which_queues_count(perm: int, write: int, read: int) -> None:
    route = parse_route("t", route_json(perm))
    assert (len(route.write_queues), len(route.read_queues)) == (write, read)


def test_empty_and_missing_tables_are_an_empty_route() -> None:
    assert parse_route("t", b'{"brokerDatas":null}').write_queues == ()


@pytest.mark.parametrize(
    "data", [b"[]", b"{", b"", b"\xff", b'{"queueDatas":[{}]}', b'{"brokerDatas":[{"brokerName":1}]}']
)
def test_what_is_no_route_is_a_clear_error(data: bytes) -> None:
    with pytest.raises(FrameError):
        parse_route("t", data)


def test_masters_of_a_cluster() -> None:
    data = b'{"brokerAddrTable":{"b":{"brokerAddrs":{0:"h:2",1:"h:3"}},"a":{"brokerAddrs":{1:"h:9"}}}}'
    assert parse_cluster_masters(data) == {"b": "h:2"}
    with pytest.raises(FrameError):
        parse_cluster_masters(b"{}")


NESTED: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text() | st.integers().map(str), inner, max_size=3),
    max_leaves=12,
)


@given(NESTED)
def test_standard_json_is_read_as_it_is(value: object) -> None:
    assert parse_json(json.dumps(value).encode()) == value


def lax(value: object) -> str:
    """Write JSON as fastjson does: a key that is an integer has no quotes."""
    if isinstance(value, dict):
        parts = (
            f"{key if key.removeprefix('-').isdecimal() else json.dumps(key)}:{lax(v)}" for key, v in value.items()
        )
        return "{" + ",".join(parts) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(lax, value)) + "]"
    return json.dumps(value)


@given(NESTED)
def test_lax_json_is_read_whatever_its_strings_hold(value: object) -> None:
    assert parse_json(lax(value).encode()) == value


def test_text_that_looks_like_a_lax_key_is_left_alone() -> None:
    assert parse_json(b'{0:"{1:2,3:4}","a\\",5:":{-6:7}}') == {"0": "{1:2,3:4}", 'a",5:': {"-6": 7}}


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"[" * 200_000, id="deep"),
        pytest.param(b'{"brokerDatas":' + b'{"a":' * 100_000, id="deep objects"),
        pytest.param(b'{"a":"' + b'\\"' * 1_000_000, id="a string of a million quotes without an end"),
        pytest.param(b"{" + b'1:"' * 300_000, id="keys within strings"),
        pytest.param(b"{" + b" " * 1_000_000 + b"1", id="blanks"),
        pytest.param(b"{" + b"1" * 1_000_000, id="a long key"),
    ],
)
def test_json_that_goes_on_and_on_is_refused_at_once(data: bytes) -> None:
    for parse in (lambda data: parse_route("t", data), parse_cluster_masters, parse_members):
        with pytest.raises(FrameError):
            parse(data)


QUEUES = {"brokerName": "a", "perm": 6, "readQueueNums": 1, "writeQueueNums": 1}


@pytest.mark.parametrize(
    "change",
    [
        {"readQueueNums": 2**31 - 1},
        {"writeQueueNums": 10**30},
        {"readQueueNums": "4"},
        {"brokerName": 7},
        {"brokerName": ["a"]},
        {"perm": None},
    ],
)
def test_a_route_of_nonsense_is_refused(change: dict[str, object]) -> None:
    brokers = [{"brokerName": "a", "brokerAddrs": {"0": "h:1"}}]
    value = {"brokerDatas": brokers, "queueDatas": [QUEUES, {**QUEUES, **change}]}
    with pytest.raises(FrameError, match="the route of t cannot be read"):
        parse_route("t", json.dumps(value).encode())


def test_a_route_of_too_many_queues_in_all_is_refused() -> None:
    names = [f"b{number}" for number in range(70)]
    value = {
        "brokerDatas": [{"brokerName": name, "brokerAddrs": {"0": "h:1"}} for name in names],
        "queueDatas": [{**QUEUES, "brokerName": name, "readQueueNums": 1000} for name in names],
    }
    with pytest.raises(FrameError, match="more than 65536 queues"):
        parse_route("t", json.dumps(value).encode())


def test_the_members_of_a_group() -> None:
    assert parse_members(b'{"consumerIdList":["a","b"]}') == ("a", "b")
    assert parse_members(b'{"consumerIdList":null}') == parse_members(b"{}") == ()
    for wrong in (b"[]", b'{"consumerIdList":[1]}', b'{"consumerIdList":7}', b"null"):
        with pytest.raises(FrameError):
            parse_members(wrong)


def test_a_route_that_has_not_changed_is_the_same_object() -> None:
    one = json.dumps({"queueDatas": [], "brokerDatas": []}).encode()
    other = json.dumps({"queueDatas": [], "brokerDatas": [{"brokerName": "b", "brokerAddrs": {"0": "h:1"}}]}).encode()
    assert parse_route("t", bytes(bytearray(one))) is parse_route("t", one)
    assert parse_route("t", other) != parse_route("t", one)
    assert parse_route("u", one).topic == "u"

"""What the doctor says of a cluster: no cluster is needed, only what its nodes would have said."""

import json
from typing import Any

import pytest

from kvray.cluster import ClusterStatus, LinkMeasurement, NodeState
from kvray.core.way import Outcome, Way
from kvray.errors import ConfigError
from kvray.watch.cli import parse_settings
from kvray.watch.doctor import Finding, Grade, diagnose, verdict
from kvray.watch.ports import ports_of
from kvray.watch.tables import status_data
from tests.statuses import FIELDS, cluster, engine, node

RDMA: dict[str, Any] = {
    "rdma_devices": ["mlx5_0"],
    "rdma_ports": {"mlx5_0/1": "4: ACTIVE"},
    "has_verbs": False,
    "ucx_settings": {"UCX_TLS": "tcp"},
}


def bad(status: ClusterStatus) -> list[Finding]:
    return [finding for finding in diagnose(status) if finding.grade is Grade.BAD]


def link(node: str, peer: str, way: Way | None = Way.TCP, **fields: Any) -> LinkMeasurement:
    measured = {"latency_us": 180, "gb_per_s": 2.5, "devices": ("eth0",), "read_bytes": 40 << 20}
    ends = {"node_id": node * 56, "peer_id": peer * 56, "is_far": way is not Way.CMA}
    return LinkMeasurement(
        **{"outcome": Outcome.MEASURED, "way": way, **ends, **measured, **fields}
    )


def unmeasured(outcome: Outcome, reason: str) -> LinkMeasurement:
    return LinkMeasurement("a" * 56, "b" * 56, is_far=True, outcome=outcome, reason=reason)


def of_links(status: ClusterStatus, *links: LinkMeasurement, rdma: bool = False) -> list[Finding]:
    """What is said of links, or with rdma only of that."""
    found = diagnose(status, links, wants_rdma=rdma)
    return [f for f in found if f.check == "rdma" or (not rdma and " - " in f.check)]


def warnings(status: ClusterStatus) -> str:
    return " ".join(f.text for f in diagnose(status) if f.grade is Grade.WARNING)


def test_two_equal_engines_on_two_nodes_will_share() -> None:
    status = cluster(node("a", engine(pid=1)), node("b", engine(pid=2)))
    assert not bad(status)
    assert not warnings(status)
    assert verdict(status) == (
        "kvray will share between llama (pid 1 on node aaaaaaaa) and llama (pid 2 on node bbbbbbbb)"
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [("hash_seed", "null"), ("blocks_per_chunk", "16"), ("model_dtype", '"float16"')],
)
def test_the_field_in_which_two_engines_of_a_model_differ_is_named(field: str, value: str) -> None:
    status = cluster(node("a", engine(pid=1)), node("b", engine(pid=2, **{field: value})))
    (finding,) = bad(status)
    assert f"{field}: {FIELDS[field]} and {value}" in finding.text
    assert ("PYTHONHASHSEED" in finding.text) == (field == "hash_seed")
    assert verdict(status).endswith(f"differ in {field}")


def test_makers_that_compute_different_blocks_are_named_once_with_their_engines() -> None:
    here, there = node("a", engine(pid=1)), node("b", engine(pid=2) | {"maker": "0000000200000001"})
    makers = "0000000100000001", "0000000200000001"
    for one, (mine, other) in ((here, makers), (there, makers[::-1])):
        pair = {"namespace": "00ff" * 8, "mine": mine, "other": other, "state": "different"}
        one.details["trust"] = {"requires_proof": True, "pairs": [pair | {"without_verdict": 0}]}
    (finding,) = bad(cluster(here, there))
    assert finding.check == "canaries"
    for said in (*makers, "pid 1 on node aaaaaaaa", "pid 2 on node bbbbbbbb", "00ff00ff"):
        assert said in finding.text
    for one in (here, there):
        one.details["trust"]["pairs"][0]["state"] = "equal"
    assert not bad(cluster(here, there))


@pytest.mark.parametrize("rule", [True, False])
def test_an_engine_that_has_not_computed_its_canary_is_warned_of(*, rule: bool) -> None:
    one = node("a", engine(pid=1) | {"maker": "0" * 16}, engine(pid=2))
    one.details["trust"] = {"requires_proof": rule, "pairs": []}
    said = warnings(cluster(one))
    assert ("pid 1" in said and "canary" in said) == rule
    assert "pid 2" not in said


def test_two_models_are_not_expected_to_share() -> None:
    status = cluster(node("a", engine(pid=1)), node("b", engine("qwen", pid=2, hash_seed="2")))
    assert not bad(status)
    assert verdict(status) == "no two engines share: no two serve the same model"


def test_one_engine_and_none() -> None:
    assert "is alone" in verdict(cluster(node("a", engine())))
    assert "kvray.attach" in verdict(cluster(node("a")))


def test_a_node_that_can_not_start_is_bad_and_says_why() -> None:
    problem = "slab_bytes is 9; /dev/shm has 8 bytes free"
    (finding,) = bad(cluster(node("a", state=NodeState.FAILED, problem=problem)))
    assert problem in finding.text
    assert bad(cluster(node("a", state=NodeState.LOST)))
    assert bad(cluster())


def test_versions_that_differ_are_named_with_their_nodes() -> None:
    other = {"kvray": "1", "ray": "2.60.0", "nixl": "1.3.2", "python": "3.11.7"}
    (finding,) = bad(cluster(node("a"), node("b", versions=other)))
    assert finding.check == "nixl"
    assert "1.5.1 on aaaaaaaa; 1.3.2 on bbbbbbbb" in finding.text


def test_a_slab_that_is_not_locked_and_a_host_that_is_nearly_full_are_warned_of() -> None:
    assert "memlock: 65536 bytes" in warnings(cluster(node("a", locked=False)))
    assert "RAY_memory_usage_threshold" in warnings(cluster(node("a", memory_margin_bytes=1)))
    assert not warnings(cluster(node("a", memory_margin_bytes=-1))), "Ray kills nobody"


def test_a_link_is_told_in_both_directions_as_it_was_measured() -> None:
    status = cluster(node("a"), node("b"))
    there = link("a", "b")
    back = link("b", "a", latency_us=200, gb_per_s=1.25, devices=("eth0", "eth1"))
    (finding,) = of_links(status, there, back)
    assert finding.grade is Grade.GOOD
    assert finding.check == "aaaaaaaa - bbbbbbbb"
    assert finding.text == (
        "aaaaaaaa reads by tcp (eth0): 180 us, 2.50 GB/s; "
        "bbbbbbbb reads by tcp (eth0, eth1): 200 us, 1.25 GB/s"
    )


def test_pairs_that_were_not_measured_are_counted() -> None:
    status = cluster(node("a"), node("b"), node("c"))
    said = [f.text for f in diagnose(status, [link("a", "b"), link("b", "a")])]
    assert "1 of 3 pairs of nodes were measured" in said


@pytest.mark.parametrize(
    ("outcome", "reason", "grade", "advice"),
    [
        (Outcome.LATE, "no answer in 5000 ms", Grade.BAD, "UCX_NET_DEVICES"),
        (Outcome.FAILED, "it is gone", Grade.BAD, "log"),
        (Outcome.NOT_CONNECTED, "it is not on this node's roster", Grade.WARNING, "ask again"),
        (Outcome.SKIPPED, "time was up", Grade.WARNING, "not measured"),
    ],
)
def test_a_link_that_was_not_measured_says_why_and_what_to_do(
    outcome: Outcome, reason: str, grade: Grade, advice: str
) -> None:
    status = cluster(node("a"), node("b"))
    (finding,) = of_links(status, unmeasured(outcome, reason), link("b", "a", Way.CMA, devices=()))
    assert finding.grade is grade, "the worse direction counts"
    assert reason in finding.text
    assert advice in finding.text
    assert "bbbbbbbb reads by cma: 180 us" in finding.text


@pytest.mark.parametrize(
    ("is_far", "way", "devices", "doubt"),
    [
        (False, Way.TCP, ("lo",), "process_vm_readv"),
        (False, Way.CMA, (), ""),
        (True, Way.TCP, ("eth0",), ""),
        (True, Way.RDMA, ("mlx5_0/1",), ""),
        (True, Way.UNCLEAR, ("mlx5_0/1", "ib0"), "TCP over InfiniBand"),
        (True, Way.UNCLEAR, (), "no counter"),
    ],
)
def test_a_way_that_is_odd_is_warned_of(
    *, is_far: bool, way: Way, devices: tuple[str, ...], doubt: str
) -> None:
    status = cluster(node("a"), node("b"))
    (finding,) = of_links(status, link("a", "b", way, devices=devices, is_far=is_far))
    assert (finding.grade is Grade.WARNING) == bool(doubt)
    assert doubt in finding.text


def test_rdma_that_could_be_used_and_is_not_is_bad_and_says_what_to_look_at() -> None:
    status = cluster(node("a", **RDMA), node("b", **RDMA, memlock_bytes=-1))
    (finding,) = of_links(status, link("a", "b"), rdma=True)
    assert finding.grade is Grade.BAD
    for expected in (
        "reads from bbbbbbbb by tcp (eth0)",
        "on aaaaaaaa mlx5_0/1 4: ACTIVE, memlock 65536 bytes, no /dev/infiniband/uverbs*",
        "UCX_TLS=tcp",
        "memlock unlimited",
        "--device=/dev/infiniband",
        "UCX_IB_GID_INDEX",
    ):
        assert expected in finding.text
    assert not [f for f in diagnose(status, [link("a", "b")]) if f.grade is Grade.BAD], "not asked"


def test_rdma_that_is_used_is_good() -> None:
    status = cluster(node("a", **RDMA), node("b", **RDMA))
    (finding,) = of_links(status, link("a", "b", Way.RDMA, devices=("mlx5_0/1",)), rdma=True)
    assert finding.grade is Grade.GOOD
    assert "by rdma (mlx5_0/1)" in finding.text


def test_a_host_without_an_rdma_device_is_named_and_not_bad() -> None:
    status = cluster(node("a", **RDMA), node("b"))
    (finding,) = of_links(status, link("a", "b"), rdma=True)
    assert finding.grade is Grade.WARNING
    assert "no RDMA device on bbbbbbbb" in finding.text


@pytest.mark.parametrize(
    ("status", "links", "expected"),
    [
        (cluster(node("a"), node("b")), [link("a", "b")], "no node has an RDMA device"),
        (
            cluster(node("a", **RDMA), node("b", **RDMA)),
            [link("a", "b", Way.CMA, devices=())],
            "no link between two machines",
        ),
        (
            cluster(node("a", **RDMA), node("b", **RDMA)),
            [unmeasured(Outcome.LATE, "no answer")],
            "no link between two machines",
        ),
    ],
)
def test_where_rdma_can_not_be_checked_that_is_said(
    status: ClusterStatus, links: list[LinkMeasurement], expected: str
) -> None:
    (finding,) = of_links(status, *links, rdma=True)
    assert finding.grade is Grade.WARNING
    assert "nothing could be checked" in finding.text
    assert expected in finding.text


def test_status_as_data_is_what_the_documentation_says() -> None:
    totals = {"hit_tokens_peer": 30, "computed_tokens": 12, "miss_tokens_tail": 12}
    data = status_data(cluster(node("a", engine(), totals=totals), node("b", totals=totals)))
    assert set(data) >= {"cluster", "nodes", "hit_tokens", "miss_tokens", "page_url"}
    first = data["nodes"][0]
    assert set(first) >= {"node", "epoch", "state", "slab_bytes", "used_bytes", "models"}
    assert first["models"] == ["llama"]
    assert data["hit_tokens"] == {"device": 0, "local": 0, "peer": 60, "computed": 24}
    assert data["miss_tokens"] == {"tail": 24}
    assert data["fetch_gb_per_s"] == 2.0
    assert json.loads(json.dumps(data)) == data


def test_settings_are_read_as_json_or_else_as_text() -> None:
    assert parse_settings(["lookup_deadline_ms=500", "slab_bytes=1 GiB"]) == {
        "lookup_deadline_ms": 500,
        "slab_bytes": "1 GiB",
    }
    with pytest.raises(ConfigError, match="NAME=VALUE"):
        parse_settings(["lookup_deadline_ms"])


def test_a_port_on_another_address_than_the_nodes_is_bad() -> None:
    """UCX listens on every interface unless it is told otherwise."""
    listeners = [["::", 16_004], ["198.51.100.2", 37_423], ["203.0.113.9", 37_423]]

    (finding,) = bad(cluster(node("a", engine(), listeners=listeners)))

    assert finding.check == "port of node_store-aaaaaaaa"
    assert "203.0.113.9:37423" in finding.text
    assert "UCX_NET_DEVICES" in finding.text


@pytest.mark.parametrize("address", ["127.0.0.1", "::1", "198.51.100.2"])
def test_loopback_and_the_nodes_own_address_are_where_ports_should_be(address: str) -> None:
    seen = cluster(node("a", engine(), listeners=[["::", 16_004], [address, 37_423]]))

    assert not bad(seen)
    assert [port.expected for port in ports_of(seen)] == [True, True]


def test_one_port_on_all_addresses_is_rays_and_a_second_one_is_not() -> None:
    seen = cluster(node("a", engine(), listeners=[["::", 16_004], ["::", 37_423]]))

    assert [port.expected for port in ports_of(seen)] == [True, False]

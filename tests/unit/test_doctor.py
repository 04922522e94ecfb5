"""What the doctor says of a cluster: no cluster is needed, only what its nodes would have said."""

import json
from typing import Any

import pytest

from kvray.cluster import ClusterStatus, NodeState
from kvray.errors import ConfigError
from kvray.watch.cli import parse_settings
from kvray.watch.doctor import Finding, Grade, diagnose, verdict
from kvray.watch.tables import status_data
from tests.statuses import FIELDS, cluster, engine, node


def bad(status: ClusterStatus) -> list[Finding]:
    return [finding for finding in diagnose(status) if finding.grade is Grade.BAD]


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


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({}, "shared memory"),
        ({"boot_id": "another", "rdma_devices": ["mlx5_0"]}, "rdma (mlx5_0)"),
        ({"boot_id": "another"}, "tcp"),
    ],
)
def test_the_way_between_two_nodes_is_said_with_its_speed(
    facts: dict[str, Any], expected: str
) -> None:
    a = node("a", rate=4.5e6, rdma_devices=["mlx5_0"])
    said = [f.text for f in diagnose(cluster(a, node("b", **facts))) if "GB/s" in f.text]
    assert len(said) == 1
    assert expected in said[0]
    assert "4.50 GB/s" in said[0]


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

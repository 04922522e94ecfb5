"""The files for `ray up` are what Ray's launcher accepts, and have what kvray needs on a node."""

import copy
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.docker import docker_start_cmds
from ray.autoscaler._private.util import prepare_config, validate_config

import kvray
from kvray.engine.versions import TESTED
from tests.cluster.launcher import for_hosts

ROOT = Path(__file__).resolve().parents[2]
LAUNCHED = ("ray_cluster.yaml", "examples/clusters/aws.yaml", "examples/clusters/gcp.yaml")
CLOUDS = LAUNCHED[1:]
NOT_TRIED = "# not tried: "


def load(path: str) -> dict[str, Any]:
    loaded = yaml.safe_load((ROOT / path).read_text())
    assert isinstance(loaded, dict)
    return loaded


@pytest.fixture(params=LAUNCHED)
def config(request: pytest.FixtureRequest) -> dict[str, Any]:
    return load(request.param)


@pytest.fixture
def committed() -> dict[str, Any]:
    return load("ray_cluster.yaml")


def prepared(config: dict[str, Any]) -> dict[str, Any]:
    """As `ray up` does it: with the provider's defaults, then checked by Ray's own schema."""
    full: dict[str, Any] = prepare_config(copy.deepcopy(config))
    validate_config(full)
    return full


def test_ray_accepts_the_file_and_keeps_every_worker(config: dict[str, Any]) -> None:
    types = prepared(config)["available_node_types"]
    workers = [node_type for node_type in types.values() if node_type["min_workers"]]
    assert workers
    assert all(worker["min_workers"] == worker["max_workers"] for worker in workers)


def test_all_hosts_that_are_named_are_started(committed: dict[str, Any]) -> None:
    [node_type] = prepared(committed)["available_node_types"].values()
    assert node_type["min_workers"] == len(committed["provider"]["worker_ips"]) == 3


def test_ray_would_refuse_a_misspelt_key(config: dict[str, Any]) -> None:
    config["docker"]["run_option"] = config["docker"].pop("run_options")
    with pytest.raises(jsonschema.ValidationError, match="run_option"):
        prepared(config)


def container_words(docker: dict[str, Any], kind: str) -> list[str]:
    command = docker_start_cmds(
        user="ubuntu",
        image=docker["image"],
        mount_dict={},
        container_name=docker["container_name"],
        user_options=docker["run_options"] + docker.get(f"{kind}_run_options", []),
        cluster_name="kvray",
        home_directory="/home/ray",
        docker_cmd="docker",
    )
    return list(command.split())


@pytest.mark.parametrize("kind", ["head", "worker"])
def test_a_container_has_shared_memory_and_locked_memory(config: dict[str, Any], kind: str) -> None:
    words = container_words(prepared(config)["docker"], kind)
    assert sum(bool(re.fullmatch(r"--shm-size=\d+g", word)) for word in words) == 1
    assert words[words.index("--ulimit") + 1] == "memlock=-1:-1"
    assert "--cap-add=IPC_LOCK" in words
    assert [word for word in words if word.startswith(("--net", "--network"))] == ["--net=host"]


def test_hosts_with_rdma_cards_hand_them_to_the_container(committed: dict[str, Any]) -> None:
    assert "--device=/dev/infiniband" in container_words(prepared(committed)["docker"], "worker")


def test_every_node_gets_versions_that_were_tested_together(config: dict[str, Any]) -> None:
    full = prepared(config)
    [command] = full["setup_commands"]
    wheel = f"kvray-{kvray.__version__}-py3-none-any.whl"
    assert full["file_mounts"][f"~/{wheel}"] == f"dist/{wheel}"
    assert f'"$HOME/{wheel}[vllm,cuda12]"' in command
    pins = dict(re.findall(r"'([a-z]+)(?:\[[a-z0-9,]+\])?==([0-9.]+)'", command))
    assert set(pins) == {"ray", "vllm", "nixl"}
    assert TESTED[pins["vllm"]] == pins["nixl"]
    assert pins["ray"] in config["docker"]["image"]


def test_kvray_starts_on_the_head_once_ray_runs(config: dict[str, Any]) -> None:
    full = prepared(config)
    stop, start_ray, start_kvray = full["head_start_ray_commands"]
    assert stop == "ray stop"
    assert "ray start --head" in start_ray
    assert start_kvray.endswith("kvray start")
    assert "RAY_ADDRESS=auto" in start_kvray  # or it would begin a Ray of its own if there is none

    stop, join = full["worker_start_ray_commands"]
    assert stop == "ray stop"
    assert "ray start --address=$RAY_HEAD_IP:6379" in join
    assert "kvray" not in join  # the directory puts a NodeStore there


def test_the_workers_of_a_local_provider_are_started(committed: dict[str, Any]) -> None:
    assert "RAY_enable_autoscaler_v2=0" in committed["head_start_ray_commands"][1]


def test_token_authentication_is_on_everywhere(config: dict[str, Any]) -> None:
    full = prepared(config)
    assert ("~/.ray/auth_token",) * 2 in full["file_mounts"].items()
    commands = full["head_start_ray_commands"] + full["worker_start_ray_commands"]
    starting = [command for command in commands if command != "ray stop"]
    assert all("RAY_AUTH_MODE=token" in command for command in starting)
    assert "disabled" not in str(full)


@pytest.mark.parametrize("path", CLOUDS)
def test_what_nobody_has_tried_says_so_first(path: str) -> None:
    assert (ROOT / path).read_text().startswith(NOT_TRIED)


@pytest.mark.parametrize("path", CLOUDS)
def test_a_cloud_runs_the_commands_that_were_tried(path: str, committed: dict[str, Any]) -> None:
    def told(config: dict[str, Any], commands: str) -> list[str]:
        return [
            command.replace(" RAY_enable_autoscaler_v2=0", "").replace("ulimit -n 65536; ", "")
            for command in config[commands]
        ]

    for commands in ("head_start_ray_commands", "worker_start_ray_commands", "setup_commands"):
        assert told(load(path), commands) == told(committed, commands)


def test_the_cluster_of_the_tests_runs_this_very_file(committed: dict[str, Any]) -> None:
    tried = for_hosts(committed, head="10.0.0.1", workers=["10.0.0.2"], key="/key")
    different = {name for name in committed | tried if committed.get(name) != tried.get(name)}
    assert different == {"provider", "min_workers", "auth", "docker", "setup_commands"}
    assert tried["provider"]["type"] == committed["provider"]["type"] == "local"
    prepared(tried)

"""ray_cluster.yaml is what Ray's launcher accepts, and what kvray needs on each node."""

import copy
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.docker import docker_start_cmds
from ray.autoscaler._private.util import prepare_config, validate_config

from kvray.engine.versions import TESTED

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def config() -> dict[str, Any]:
    loaded = yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())
    assert isinstance(loaded, dict)
    return loaded


def prepared(config: dict[str, Any]) -> dict[str, Any]:
    """As `ray up` does it: with the provider's defaults, then checked by Ray's own schema."""
    full: dict[str, Any] = prepare_config(copy.deepcopy(config))
    validate_config(full)
    return full


def test_ray_accepts_the_file_and_plans_every_worker(config: dict[str, Any]) -> None:
    [node_type] = prepared(config)["available_node_types"].values()
    assert node_type["min_workers"] == node_type["max_workers"] == 3


def test_ray_would_refuse_a_misspelt_key(config: dict[str, Any]) -> None:
    config["docker"]["run_option"] = config["docker"].pop("run_options")
    with pytest.raises(jsonschema.ValidationError, match="run_option"):
        prepared(config)


def test_the_container_has_shared_memory_locked_memory_and_rdma(config: dict[str, Any]) -> None:
    docker = prepared(config)["docker"]
    command = docker_start_cmds(
        user="ubuntu",
        image=docker["image"],
        mount_dict={},
        container_name=docker["container_name"],
        user_options=docker["run_options"],
        cluster_name="kvray",
        home_directory="/home/ray",
        docker_cmd="docker",
    )
    words = command.split()
    assert any(re.fullmatch(r"--shm-size=\d+g", word) for word in words)
    assert words[words.index("--ulimit") + 1] == "memlock=-1:-1"
    assert {"--cap-add=IPC_LOCK", "--device=/dev/infiniband"} <= set(words)
    assert [word for word in words if word.startswith(("--net", "--network"))] == ["--net=host"]


def test_every_node_gets_versions_that_were_tested_together(config: dict[str, Any]) -> None:
    [command] = prepared(config)["setup_commands"]
    pins = dict(re.findall(r"'([a-z]+)(?:\[[a-z0-9,]+\])?==([0-9.]+)'", command))
    assert set(pins) == {"kvray", "ray", "vllm", "nixl"}
    assert TESTED[pins["vllm"]] == pins["nixl"]
    assert pins["ray"] in config["docker"]["image"]


def test_kvray_starts_on_the_head_once_ray_runs(config: dict[str, Any]) -> None:
    full = prepared(config)
    stop, start_ray, start_kvray = full["head_start_ray_commands"]
    assert stop == "ray stop"
    assert "ray start --head" in start_ray
    assert "RAY_enable_autoscaler_v2=0" in start_ray
    assert "import kvray; kvray.start()" in start_kvray
    assert "RAY_ADDRESS=auto" in start_kvray

    stop, join = full["worker_start_ray_commands"]
    assert stop == "ray stop"
    assert "ray start --address=$RAY_HEAD_IP:6379" in join
    assert "kvray" not in join  # the directory puts a NodeStore there


def test_token_authentication_is_on_everywhere(config: dict[str, Any]) -> None:
    full = prepared(config)
    assert list(full["file_mounts"].items()) == [("~/.ray/auth_token",) * 2]
    commands = full["head_start_ray_commands"] + full["worker_start_ray_commands"]
    starting = [command for command in commands if command != "ray stop"]
    assert all("RAY_AUTH_MODE=token" in command for command in starting)
    assert "disabled" not in str(full)

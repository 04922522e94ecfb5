"""`ray up`, `ray exec` and `ray down` with the ray_cluster.yaml that is committed, on such hosts.

The file is used as it is but for what `for_hosts` replaces, each thing with its reason. Commands
are typed on a host that is no part of the cluster, as on a person's own machine.
"""

import copy
from collections.abc import Sequence
from typing import Any

import yaml

from tests.cluster.hosts import Hosts
from tests.engines import ROOT
from tests.wheel.building import build

COMMITTED = ROOT / "ray_cluster.yaml"
UP_LIMIT_S = 240.0  # ssh, Ray's head, kvray's directory and a NodeStore: half a minute
TOKEN = {"RAY_AUTH_MODE": "token"}  # what the header of ray_cluster.yaml types


def for_hosts(
    config: dict[str, Any], *, head: str, workers: Sequence[str], key: str
) -> dict[str, Any]:
    """ray_cluster.yaml for hosts made of namespaces, by their addresses."""
    config = copy.deepcopy(config)
    # Whose hosts these are. `min_workers`: the others are there for when more is asked for.
    config["provider"] |= {"head_ip": head, "worker_ips": list(workers)}
    config["min_workers"] = 1
    config["auth"] = {"ssh_user": "root", "ssh_private_key": key}
    # There is no Docker daemon in a namespace. Of what the options of its containers give, a host
    # has a /dev/shm of its own and, where that is allowed, locked memory (boot.sh); no RDMA card.
    del config["docker"]
    # They see this machine's environment, and reach no registry to install anything from: what is
    # left is that the wheel has come to each of them.
    config["setup_commands"] = [f"python -m zipfile -t {path}" for path in wheels(config)]
    return config


def wheels(config: dict[str, Any]) -> list[str]:
    """Where hosts are to find kvray's."""
    return [path for path in config["file_mounts"] if path.endswith(".whl")]


class Launcher:
    """Types Ray's commands at `desk`."""

    def __init__(self, hosts: Hosts, *, desk: str, head: str, workers: Sequence[str]) -> None:
        self._desk = hosts[desk]
        config = for_hosts(
            yaml.safe_load(COMMITTED.read_text()),
            head=hosts[head].address,
            workers=[hosts[name].address for name in workers],
            key=hosts.key,
        )
        for path in wheels(config):
            if not (ROOT / config["file_mounts"][path]).exists():
                build(ROOT, ROOT / "dist")
        self.config_path = hosts.folder / "ray_cluster.yaml"
        self.config_path.write_text(yaml.safe_dump(config, sort_keys=False))

    def make_token(self) -> None:
        self._desk.run("ray", "get-auth-token", "--generate", environment=TOKEN)

    def up(self) -> str:
        return self._ray("up", "--yes", "--no-config-cache")

    def exec(self, command: str) -> str:
        """What `ray exec` has printed, the launcher's own lines among it."""
        return self._ray("exec", command=command)

    def down(self) -> str:
        return self._ray("down", "--yes")

    def _ray(self, verb: str, *options: str, command: str = "") -> str:
        words = ["ray", verb, *options, str(self.config_path), *filter(None, [command])]
        return self._desk.run(*words, limit_s=UP_LIMIT_S)

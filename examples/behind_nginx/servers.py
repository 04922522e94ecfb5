"""`vllm serve` with kvray's connector: the command line, its environment, and until it serves."""

import json
import os
import time
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from behind_nginx.errors import SceneError
from behind_nginx.processes import Group
from behind_nginx.vllm_command import COMMAND

START_LIMIT_S = 300.0  # two take 40 s on two cores, several times that beside other work
HEALTH_LIMIT_S = 5.0
POLL_S = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """What the engines of a scene have in common. kv_cache_bytes: of each one's device cache.
    environment: variables of each one, besides serve_environment's.
    """

    model: Path
    name: str
    max_model_len: int
    kv_cache_bytes: int
    environment: Mapping[str, str] = field(default_factory=dict)


def serve_command(
    settings: EngineSettings, *, port: int, transfer: Mapping[str, Any] | None
) -> list[str]:
    """transfer: of --kv-transfer-config; None is a vLLM without kvray."""
    command = [
        *COMMAND, "serve", str(settings.model),
        "--served-model-name", settings.name,
        "--host", "127.0.0.1",
        "--port", str(port),
        "--dtype", "bfloat16",
        "--enforce-eager",
        "--max-model-len", str(settings.max_model_len),
        "--kv-cache-memory-bytes", str(settings.kv_cache_bytes),
        "--disable-uvicorn-access-log",
    ]  # fmt: skip
    if transfer is not None:
        command += ["--kv-transfer-config", json.dumps(transfer)]
    return command


def serve_environment(cores: Sequence[int]) -> dict[str, str]:
    """cores: what it computes on. Named, since vLLM would else choose other ones with a connector
    than without, and several engines the same ones.
    """
    return {
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def cores_of(index: int, count: int) -> list[int]:
    """Of engine `index` of `count`: the cores of this machine dealt out, at least one to each."""
    cores = sorted(os.sched_getaffinity(0))
    return cores[index::count] or [cores[index % len(cores)]]


def wait_serving(servers: Mapping[int, Group]) -> None:
    """Until each answers on its port. Raises SceneError with the end of its log if one does not."""
    end_s = time.monotonic() + START_LIMIT_S
    for port, group in servers.items():
        while not _is_healthy(port):
            if group.has_ended() or time.monotonic() > end_s:
                what = "ended" if group.has_ended() else f"did not serve in {START_LIMIT_S:.0f} s"
                raise SceneError(
                    f"{group.name} {what}; the end of what it said:\n{group.log_tail()}"
                )
            time.sleep(POLL_S)


def _is_healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(
            f"http://127.0.0.1:{port}/health", timeout=HEALTH_LIMIT_S
        ) as answer:
            return bool(answer.status == 200)  # noqa: PLR2004 (HTTP's OK)
    except OSError:
        return False

"""Ray Serve LLM on the nodes of a test: kvray in its replicas, one of them a node.

with running_nodes(2) as nodes, running_app(nodes, tiny(), replicas=2) as app:
    answer = app.ask(prompt)            OpenAI's /v1/completions over HTTP
    app.scale(1)
"""

import contextlib
import json
import os
import re
import socket
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import serve

from kvray.config import SHM_FOLDER
from kvray.serve import enable
from tests.contained import descendants
from tests.ray_nodes import PATIENT, Nodes, wait_until

MODEL_ID = "model"
DEPLOYMENT = f"LLMServer:{MODEL_ID}"
START_LIMIT_S = 180.0  # two replicas take 60 s here, three times that beside other work
REQUEST_LIMIT_S = 120.0  # waits for a replica that starts, at worst
ROUND_ROBIN = "ray.serve.experimental.round_robin_router:RoundRobinRouter"
# A replica and its engine take the two CPUs that each node of running_nodes has: one a node.
ONE_A_NODE = {"bundles": [{"CPU": 1}]}
INGRESS = {
    "num_replicas": 1,  # who goes round, so there is one round
    "autoscaling_config": None,
    "ray_actor_options": {"num_cpus": 0},
}


@dataclass(frozen=True)
class Answer:
    """node: the index of who answered. sources: prompt tokens by where they came from."""

    text: str
    prompt_tokens: int
    node: int
    sources: dict[str, int]


class App:
    """A running application. Requests one at a time, where it is told who has answered."""

    def __init__(self, nodes: Nodes, port: int) -> None:
        self._nodes = nodes
        self._port = port

    def post(self, prompt: list[int]) -> dict[str, Any]:
        """One completion over HTTP; raises what urllib does if it is not answered."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self._port}/v1/completions",
            data=json.dumps(
                {
                    "model": MODEL_ID,
                    "prompt": prompt,
                    "max_tokens": 2,
                    "temperature": 0,
                    "ignore_eos": True,
                }
            ).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=REQUEST_LIMIT_S) as response:  # noqa: S310
            answer: dict[str, Any] = json.load(response)
        return answer

    def ask(self, prompt: list[int]) -> Answer:
        before = self.tokens()
        answer = self.post(prompt)
        count = answer["usage"]["prompt_tokens"]
        told: list[tuple[int, dict[str, int]]] = []

        def is_told() -> bool:
            for index, now in enumerate(self.tokens()):
                grown = {name: now[name] - before[index][name] for name in now}
                if sum(grown.values()) >= count:
                    told.append((index, grown))
            return bool(told)

        wait_until(is_told, what="the engine's word on where its tokens came from")
        return Answer(answer["choices"][0]["text"], count, *told[0])

    def tokens(self) -> list[dict[str, int]]:
        """Of each node: prompt tokens of its engines by source, since its NodeStore began."""
        totals = [self._nodes.status(n)["engine_totals"] for n in range(len(self._nodes.node_ids))]
        return [
            {
                "device": total.get("hit_tokens_device", 0),
                "local": total.get("hit_tokens_local", 0),
                "peer": total.get("hit_tokens_peer", 0),
                "computed": total.get("computed_tokens", 0),
            }
            for total in totals
        ]

    def engine_pids(self, index: int) -> set[int]:
        """Of EngineCore and workers that the NodeStore of node `index` knows."""
        return {client["pid"] for client in self._nodes.status(index)["clients"]}

    def running(self) -> int:
        """Replicas that serve, as Serve sees it."""
        deployment = serve.status().applications["default"].deployments[DEPLOYMENT]
        return {str(state): n for state, n in deployment.replica_states.items()}.get("RUNNING", 0)

    def scale(self, replicas: int) -> None:
        """What Serve's autoscaler or its REST call does; returns when it is so."""
        from ray.serve._private.common import DeploymentID
        from ray.serve.context import _get_global_client

        client = _get_global_client()
        assert client is not None
        controller = client._controller  # noqa: SLF001 (REST would need Ray's dashboard)
        wanted = DeploymentID(name=DEPLOYMENT, app_name="default")
        ray.get(controller.update_deployment_replicas.remote(wanted, replicas))
        wait_until(
            lambda: self.running() == replicas, what=f"{replicas} replicas", limit_s=START_LIMIT_S
        )


@contextmanager
def running_app(
    nodes: Nodes,
    model: Path,
    *,
    replicas: int = 1,
    deployment: dict[str, Any] | None = None,
    **settings: Any,
) -> Iterator[App]:
    """kvray is enabled with `settings`; Serve is gone afterwards, Ray and kvray stay. deployment:
    of deployment_config, instead of `replicas` in round robin.
    """
    port = free_port()
    segments: set[str] = set()
    options = {"num_replicas": replicas, "autoscaling_config": None} | (deployment or {})
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        deploy(model, options, **settings)
        segments |= shared_memory()
        yield App(nodes, port)
    finally:
        segments |= shared_memory()
        serve.shutdown()
        for path in segments:
            with contextlib.suppress(FileNotFoundError):
                Path(path).unlink()


def deploy(
    model: Path,
    deployment: dict[str, Any],
    *,
    engine: dict[str, Any] | None = None,
    **settings: Any,
) -> None:
    """Or deploy again, with something changed. engine: further engine_kwargs. Returns when Serve
    says that it is so.
    """
    from ray.serve.llm import LLMConfig, build_openai_app

    config = LLMConfig(
        model_loading_config={"model_id": MODEL_ID, "model_source": str(model)},
        placement_group_config=ONE_A_NODE,
        deployment_config={"request_router_config": {"request_router_class": ROUND_ROBIN}}
        | deployment,
        engine_kwargs={
            "skip_tokenizer_init": True,
            "enforce_eager": True,
            "max_model_len": 4_096,
            "dtype": "bfloat16",
            "kv_cache_memory_bytes": 64 << 20,
        }
        | (engine or {}),
        runtime_env={"env_vars": {"VLLM_CPU_OMP_THREADS_BIND": f"0-{(os.cpu_count() or 1) - 1}"}},
    )
    enable(config, **{**PATIENT, **settings})
    serve.run(
        build_openai_app({"llm_configs": [config], "ingress_deployment_config": INGRESS}),
        # Who asks for a number of replicas is not overruled by Serve's own autoscaler.
        external_scaler_enabled=deployment.get("autoscaling_config") is None,
    )


def shared_memory() -> set[str]:
    """vLLM's segments in /dev/shm that processes below this one have mapped. Serve ends replicas by
    signal, and these stay behind.
    """
    found: set[str] = set()
    for pid in descendants():
        with contextlib.suppress(OSError):  # it has ended
            maps = Path(f"/proc/{pid}/maps").read_text()
            found |= set(re.findall(rf"{SHM_FOLDER}/psm_\w+", maps))
    return found


def replica_logs() -> str:
    """What replicas of this Ray cluster have written to stderr so far."""
    context = ray.get_runtime_context()
    folder = Path(context.get_temp_dir()) / context.get_session_name() / "logs"
    logs = sorted(folder.glob("worker-*.err"))
    return "\n".join(log.read_text(errors="replace") for log in logs)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])

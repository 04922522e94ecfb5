"""KVRayRouter in Ray Serve itself, behind a deployment that needs no model.

The router is that of tests/serve_routers.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import ray

pytestmark = [pytest.mark.heavy, pytest.mark.ray_llm, pytest.mark.timeout(180)]

DOCUMENT = "kvray shares what any engine has computed. " * 500
REQUESTS = 12


@dataclass
class Prompt:
    prompt: str


@pytest.fixture(scope="module", autouse=True)
def serving() -> Iterator[None]:
    from ray import serve

    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    serve.shutdown()
    ray.shutdown()


def deployed(router: str) -> Any:
    """A handle. Two replicas that answer with their id."""
    from ray import serve
    from ray.serve.config import RequestRouterConfig

    class Echo:
        def __call__(self, request: Any) -> str:
            return str(serve.get_replica_context().replica_id.unique_id)

    routing: Any = {
        "request_router_class": f"tests.serve_routers:{router}",
        "request_router_kwargs": {"prefill_tokens_per_s": 20_000},
    }
    deployment: Any = serve.deployment(
        num_replicas=2,
        ray_actor_options={"num_cpus": 0},
        request_router_config=RequestRouterConfig(**routing),
    )(Echo)
    return serve.run(deployment.bind(), name=router, route_prefix=f"/{router}")


def test_while_the_directory_is_silent_requests_go_on_by_two_choices() -> None:
    handle = deployed("NobodyAnswers")
    responses = [handle.remote(Prompt(DOCUMENT)).result() for _ in range(4 * REQUESTS)]
    assert len(set(responses)) == 2

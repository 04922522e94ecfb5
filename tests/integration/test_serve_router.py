"""KVRayRouter in Ray Serve itself, behind a deployment that needs no model.

The router lives in this process, where the handle is: which nodes serve is handed to it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import ray

from kvray.errors import KVRayError, NodeLostError

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


def deployed(name: str, look: Any) -> Any:
    """A handle. Two replicas that answer with their id."""
    from ray import serve
    from ray.serve.config import RequestRouterConfig

    from kvray.serve import KVRayRouter

    class Router(KVRayRouter):
        def initialize_state(self, **settings: Any) -> None:
            super().initialize_state(**settings, look=look)

    class Echo:
        def __call__(self, request: Any) -> str:
            return str(serve.get_replica_context().replica_id.unique_id)

    routing: Any = {
        "request_router_class": Router,
        "request_router_kwargs": {"prefill_tokens_per_s": 20_000},
    }
    deployment: Any = serve.deployment(
        num_replicas=2,
        ray_actor_options={"num_cpus": 0},
        request_router_config=RequestRouterConfig(**routing),
    )(Echo)
    return serve.run(deployment.bind(), name=name, route_prefix=f"/{name}")


def test_a_document_goes_back_to_the_replica_that_has_read_it() -> None:
    """And one that nobody has read goes to the other, which was chosen less lately."""
    handle = deployed("known", lambda: frozenset(alive()))
    chosen = [handle.remote(Prompt(DOCUMENT + str(i))).result() for i in range(REQUESTS)]
    assert len(set(chosen)) == 1
    assert handle.remote(Prompt("something else")).result() != chosen[0]


def test_while_the_directory_is_silent_requests_go_on_by_two_choices() -> None:
    def nobody() -> frozenset[str]:
        raise NodeLostError("the directory does not answer")

    assert issubclass(NodeLostError, KVRayError)
    handle = deployed("silent", nobody)
    responses = [handle.remote(Prompt(DOCUMENT)).result() for _ in range(4 * REQUESTS)]
    assert len(set(responses)) == 2


def alive() -> list[str]:
    return [node["NodeID"] for node in ray.nodes() if node["Alive"]]

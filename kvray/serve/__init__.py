"""kvray in Ray Serve LLM: the replicas of a deployment share their KV caches.

    from kvray.serve import enable
    serve.run(build_openai_app({"llm_configs": [enable(LLMConfig(...))]}))

enable() ──▶ the connector is named in the LLMConfig, its backend is registered with Ray (app)
                 └──▶ each replica asks, before it makes its engine, for the NodeStore of its Ray
                      node (backend); from there on the engine is like any other

KVRayRouter chooses the replica of a request (router). The only package that knows ray.serve and
ray.serve.llm, which it imports when it is called, or asked for the router.
"""

from typing import TYPE_CHECKING, Any

from kvray.serve.app import build_openai_app, enable

if TYPE_CHECKING:
    from kvray.serve.router import KVRayRouter

__all__ = ["KVRayRouter", "build_openai_app", "enable"]


def __getattr__(name: str) -> Any:  # noqa: ANN401 (a module's attribute)
    if name == "KVRayRouter":
        from kvray.serve.router import KVRayRouter

        return KVRayRouter
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""kvray in Ray Serve LLM: the replicas of a deployment share their KV caches.

    from kvray.serve import enable
    serve.run(build_openai_app({"llm_configs": [enable(LLMConfig(...))]}))

enable() ──▶ the connector is named in the LLMConfig, its backend is registered with Ray (app)
                 └──▶ each replica asks, before it makes its engine, for the NodeStore of its Ray
                      node (backend); from there on the engine is like any other

KVRayRouter chooses the replica of a request (router). The only package that knows ray.serve and
ray.serve.llm, which it imports when it is called, or asked for the router.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvray.serve.app import build_openai_app, enable
    from kvray.serve.router import KVRayRouter

_MODULE_OF = {
    "KVRayRouter": "kvray.serve.router",
    "build_openai_app": "kvray.serve.app",
    "enable": "kvray.serve.app",
}

__all__ = ["KVRayRouter", "build_openai_app", "enable"]


if not TYPE_CHECKING:  # for whom a name that is not there would be one of any type

    def __getattr__(name: str) -> Any:  # noqa: ANN401 (a module's attribute)
        module = _MODULE_OF.get(name)
        if module is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        try:
            return getattr(import_module(module), name)
        except ModuleNotFoundError as exc:
            from kvray.missing import missing_package

            raise missing_package(f"kvray.serve.{name}", exc) from exc

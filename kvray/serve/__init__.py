"""kvray in Ray Serve LLM: the replicas of a deployment share their KV caches.

    from kvray.serve import enable
    serve.run(build_openai_app({"llm_configs": [enable(LLMConfig(...))]}))

enable() ──▶ the connector is named in the LLMConfig, its backend is registered with Ray (app)
                 └──▶ each replica asks, before it makes its engine, for the NodeStore of its Ray
                      node (backend); from there on the engine is like any other

The only package that knows ray.serve.llm, which it imports when it is called.
"""

from kvray.serve.app import build_openai_app, enable

__all__ = ["build_openai_app", "enable"]

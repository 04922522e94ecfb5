"""Where an application is described: kvray is named in its LLMConfigs. Nothing is started here."""

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeVar

import ray

from kvray.actors import TESTED_RAY
from kvray.config import EngineConfig
from kvray.errors import ConfigError, NotAttachedError

if TYPE_CHECKING:
    from ray.llm._internal.serve.core.configs.llm_config import LLMConfig
    from ray.serve.deployment import Application

    AnyConfig = TypeVar("AnyConfig", bound=LLMConfig)

CONNECTOR_NAME = "KVRayConnector"
CONNECTOR_MODULE = "kvray.engine.connector"
BACKEND = "kvray.serve.backend:KVRayBackend"

# Engine arguments that the connector refuses, with what they may be. It says so in the log of an
# engine's process, after the replica has loaded the model, and Serve tries that three times.
_UNTESTED: Mapping[str, tuple[object, ...]] = {
    "data_parallel_size": (None, 1),
    "pipeline_parallel_size": (None, 1),
    "decode_context_parallel_size": (None, 1),
    "prefill_context_parallel_size": (None, 1),
    "speculative_config": (None, {}),
}


def enable(config: "AnyConfig", **settings: object) -> "AnyConfig":
    """Let the replicas of this LLMConfig share their KV with every engine of the Ray cluster.

    config: of ray.serve.llm; it is changed, and returned. settings: fields of kvray.EngineConfig
    (model_tag="...", lookup_deadline_ms=...). Call it where the application is built, with Ray
    initialized or not. kvray itself is started by `kvray start` or kvray.start(), before or after;
    a replica whose node has no NodeStore says so and serves uncached until it has one.

    Raises ConfigError for an unknown setting or a config that names another connector;
    NotAttachedError where ray.serve.llm is missing, is of a Ray that was not tested, or the engine
    would be one that kvray refuses.
    """
    require_serve_llm()
    transfer = transfer_config(config.engine_kwargs, settings)
    refuse_untested(config.engine_kwargs)
    _register_backend()
    config.update_engine_kwargs(kv_transfer_config=transfer)
    return config


def build_openai_app(arguments: Mapping[str, Any]) -> "Application":
    """ray.serve.llm.build_openai_app with kvray in each of its llm_configs, for `serve run` and
    `serve deploy`: `import_path: kvray.serve:build_openai_app`.

    arguments: Ray's, and "kvray": settings as enable() takes them. Raises what enable() does.
    """
    require_serve_llm()
    from ray.serve.llm import LLMServingArgs
    from ray.serve.llm import build_openai_app as build

    theirs = {name: value for name, value in arguments.items() if name != "kvray"}
    settings = arguments.get("kvray") or {}
    if not isinstance(settings, Mapping):
        raise ConfigError(f"kvray: expected a mapping of settings, found {settings!r}")
    described = LLMServingArgs.model_validate(theirs)
    configs: Sequence[Any] = described.llm_configs
    return build(theirs | {"llm_configs": [enable(config, **settings) for config in configs]})


def require_serve_llm() -> None:
    """Raises NotAttachedError where ray.serve.llm can not be imported, or was not tested."""
    require_tested(ray.__version__)
    try:
        import_module("ray.serve.llm")
    except ImportError as exc:
        raise NotAttachedError(
            f"kvray.serve needs Ray Serve LLM, and ray.serve.llm can not be imported here: {exc}. "
            f"Install it on every node: pip install 'ray[llm]~={TESTED_RAY}.0'. Engines outside "
            "of Ray Serve need nothing of this: see kvray.attach and kvray.enable"
        ) from exc


def require_tested(version: str) -> None:
    """Raises NotAttachedError for a Ray that kvray.serve was not tested with."""
    if version.split(".")[:2] != TESTED_RAY.split("."):
        raise NotAttachedError(
            f"kvray.serve was tested with Ray {TESTED_RAY}; this process runs Ray {version}, whose "
            "interface for KV connectors may be another one: install "
            f"'ray[llm]~={TESTED_RAY}.0' on every node"
        )


def transfer_config(
    engine_kwargs: Mapping[str, Any], settings: Mapping[str, object]
) -> dict[str, Any]:
    """engine_kwargs["kv_transfer_config"] with kvray in it. What is there already stays, if it is
    kvray's; settings go first. Raises ConfigError.
    """
    found = engine_kwargs.get("kv_transfer_config") or {}
    if not isinstance(found, Mapping):
        raise ConfigError(f"kv_transfer_config: expected a mapping, found {found!r}")
    name = found.get("kv_connector", CONNECTOR_NAME)
    if name != CONNECTOR_NAME:
        raise ConfigError(
            f"kv_transfer_config: expected none, or one of {CONNECTOR_NAME}, found {name!r}. An "
            "engine has one connector: leave that one out, or leave kvray out"
        )
    extra = found.get("kv_connector_extra_config") or {}
    merged = EngineConfig.parse({**extra.get("kvray", {}), **settings})
    return {
        "kv_role": "kv_both",
        **found,
        "kv_connector": CONNECTOR_NAME,
        "kv_connector_module_path": CONNECTOR_MODULE,
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {**extra, "kvray": merged.to_dict()},
    }


def refuse_untested(engine_kwargs: Mapping[str, Any]) -> None:
    """Raises NotAttachedError naming each engine argument that kvray.engine.support refuses, as
    far as arguments tell; what only the model tells is told by the engine.
    """
    found = [
        f"{name}={engine_kwargs[name]!r}"
        for name, allowed in _UNTESTED.items()
        if engine_kwargs.get(name) not in allowed
    ]
    if "fp8" in str(engine_kwargs.get("kv_cache_dtype", "")):
        found.append(f"kv_cache_dtype={engine_kwargs['kv_cache_dtype']!r}")
    if found:
        raise NotAttachedError(
            f"kvray was not tested with {', '.join(found)}, so it refuses to cache for these "
            "replicas. Leave that out of engine_kwargs, or leave kvray out"
        )


_registered_at: str | None = None  # the address of the Ray cluster that knows our backend


def _register_backend() -> None:
    """Ray keeps backends in its cluster's store, and a copy in each process that has registered
    one; so a process that comes to another cluster has to say it again.
    """
    from ray.llm._internal.serve.engines.vllm.kv_transfer.factory import KVConnectorBackendFactory

    global _registered_at  # noqa: PLW0603 (there is one registry a process)
    here = ray.get_runtime_context().gcs_address if ray.is_initialized() else None
    if _registered_at is not None and _registered_at != here:
        KVConnectorBackendFactory.unregister_backend(CONNECTOR_NAME)
    if not KVConnectorBackendFactory.is_registered(CONNECTOR_NAME):
        # By its path: the class is loaded where a replica needs it. Without Ray it is kept, and
        # told when Ray is initialized.
        KVConnectorBackendFactory.register_backend(CONNECTOR_NAME, BACKEND)
    _registered_at = here

"""Where an application is described: kvray is named in its LLMConfigs. Nothing is started here."""

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeVar

import ray

from kvray.actors import TESTED_RAY, refuse_untested_ray
from kvray.config import EngineConfig
from kvray.engine.arguments import (
    CONNECTOR,
    UNTESTED_PARALLEL,
    is_untested_cache,
    transfer_settings,
)
from kvray.errors import ConfigError, MissingPackageError, NotAttachedError

if TYPE_CHECKING:
    from ray.llm._internal.serve.core.configs.llm_config import LLMConfig
    from ray.serve.deployment import Application

    AnyConfig = TypeVar("AnyConfig", bound=LLMConfig)

CONNECTOR_NAME = CONNECTOR["kv_connector"]
BACKEND = "kvray.serve.backend:KVRayBackend"


def enable(config: "AnyConfig", **settings: object) -> "AnyConfig":
    """Let the replicas of this LLMConfig share their KV with every engine of the Ray cluster.

    config: of ray.serve.llm; it is changed, and returned. settings: fields of kvray.EngineConfig
    (model_tag="...", lookup_deadline_ms=...). Call it where the application is built, with Ray
    initialized or not. kvray itself is started by `kvray start` or kvray.start(), before or after;
    a replica whose node has no NodeStore says so and serves uncached until it has one.

    Raises ConfigError for an unknown setting, for a config that names another connector,
    or a Ray that was not tested; MissingPackageError where ray.serve.llm is; NotAttachedError if
    the engine would be one that kvray refuses.
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
    """Raises MissingPackageError where ray.serve.llm can not be imported; ConfigError for a Ray
    that was not tested: connector backends are an internal interface of it, without promises.
    """
    refuse_untested_ray(ray.__version__)
    try:
        import_module("ray.serve.llm")
    except ImportError as exc:
        raise MissingPackageError(
            f"kvray.serve needs Ray Serve LLM, and ray.serve.llm can not be imported here: {exc}. "
            f"Install it on every node: pip install 'ray[llm]~={TESTED_RAY}.0'. Engines outside "
            "of Ray Serve need nothing of this: see kvray.attach and kvray.enable"
        ) from exc


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
    ours = transfer_settings(merged.to_dict())
    return {
        **found,
        **ours,
        "kv_role": found.get("kv_role", ours["kv_role"]),
        "kv_connector_extra_config": {**extra, **ours["kv_connector_extra_config"]},
    }


def refuse_untested(engine_kwargs: Mapping[str, Any]) -> None:
    """Raises NotAttachedError naming each engine argument that kvray.engine.support refuses, as
    far as arguments tell; what only the model tells is told by the engine. An engine says it in
    the log of its process, after it has loaded the model, and Serve tries that three times.
    """
    refused = [name for name in UNTESTED_PARALLEL if engine_kwargs.get(name) not in (None, 1)]
    if engine_kwargs.get("speculative_config"):
        refused.append("speculative_config")
    if is_untested_cache(engine_kwargs.get("kv_cache_dtype")):
        refused.append("kv_cache_dtype")
    found = [f"{name}={engine_kwargs[name]!r}" for name in refused]
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

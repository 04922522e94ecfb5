"""kvray.enable(): engines made later in this process get the connector at their construction.

One name of vLLM is wrapped: EngineArgs.create_engine_config, where the configuration of every
LLM, AsyncLLM and server comes from. An engine that names a kv_transfer_config keeps it.
"""

import functools
from typing import Any

_settings: dict[str, Any] = {}


def enable(kvray: dict[str, Any]) -> None:
    """kvray: EngineConfig's keys. Raises NotAttachedError for a vLLM that was not tested."""
    from vllm.engine.arg_utils import EngineArgs

    from kvray.engine import versions

    versions.require_tested(versions.installed_version())
    _settings.clear()
    _settings.update(kvray)
    if not getattr(EngineArgs, "_kvray_injected", False):
        EngineArgs._kvray_injected = True  # noqa: SLF001 (our own mark)
        EngineArgs.create_engine_config = _wrapped(EngineArgs.create_engine_config)


def _wrapped(original: Any) -> Any:
    @functools.wraps(original)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        from vllm.config import KVTransferConfig

        from kvray.engine.arguments import transfer_settings

        if self.kv_transfer_config is None:
            self.kv_transfer_config = KVTransferConfig(**transfer_settings(dict(_settings)))
        return original(self, *args, **kwargs)

    return create_engine_config

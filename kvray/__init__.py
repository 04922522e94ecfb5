"""One KV cache out of many: every vLLM instance of a Ray cluster reuses what any other computed.

    import kvray
    attachment = kvray.attach(llm)      # starts what is missing, returns at once

Names are resolved when they are first used (PEP 562): vLLM loads kvray.engine in each of its
processes, and those must load neither Ray nor NIXL.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvray.api import AsyncAttachment, Attachment, AttachmentStats, attach, enable
    from kvray.cluster import Cluster, ClusterStatus, NodeStatus, connect, start
    from kvray.config import Config, EngineConfig
    from kvray.core.reasons import MissReason
    from kvray.errors import (
        ArgumentError,
        ConfigError,
        KVRayError,
        LinkError,
        MissingPackageError,
        NamespaceMismatchError,
        NodeLostError,
        NotAttachedError,
        RemoteProtocolError,
        SlabBusyError,
        SlabError,
        UntrustedError,
        VersionMismatchError,
    )

__version__ = "0.1.0"

_HOME = {
    "kvray.api": ("AsyncAttachment", "Attachment", "AttachmentStats", "attach", "enable"),
    "kvray.cluster": ("Cluster", "ClusterStatus", "NodeStatus", "connect", "start"),
    "kvray.config": ("Config", "EngineConfig"),
    "kvray.core.reasons": ("MissReason",),
    "kvray.errors": (
        "ArgumentError",
        "ConfigError",
        "KVRayError",
        "LinkError",
        "MissingPackageError",
        "NamespaceMismatchError",
        "NodeLostError",
        "NotAttachedError",
        "RemoteProtocolError",
        "SlabBusyError",
        "SlabError",
        "UntrustedError",
        "VersionMismatchError",
    ),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "ArgumentError",
    "AsyncAttachment",
    "Attachment",
    "AttachmentStats",
    "Cluster",
    "ClusterStatus",
    "Config",
    "ConfigError",
    "EngineConfig",
    "KVRayError",
    "LinkError",
    "MissReason",
    "MissingPackageError",
    "NamespaceMismatchError",
    "NodeLostError",
    "NodeStatus",
    "NotAttachedError",
    "RemoteProtocolError",
    "SlabBusyError",
    "SlabError",
    "UntrustedError",
    "VersionMismatchError",
    "attach",
    "connect",
    "enable",
    "start",
]


if not TYPE_CHECKING:  # for whom a name that is not there would be one of any type

    def __getattr__(name: str) -> object:
        module = _MODULE_OF.get(name)
        if module is None:
            raise AttributeError(f"module 'kvray' has no attribute {name!r}")
        try:
            value = getattr(import_module(module), name)
        except ModuleNotFoundError as exc:
            from kvray.missing import missing_package

            raise missing_package(f"kvray.{name}", exc) from exc
        globals()[name] = value  # the next use does not come here
        return value


def __dir__() -> list[str]:
    return sorted(__all__)

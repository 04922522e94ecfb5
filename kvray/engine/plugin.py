"""vLLM's entry point "vllm.general_plugins": adds kvray's doors to EngineCore.

vLLM loads it in every process it starts. Loading this module imports nothing; register() imports
what vLLM has imported already. An engine that is never attached is not changed by it, but for
what a later attach has to know: a digest of what it has loaded, and how often that has changed.
"""

import importlib.util
import logging

logger = logging.getLogger("kvray.engine")


def register() -> None:
    """Called by vLLM. Never raises: a vLLM that kvray does not know must start as if kvray were
    not installed; attach() says then what is wrong.
    """
    if importlib.util.find_spec("vllm.v1.engine.core") is None:
        return
    try:
        from vllm.v1.engine.core import EngineCore

        from kvray.engine import adapter_watch, attach, hooks, versions, weights

        if versions.installed_version() not in versions.TESTED:
            logger.info(
                "kvray knows vLLM %s; this is %s, so kvray stays out of it",
                ", ".join(versions.TESTED),
                versions.installed_version(),
            )
            return
        weights.install()
        adapter_watch.install()
        hooks.install()
        for name, door in attach.DOORS.items():
            setattr(EngineCore, name, door)
    except ImportError as exc:
        logger.warning("kvray can not be used with this vLLM: %s", exc)

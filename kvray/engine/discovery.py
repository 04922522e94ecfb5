"""Where this engine's NodeStore listens. Asked again until it is there: it may come later."""

import logging
from collections.abc import Callable

from kvray.config import EngineConfig, find_sockets

logger = logging.getLogger("kvray.engine")


def socket_finder(config: EngineConfig) -> Callable[[], str | None]:
    """A function that returns the socket's path, or None while there is none; several of which
    the settings choose none are none, and that is said once.
    """
    told = False

    def find() -> str | None:
        nonlocal told
        paths = find_sockets(config)
        if len(paths) > 1 and not told:
            told = True
            logger.warning(
                "kvray: this engine runs uncached: %d NodeStores listen on this host (%s). Say "
                'which one is its own: kv_connector_extra_config={"kvray": {"socket_path": ...}}',
                len(paths),
                ", ".join(paths),
            )
        return paths[0] if len(paths) == 1 else None

    return find

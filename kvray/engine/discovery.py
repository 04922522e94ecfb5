"""Where this engine's NodeStore listens. Asked again until it is there: it may come later."""

import logging
from collections.abc import Callable

from kvray.config import EngineConfig, find_sockets
from kvray.errors import UntrustedError

logger = logging.getLogger("kvray.engine")


def is_there(config: EngineConfig) -> bool:
    """Whether a socket is there that may be trusted so far."""
    try:
        return bool(find_sockets(config))
    except UntrustedError:
        return False  # the client's thread says so


def socket_finder(config: EngineConfig) -> Callable[[], str | None]:
    """A function that returns the socket's path, or None while there is none; several of which
    the settings choose none are none, and that is said once. It raises UntrustedError for one
    that another user could have put there.
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

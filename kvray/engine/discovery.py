"""Where this engine's NodeStore listens. Asked again until it is there: it may come later."""

import logging
from collections.abc import Callable

from kvray.config import EngineConfig, find_sockets

logger = logging.getLogger("kvray.engine")


def socket_finder(config: EngineConfig) -> Callable[[], str | None]:
    """A function that returns the socket's path, or None while there is none, or several of which
    the settings choose none; both are said once."""
    said: set[str] = set()

    def say_once(text: str) -> None:
        if text not in said:
            said.add(text)
            logger.warning("kvray: this engine runs uncached until then: %s", text)

    def find() -> str | None:
        paths = find_sockets(config)
        if not paths:
            say_once(
                "no NodeStore listens on this host yet. kvray.start() on its Ray cluster starts "
                "one per Ray node; this engine joins by itself"
            )
            return None
        if len(paths) > 1:
            say_once(
                f"{len(paths)} NodeStores listen on this host ({', '.join(paths)}); say which one "
                'is this engine\'s: kv_connector_extra_config={"kvray": {"socket_path": ...}}'
            )
            return None
        return paths[0]

    return find

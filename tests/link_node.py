"""A node with nothing but a LinkThread over NIXL: what reads from, and is read by, another process
where no NodeStore is wanted.
"""

from collections.abc import Callable
from queue import SimpleQueue

from kvray.core.commands import ConnectPeer
from kvray.core.ids import Epoch, NodeId, SlabId
from kvray.core.layout import Geometry
from kvray.core.messages import NodeInfo
from kvray.link.nixl import NixlLink
from kvray.node.peers import LinkEvent, LinkOpened, LinkThread, PeerConnected

EVENT_LIMIT_S = 60.0  # an interpreter and its first agent on a busy machine


class LinkNode:
    """slab_address: of a slab of this geometry, which outlives it. info: for who connects to it.
    make_link: given its name; None for a plain NixlLink.
    """

    def __init__(
        self,
        name: str,
        *,
        slab_address: int,
        geometry: Geometry,
        transports: str = "",
        make_link: Callable[[str], NixlLink] | None = None,
    ) -> None:
        self.events: SimpleQueue[LinkEvent] = SimpleQueue()
        self.thread = LinkThread(
            slab_address=slab_address, slab_bytes=geometry.slab_bytes, on_event=self.events.put
        )
        make = make_link or (lambda link_name: NixlLink(link_name, transports=transports))
        self.thread.open(lambda: make(name))
        opened = self.events.get(timeout=EVENT_LIMIT_S)
        assert isinstance(opened, LinkOpened), opened
        self.info = NodeInfo(
            node_id=NodeId(name),
            epoch=Epoch(1),
            link_name=opened.name,
            link_metadata=opened.metadata,
            slab_id=SlabId(bytes(16)),
            slab_address=slab_address,
            slab_bytes=geometry.slab_bytes,
            extent_bytes=geometry.extent_bytes,
            host="here",
            kvray_version="0",
            format_version=1,
        )

    def connect(self, info: NodeInfo) -> None:
        self.thread.submit(ConnectPeer(info))
        connected = self.events.get(timeout=EVENT_LIMIT_S)
        assert isinstance(connected, PeerConnected), connected

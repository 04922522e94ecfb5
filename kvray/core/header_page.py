"""The first page of a slab: who made it, how it is cut, who works on it.

    0     magic, format        written last, when the rest of the file is whole
    16    slab id, boot id     which file this is; in which boot of the host its content was written
    48    epoch, slab_bytes, extent_bytes, generation mark
    128   owner                pid and start of the NodeStore that works on it; 0: nobody
    256   cluster, node id     NodeId in full; the file's name has only its beginning
    1024  table of clients     MAX_CLIENTS rows

Numbers that change (epoch, generation mark, owner) lie on 8 bytes each, so that a kill leaves the
old or the new one.
"""

import numpy as np

from kvray.core.layout import CLIENT_DTYPE, MAX_CLIENTS, PAGE_BYTES

MAX_CLUSTER_BYTES = 32
MAX_NODE_ID_BYTES = 64  # Ray's have 56 hex digits

HEADER_PAGE_DTYPE = np.dtype(
    {
        "names": [
            "magic",
            "format",
            "slab_id",
            "boot_id",
            "epoch",
            "slab_bytes",
            "extent_bytes",
            "generation_mark",
            "owner_pid",
            "owner_start_ticks",
            "cluster",
            "node_id",
            "clients",
        ],
        "formats": [
            "V8",
            "<u4",
            "V16",
            "V16",
            "<u8",
            "<u8",
            "<u8",
            "<u8",
            "<u8",
            "<u8",
            f"S{MAX_CLUSTER_BYTES}",
            f"S{MAX_NODE_ID_BYTES}",
            (CLIENT_DTYPE, (MAX_CLIENTS,)),
        ],
        "offsets": [0, 8, 16, 32, 48, 56, 64, 72, 128, 136, 256, 288, 1024],
        "itemsize": PAGE_BYTES,
    }
)
assert 1024 + MAX_CLIENTS * CLIENT_DTYPE.itemsize <= PAGE_BYTES

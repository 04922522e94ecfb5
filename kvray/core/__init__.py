"""Pure cores: they decide and do nothing else. No clock, thread, random number, socket, log, Ray or
torch; time comes in as an argument, what should happen comes out as commands and effects.

    ids, messages, codec, layout, keys     the vocabulary, the wire, the slab's arithmetic
    store (slots, extents, eviction, adoption, changes)    which block is in which slot
    fetch (planner, peers, locates, reads, waits)          how blocks come from other nodes
    node                                   one NodeStore: sessions, store, fetch and announcing
    directory (roster, catalogue)          who is alive, who holds what
    copy_order, copy_ways                  copies on a device: what goes out when, and by which way
    routing, speeds                        which replica a request costs the least on
"""

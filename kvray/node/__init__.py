"""One NodeStore per Ray node, and the engine's end of its socket.

actor      the Ray actor: one loop that runs core.node and does what it says
slab       the file in /dev/shm; mapped is the same as an engine sees it
server     the local socket; client and worker_client are its other end
peers      the thread that owns the link
control    calls to the directory
"""

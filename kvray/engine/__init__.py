"""The seam to vLLM: everything here runs inside an engine's own processes.

    plugin      adds kvray's doors to vLLM's EngineCore (vllm.general_plugins entry point)
    arguments   vLLM's own arguments, for who describes an engine without vLLM
    attach      puts the connector into an engine that already runs, and takes it out again
    connector   vLLM's OffloadingConnector, plus failed copies and renewed namespaces
    lookups     in EngineCore: what is cached, where to store it (an OffloadingManager)
    holds       which requests wait for that, and for how long they may
    transfers   in each worker: copies between paged cache and slab (an OffloadingWorker)
    pieces      what a job copies: arrays of (device pointer, slab pointer, bytes)
    copier      who copies them: the seam, and threads for the CPU
    streams     the same for devices that copy by streams and events; copy_order decides for it
    cuda        CUDA's streams and copies; cuda_driver, copy_ways, gather and pinning belong to it
    workplace   which of the executors a worker gets, by its device
    ledger      which copy job belongs to which reservation, and who has not reported yet
    namespace   the digest of everything that changes a block's bytes
    facts       what each rank has of that; weights digests what it has loaded
    adapters    which LoRA adapters are loaded, by content; adapter_watch sees them in the workers
    versions    the only place that knows how vLLM's releases differ

Nothing here imports Ray or NIXL, and only this package imports vLLM.
"""

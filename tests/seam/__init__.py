"""The seam to vLLM: its real Scheduler, KVCacheManager and OffloadingConnector with kvray's real
connector and NodeClient, and a real NodeStore. Only what the model runner would say is made here.

__main__ ── each state of a request's life (states), each event (events) ──▶ SeamEngine + SeamStore
"""

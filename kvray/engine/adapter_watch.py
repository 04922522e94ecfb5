"""In each worker: sees the LoRA adapters that vLLM loads, and what is still loaded of them.

vLLM's manager reads an adapter's files when a request needs it, again when it was given up
meanwhile, and again when it is told to (load_inplace). Each time what it has read is digested,
before it is cut and padded for this rank's layers.
"""

import functools
import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
import xxhash

from kvray.engine.adapters import Loaded, LoadedAdapter
from kvray.engine.weights import tensor_digest

logger = logging.getLogger("kvray.engine")

MAX_NAMES = 4_096  # of which this rank knows that they had one content only; past it all are mixed


@dataclass(slots=True)
class _Record:
    """Of one model. firsts: the first digest of each name; None if there was another one later."""

    manager: ReferenceType[Any]
    loaded: dict[int, tuple[str, str]] = field(default_factory=dict)  # number: name, digest
    firsts: dict[str, str | None] = field(default_factory=dict)

    def note(self, number: int, name: str, digest: str) -> None:
        self.loaded.pop(number, None)  # what was loaded last stands last
        self.loaded[number] = name, digest
        if len(self.firsts) >= MAX_NAMES and name not in self.firsts:
            self.firsts = dict.fromkeys(self.firsts)
        if self.firsts.setdefault(name, digest) != digest:
            self.firsts[name] = None

    def now(self) -> Loaded:
        """What is still there. Of two of one name, the one that came last."""
        manager = self.manager()
        there = set() if manager is None else manager.list_adapters()
        self.loaded = {number: was for number, was in self.loaded.items() if number in there}
        return {
            name: LoadedAdapter(number, digest, is_mixed=self.firsts.get(name) != digest)
            for number, (name, digest) in self.loaded.items()
        }


_records: WeakKeyDictionary[Any, _Record] = WeakKeyDictionary()  # by manager, and by its layers


def install() -> None:
    """Wrap vLLM's managers, in this process; a second call does nothing."""
    from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager, WorkerLoRAManager

    if getattr(WorkerLoRAManager, "_kvray_watched", False):
        return
    WorkerLoRAManager._kvray_watched = True  # noqa: SLF001 (our own mark)
    for kind in (WorkerLoRAManager, LRUCacheWorkerLoRAManager):
        _wrap_creation(kind)
    original = WorkerLoRAManager._load_adapter  # noqa: SLF001 (what all ways of loading come to)

    @functools.wraps(original)
    def _load_adapter(self: Any, lora_request: Any) -> Any:
        lora = original(self, lora_request)
        _see(self, lora_request, lora)
        return lora

    WorkerLoRAManager._load_adapter = _load_adapter  # noqa: SLF001


def loaded_with(layers: Iterable[Any]) -> Loaded:
    """The adapters of the model with these layers, as far as they were seen."""
    found = [_records.get(layer) for layer in layers]
    first = found[0] if found else None
    if first is None or any(record is not first for record in found):
        return {}
    return first.now()


def _wrap_creation(kind: Any) -> None:
    original = kind.create_lora_manager

    @functools.wraps(original)
    def create_lora_manager(self: Any, *args: Any, **kwargs: Any) -> Any:
        model = original(self, *args, **kwargs)
        record = _records[self] = _Record(ref(self))
        for layer in model.modules():
            _records[layer] = record
        return model

    kind.create_lora_manager = create_lora_manager


def _see(manager: Any, lora_request: Any, lora: Any) -> None:
    record = _records.get(manager)
    if record is None:
        return
    number, name = lora_request.lora_int_id, lora_request.lora_name
    record.loaded.pop(number, None)
    try:
        record.note(number, name, adapter_digest(lora))
    except Exception:
        record.firsts[name] = None
        logger.exception("kvray: the adapter %s cannot be digested; it goes without kvray", name)


def adapter_digest(lora: Any) -> str:
    """Of a LoRAModel: all that each of its layers has, tensors by their bytes."""
    lines = [f"rank {lora.rank}"]
    for module, layer in sorted(lora.loras.items()):
        lines += [f"{module}.{name} {_text(value)}" for name, value in sorted(vars(layer).items())]
    return str(xxhash.xxh3_128_hexdigest("\n".join(lines).encode()))


def _text(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {tuple(value.shape)} {tensor_digest(value)}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(_text(part) for part in value)}]"
    return repr(value)

"""What a worker has loaded, by its bytes: digests of each parameter and buffer of a model.

    loader ──every tensor is loaded──▶ digest of all ──▶ vLLM packs them ──▶ the handshake asks
                                                             │
    reload, update ──a layer is loaded anew──▶ its digest ───┘ packed again ──▶ EngineCore asks

vLLM packs linear weights for its CPU kernels and leaves empty tensors behind, so what is asked of
them later is what was seen before. What was loaded some other way has no digest, and says why.

Buffers that are no part of a checkpoint are left out: they follow from the configuration, and some
of them (tables of rope angles) are as long as the engine's longest prompt, which changes no byte.
"""

import functools
import logging
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
import xxhash

logger = logging.getLogger("kvray.engine")

PIECE_BYTES = 64 << 20  # of a tensor on a device: how much of it is on the host at a time
NOT_SEEN = (
    "they were loaded before kvray was there, or by a loader that it does not know. Is kvray among "
    "VLLM_PLUGINS?"
)


@dataclass(frozen=True, slots=True)
class Weights:
    """digest: of all that a rank has loaded; None where it cannot be had, and why says why."""

    digest: str | None
    why: str = ""


class NotReadableError(Exception):
    """A tensor has no bytes to be read: it is on the meta device, or already packed away."""


@dataclass(slots=True)
class _Layer:
    """seen: its own tensors, by name, as they were when they were last loaded. is_fresh: that was
    after the last digest of the whole model.
    """

    name: str
    module: ReferenceType[Any]
    seen: dict[str, "_Tensor"]
    is_fresh: bool = False


@dataclass(frozen=True, slots=True)
class _Tensor:
    text: str  # dtype, shape and digest
    is_empty: bool


@dataclass(slots=True)
class _Model:
    layers: list[_Layer] = field(default_factory=list)
    weights: Weights = Weights(None, NOT_SEEN)


_models: WeakKeyDictionary[Any, tuple[_Model, _Layer]] = WeakKeyDictionary()


def install() -> None:
    """Wrap what vLLM's loaders call when a model's weights are there; a second call does nothing.

    Of the loaders, BaseModelLoader.load_model calls it by this name; a loader with a way of its own
    (tensorizer, modelexpress, ipc_cache) does not, and what it loads has no digest.
    """
    from vllm.model_executor.model_loader import base_loader

    original = base_loader.process_weights_after_loading
    if getattr(original, "_kvray_wrapped", False):
        return

    @functools.wraps(original)
    def process_weights_after_loading(model: Any, *args: Any, **kwargs: Any) -> Any:
        known = _see(model)
        answer = original(model, *args, **kwargs)
        _watch(known)
        return answer

    process_weights_after_loading._kvray_wrapped = True  # type: ignore[attr-defined]  # noqa: SLF001
    base_loader.process_weights_after_loading = process_weights_after_loading


def weights_of(modules: Iterable[Any]) -> Weights:
    """What the model with these layers had when it was loaded."""
    model = _model_of(modules)
    return Weights(None, NOT_SEEN) if model is None else model.weights


def measured_again(modules: Iterable[Any]) -> Weights:
    """What the model with these layers has now, as far as it can be seen: tensors as they are, and
    of layers that are packed what was loaded into them since the last time. A packed layer that was
    not loaded anew may have been changed in a way that leaves no trace, so there is no digest then.
    """
    model = _model_of(modules)
    if model is None:
        return Weights(None, NOT_SEEN)
    try:
        model.weights = Weights(_digest((layer.name, _now(layer)) for layer in model.layers))
    except NotReadableError as exc:
        model.weights = Weights(None, str(exc))
        return model.weights
    except Exception as exc:
        logger.exception("kvray: weights cannot be digested")
        model.weights = Weights(None, f"{type(exc).__name__}: {exc}")
        return model.weights
    for layer in model.layers:
        layer.is_fresh = False
    return model.weights


def _model_of(modules: Iterable[Any]) -> _Model | None:
    """The one model that all of these are layers of."""
    known = [_models.get(module) for module in modules]
    first = known[0] if known else None
    if first is None or any(found is None or found[0] is not first[0] for found in known):
        return None
    return first[0]


def _see(module: Any) -> _Model:
    """A model's tensors are loaded, and not yet packed."""
    begin_s = time.perf_counter()
    model = _Model()
    try:
        for name, part in module.named_modules():
            layer = _Layer(name, ref(part), dict(_tensors(part)))
            model.layers.append(layer)
            _models[part] = model, layer
        model.weights = Weights(_digest((layer.name, layer.seen) for layer in model.layers))
    except NotReadableError as exc:
        model.weights = Weights(None, str(exc))
    except Exception as exc:
        logger.exception("kvray: weights cannot be digested")
        model.weights = Weights(None, f"{type(exc).__name__}: {exc}")
    logger.info(
        "kvray: weights are %s, seen in %.3f s",
        model.weights.digest or model.weights.why,
        time.perf_counter() - begin_s,
    )
    return model


def _watch(model: _Model) -> None:
    """From now on, see what is loaded into a layer anew before it is packed anew."""
    for layer in model.layers:
        quant_method: Any = getattr(layer.module(), "quant_method", None)
        original = getattr(quant_method, "process_weights_after_loading", None)
        if original is None or getattr(original, "_kvray_wrapped", False):
            continue
        try:
            quant_method.process_weights_after_loading = _watched(original)
        except AttributeError:  # it takes no attributes: what it packs anew is not seen
            logger.info("kvray: %s cannot be watched", type(quant_method).__name__)


def _watched(original: Any) -> Any:
    @functools.wraps(original)
    def process_weights_after_loading(layer: Any, *args: Any, **kwargs: Any) -> Any:
        _, known = _models.get(layer, (None, None))
        if known is not None:
            known.is_fresh = False
            try:
                known.seen = dict(_tensors(layer))
                known.is_fresh = True
            except Exception:
                logger.exception("kvray: what was loaded into %s cannot be digested", known.name)
        return original(layer, *args, **kwargs)

    process_weights_after_loading._kvray_wrapped = True  # type: ignore[attr-defined]  # noqa: SLF001
    return process_weights_after_loading


def _now(layer: _Layer) -> dict[str, _Tensor]:
    module = layer.module()
    if module is None:
        raise NotReadableError(f"{layer.name} is another layer by now")
    now = dict(_tensors(module))
    is_packed = any(
        not seen.is_empty and (name not in now or now[name].is_empty)
        for name, seen in layer.seen.items()
    )
    if not is_packed:
        return now
    if not layer.is_fresh:
        raise NotReadableError(f"{layer.name} is packed, and was not loaded anew")
    return layer.seen


def _tensors(module: Any) -> Iterator[tuple[str, _Tensor]]:
    """Of this module, and not of those in it."""
    for name, parameter in module._parameters.items():  # noqa: SLF001 (named_... would recurse)
        if parameter is not None:
            yield name, _tensor(parameter)
    for name, buffer in module._buffers.items():  # noqa: SLF001
        if buffer is not None and name not in module._non_persistent_buffers_set:  # noqa: SLF001
            yield name, _tensor(buffer)


def _tensor(tensor: Any) -> _Tensor:
    text = f"{tensor.dtype} {tuple(tensor.shape)} {tensor_digest(tensor)}"
    return _Tensor(text, is_empty=tensor.numel() == 0)


def _digest(layers: Iterable[tuple[str, dict[str, _Tensor]]]) -> str:
    lines = [
        f"{layer}.{name} {tensor.text}"
        for layer, tensors in layers
        for name, tensor in tensors.items()
    ]
    return str(xxhash.xxh3_128_hexdigest("\n".join(sorted(lines)).encode()))


def tensor_digest(tensor: torch.Tensor) -> str:
    """Of its bytes, in the order of its elements. Raises NotReadableError."""
    if tensor.device.type == "meta":
        raise NotReadableError("a parameter has no bytes (it is on the meta device)")
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    digest = xxhash.xxh3_128()
    for begin in range(0, data.numel(), PIECE_BYTES):
        # Of a tensor in host memory neither of both copies anything.
        digest.update(memoryview(data[begin : begin + PIECE_BYTES].cpu().numpy()))
    return str(digest.hexdigest())

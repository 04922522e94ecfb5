"""One row for each name of vLLM's cache dtypes, kinds of cache groups and load formats."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from types import SimpleNamespace
from typing import Any, get_args

from kvray.engine import support, versions, weights
from kvray.errors import NotAttachedError


class Verdict(StrEnum):
    EQUAL = "equal"  # taken: what comes back was seen to be what the engine computes
    REFUSED = "refused"  # by kvray, by its name
    NAMED = "named by its bytes"
    UNNAMED = "shares with nobody without model_tag"


class Kind(StrEnum):
    CACHE_DTYPE = "--kv-cache-dtype"
    CACHE_GROUP = "cache groups"
    LOAD_FORMAT = "--load-format"


@dataclass(frozen=True, slots=True)
class Row:
    """why: the test that shows it, or what is said."""

    kind: Kind
    name: str
    verdict: Verdict
    why: str


ORACLES = {
    "auto": "tests/integration/test_oracle_full_attention.py",
    "float16": "tests/integration/test_oracle_dtypes.py",
    "bfloat16": "tests/integration/test_oracle_dtypes.py",
    "FullAttentionSpec": "tests/integration/test_oracle_full_attention.py",
    "SlidingWindowSpec": "tests/integration/test_oracle_windows.py",
}
LOADED_HERE = "tests/unit/test_weights.py"
RUN = {"auto", "safetensors", "pt", "sharded_state", "dummy"}  # by that test; others lack a package


def all_rows() -> list[Row]:
    return [*_cache_dtypes(), *_cache_groups(), *_load_formats()]


def _cache_dtypes() -> Iterator[Row]:
    from vllm.config.cache import CacheDType

    for name in get_args(CacheDType):
        yield _judged(Kind.CACHE_DTYPE, name, _refusal(cache_dtype=name))


def _cache_groups() -> Iterator[Row]:
    from vllm.v1.kv_cache_interface import KVCacheSpec

    for kind in sorted(_derived(KVCacheSpec), key=lambda kind: kind.__name__):
        yield _judged(Kind.CACHE_GROUP, kind.__name__, _refusal(spec=_bare(kind)))


def _load_formats() -> Iterator[Row]:
    from vllm.model_executor import model_loader
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    weights.install()
    for name in get_args(model_loader.LoadFormats):
        loader = model_loader._LOAD_FORMAT_TO_MODEL_LOADER[name]  # noqa: SLF001 (vLLM's own table)
        # What kvray wraps is called there, and by no other way of loading.
        if loader.load_model is BaseModelLoader.load_model:
            why = LOADED_HERE if name in RUN else "it loads by BaseModelLoader.load_model; not run"
            yield Row(Kind.LOAD_FORMAT, name, Verdict.NAMED, why)
        else:
            yield Row(Kind.LOAD_FORMAT, name, Verdict.UNNAMED, f"{loader.__name__} loads by itself")


def _judged(kind: Kind, name: str, refusal: str | None) -> Row:
    if refusal is None:
        return Row(kind, name, Verdict.EQUAL, ORACLES[name])
    assert name in refusal, f"{name} is refused, but not by its name: {refusal}"
    return Row(kind, name, Verdict.REFUSED, refusal)


def _refusal(*, cache_dtype: str = "auto", spec: Any = None) -> str | None:
    """What kvray says of an engine that is plain but for this."""
    parallel = SimpleNamespace(data_parallel_size=1)
    config = SimpleNamespace(
        parallel_config=parallel,
        cache_config=SimpleNamespace(cache_dtype=cache_dtype),
        speculative_config=None,
    )
    spec = spec if spec is not None else _bare(versions.shown_specs()[0])
    groups = SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec)])
    try:
        support.require_supported(config, groups)
    except NotAttachedError as exc:
        return str(exc)
    return None


def _derived(kind: type) -> set[type]:
    """All that are derived from it, in any number of steps."""
    direct: set[type] = set(kind.__subclasses__())
    return direct | {far for near in direct for far in _derived(near)}


def _bare(kind: type) -> Any:
    """One of this kind without a shape: only its kind, and the defaults of its fields, count."""
    return object.__new__(kind)

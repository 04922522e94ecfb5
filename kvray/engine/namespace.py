"""The namespace of an engine: a digest of everything that changes a block's bytes.

Two engines share blocks exactly if all fields are equal. The fields are kept beside the digest,
so that a person can be told which one differs. What vLLM's own block hash covers already (tokens,
cache_salt, images by content, the LoRA adapter's name) is not repeated here.
"""

import hashlib
import json
import platform
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kvray.core.keys import namespace_digest
from kvray.core.layout import FORMAT_VERSION
from kvray.core.messages import MAX_FIELD_BYTES
from kvray.engine import versions

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
WHOLE_FILE_BYTES = 32 << 20  # smaller files (adapters, toy models) are read whole: 30 ms
SAMPLE_COUNT = 16  # of a larger file: finds retrained weights, costs 64 KiB of reading
SAMPLE_BYTES = 4_096
MAX_SAFETENSORS_HEADER_BYTES = 100 << 20  # the format's own limit
MAX_FILES = 4_096  # a sharded checkpoint has hundreds of files; more is not a model folder


def weights_digest(folder: Path) -> str:
    """Of a folder's weight files: names, sizes, and small files whole; of large ones the
    safetensors header and samples.

    Reading terabytes at every start is not an option; a fine-tuned copy differs in nearly every
    page, so 16 samples of 4 KiB a file find it. An operator who patches single values names the
    model with `model_tag`.
    """
    digest = hashlib.blake2b(digest_size=16)
    files = sorted(p for p in folder.iterdir() if p.suffix in WEIGHT_SUFFIXES and p.is_file())
    for path in files[:MAX_FILES]:
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        for part in _samples(path, size):
            digest.update(part)
    return digest.hexdigest()


def _samples(path: Path, size: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        if size <= WHOLE_FILE_BYTES:
            yield file.read(WHOLE_FILE_BYTES)
            return
        if path.suffix == ".safetensors":
            header_bytes = int.from_bytes(file.read(8), "little")
            yield file.read(min(header_bytes, MAX_SAFETENSORS_HEADER_BYTES, size))
        step = (size - SAMPLE_BYTES) // (SAMPLE_COUNT - 1)
        for index in range(SAMPLE_COUNT):
            file.seek(index * step)
            yield file.read(SAMPLE_BYTES)


def _model_folder(model: str, revision: str | None) -> Path | None:
    """Where the weights lie on this machine; None for a hub name that is not in the local cache
    (a remote loader).
    """
    if Path(model).is_dir():
        return Path(model)
    if Path(model).is_file():
        return None  # a single GGUF file: handled by the caller
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, revision=revision, local_files_only=True))
    except (HfHubHTTPError, LocalEntryNotFoundError, ValueError, OSError):
        return None


def _weights(vllm_config: Any) -> dict[str, Any]:
    model, load = vllm_config.model_config, vllm_config.load_config
    load_format = str(getattr(load.load_format, "value", load.load_format))
    if load_format == "dummy":  # random weights: the seed makes them
        return {"load_format": load_format, "seed": model.seed}
    if Path(model.model).is_file():
        folder: Path | None = Path(model.model).parent
    else:
        folder = _model_folder(model.model, model.revision)
    if folder is None:
        return {"load_format": load_format, "model": model.model, "revision": model.revision}
    return {"load_format": load_format, "digest": weights_digest(folder)}


def _hf_config(model_config: Any) -> dict[str, Any]:
    config = json.loads(model_config.hf_config.to_json_string(use_diff=False))
    # The folder's name and the library's version change no byte of KV.
    return {k: v for k, v in config.items() if k not in ("_name_or_path", "transformers_version")}


def _rope_depends_on_length(hf_config: Any) -> bool:
    """Whether the engine's longest prompt changes the positions' angles (and so the keys)."""
    rope = getattr(hf_config, "rope_parameters", None) or getattr(hf_config, "rope_scaling", None)
    kind = str((rope or {}).get("rope_type", (rope or {}).get("type", "default")))
    return kind not in ("default", "linear", "llama3", "yarn")


def gather_fields(
    vllm_config: Any,
    kv_cache_config: Any,
    *,
    tokens_per_hash: int,
    blocks_per_chunk: int,
    model_tag: str,
) -> dict[str, Any]:
    """Everything of one engine that changes the bytes under a block hash, as plain data."""
    model, cache, parallel = (
        vllm_config.model_config,
        vllm_config.cache_config,
        vllm_config.parallel_config,
    )
    algorithm = str(cache.prefix_caching_hash_algo)
    speculative = vllm_config.speculative_config
    groups = [
        {"layers": list(group.layer_names), "spec": repr(group.kv_cache_spec)}
        for group in kv_cache_config.kv_cache_groups
    ]
    return {
        "kvray_format": FORMAT_VERSION,
        "vllm": versions.installed_version(),
        "model_tag": model_tag,
        "model_config": _hf_config(model),
        "weights": _weights(vllm_config),
        "model_dtype": str(model.dtype),
        "quantization": str(model.quantization),
        "hf_overrides": repr(getattr(model, "hf_overrides", None)),
        "rope_limit": model.max_model_len if _rope_depends_on_length(model.hf_config) else None,
        "cache_dtype": str(cache.cache_dtype),
        "tokens_per_hash": tokens_per_hash,
        "blocks_per_chunk": blocks_per_chunk,
        "hash_algorithm": algorithm,
        "hash_seed": versions.hash_seed(),
        # vLLM's "sha256" hashes a pickle, whose bytes belong to a Python version.
        "python": list(sys.version_info[:2]) if "cbor" not in algorithm else None,
        "groups": groups,
        "layout": str(getattr(cache, "kv_cache_layout", None)),
        "tensor_parallel": parallel.tensor_parallel_size,
        "pipeline_parallel": parallel.pipeline_parallel_size,
        "decode_context_parallel": parallel.decode_context_parallel_size,
        "prefill_context_parallel": parallel.prefill_context_parallel_size,
        "speculative": None if speculative is None else repr(speculative),
        "device": str(vllm_config.device_config.device_type),
        "machine": platform.machine(),
    }


def renewed(fields: Mapping[str, Any], nonce: str) -> dict[str, Any]:
    """The fields after the weights of this engine changed."""
    return {**fields, "weights_nonce": nonce}


def as_text(fields: Mapping[str, Any]) -> dict[str, str]:
    """For people, on another machine: equal texts mean equal fields. A long one is a digest."""
    texts = {name: json.dumps(value, sort_keys=True) for name, value in fields.items()}
    return {
        name: text
        if len(text.encode()) <= MAX_FIELD_BYTES
        else f"digest {hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}"
        for name, text in texts.items()
    }


def digest(fields: Mapping[str, Any]) -> bytes:
    return bytes(namespace_digest(fields))


class AdapterDigests:
    """Digests of LoRA adapters' files, by path; read once for each change of a file.

    vLLM's hash knows an adapter by its name (and path, in 0.32): another adapter under the same
    name on another engine would hit without this.
    """

    MAX_ADAPTERS = 1_024  # more than any engine serves; the oldest is read again

    def __init__(self) -> None:
        self._known: dict[str, tuple[tuple[tuple[str, int, int], ...], bytes]] = {}

    def salt(self, name: str, path: str) -> bytes | None:
        """16 bytes for requests with this adapter; None if its files can not be read here, and
        then the request goes without kvray.
        """
        folder = Path(path)
        try:
            files = sorted(p for p in folder.iterdir() if p.is_file())[:MAX_FILES]
            stamp = tuple((p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files)
            known = self._known.get(path)
            if known is not None and known[0] == stamp:
                return known[1]
            settings = folder / "adapter_config.json"
            digest = hashlib.blake2b(digest_size=16)
            digest.update(name.encode() + b"\0")
            digest.update(settings.read_bytes() if settings.is_file() else b"")
            digest.update(weights_digest(folder).encode())
        except OSError:
            return None
        if len(self._known) >= self.MAX_ADAPTERS:
            self._known.pop(next(iter(self._known)))
        self._known[path] = (stamp, digest.digest())
        return self._known[path][1]

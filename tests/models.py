"""Small models for tests: built once from a seed, kept in a cache folder, loaded by vLLM.

They have random weights and no tokenizer: engines take token ids (skip_tokenizer_init). A folder's
name holds a digest of its recipe, so a changed recipe is another folder, and a folder that is there
is complete: it is built beside its place and renamed into it.
"""

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

CACHE_VARIABLE = "KVRAY_MODEL_CACHE"
DEFAULT_CACHE = Path(__file__).resolve().parent.parent / ".cache" / "models"

VOCABULARY = 32_000
WINDOW_TOKENS = 256  # of tiny_window


def tiny(seed: int = 0) -> Path:
    """A Llama of 56 M parameters: 8 KiB of KV per token, 1 MiB per 128-token block."""
    return _built(
        "tiny",
        "Llama",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 512,
            "intermediate_size": 1376,
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "max_position_embeddings": 16_384,
        },
        seed,
    )


def tiny_biased(seed: int = 0) -> Path:
    """A Qwen2 of two layers, whose projections of Q, K and V have a bias: 4 MB."""
    return _built(
        "tiny-biased",
        "Qwen2",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 8_192,
        },
        seed,
    )


def tiny_gemma2(seed: int = 0) -> Path:
    """A hybrid: four Gemma2 layers, every other one with a sliding window of 512 tokens."""
    return _built(
        "tiny-gemma2",
        "Gemma2",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "query_pre_attn_scalar": 64,
            "sliding_window": 512,
            "max_position_embeddings": 8_192,
        },
        seed,
    )


def tiny_window(seed: int = 0) -> Path:
    """A Mistral of four layers, each with a sliding window of 256 tokens, and no other: 2 KiB of KV
    per token.
    """
    return _built(
        "tiny-window",
        "Mistral",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "sliding_window": WINDOW_TOKENS,
            "max_position_embeddings": 8_192,
        },
        seed,
    )


def cache_folder() -> Path:
    return Path(os.environ.get(CACHE_VARIABLE) or DEFAULT_CACHE)


def _built(name: str, family: str, settings: dict[str, Any], seed: int) -> Path:
    recipe = json.dumps([family, settings, seed], sort_keys=True).encode()
    folder = cache_folder() / f"{name}-seed{seed}-{hashlib.sha256(recipe).hexdigest()[:8]}"
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _build(unfinished, family, settings, seed)
        unfinished.chmod(0o755)
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.exists():  # otherwise another process was first, with the same bytes
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _build(folder: Path, family: str, settings: dict[str, Any], seed: int) -> None:
    import torch
    import transformers

    config = getattr(transformers, f"{family}Config")(**settings, dtype="bfloat16")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(transformers, f"{family}ForCausalLM")(config)
    model.to(torch.bfloat16).save_pretrained(folder)

"""The names of a prompt's chunks, worked out without the engine, for `kvray where`.

Needs what an engine has said of itself (Hello.fields) and the same release of vLLM in this process.
"""

import json
from collections.abc import Mapping, Sequence

from kvray.core.ids import BlockKey, Namespace
from kvray.core.keys import block_keys
from kvray.engine import versions
from kvray.errors import ConfigError

CHUNK_TOKENS = "chunk_tokens"  # said beside the namespace's fields, since it follows from them


def chunk_keys(
    fields: Mapping[str, str], namespace: Namespace, token_ids: Sequence[int]
) -> tuple[int, list[BlockKey]]:
    """Tokens of a chunk, and the key of each full chunk of the prompt in the first cache group.
    fields: as an engine says them, each as JSON. Prompts with images, a salt or an adapter have
    other names. Raises ConfigError if this process has another vLLM, or the seed is a secret one.
    """
    said = {name: json.loads(fields[name]) for name in _NEEDED if name in fields}
    if missing := [name for name in _NEEDED if name not in said]:
        raise ConfigError(f"that engine does not say its {', '.join(missing)}: another kvray?")
    here = versions.installed_version()
    if said["vllm"] != here:
        raise ConfigError(
            f"that engine runs vLLM {said['vllm']}, this process {here}, which may name blocks "
            "otherwise: ask where the same release is installed"
        )
    hashes = versions.block_hashes(
        token_ids,
        algorithm=said["hash_algorithm"],
        seed=said["hash_seed"],
        tokens_per_hash=said["tokens_per_hash"],
    )
    chunk_tokens: int = said[CHUNK_TOKENS]
    step = chunk_tokens // said["tokens_per_hash"]
    return chunk_tokens, block_keys(
        namespace, [versions.offload_key(h, group=0) for h in hashes[step - 1 :: step]]
    )


_NEEDED = ("vllm", "hash_algorithm", "hash_seed", "tokens_per_hash", CHUNK_TOKENS)

"""Which nodes hold how much of a prompt, as the directory believes.

token ids ──names of an engine's chunks──▶ keys ──where──▶ nodes ──▶ the prefix that each has
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from kvray.cluster import Cluster
from kvray.core.ids import Namespace
from kvray.engine.versions import require_installed
from kvray.errors import ConfigError
from kvray.watch.doctor import Engine
from kvray.watch.tables import NODE_CHARS

MAX_TOKENS = 4_194_304  # 64 MiB of a file; longer than any model's context


def one_engine(engines: Sequence[Engine], model: str) -> Engine:
    """Whose names are asked for. Raises ConfigError if there is no choice, or more than one."""
    wanted = [engine for engine in engines if not model or engine.model == model]
    kinds = {(engine.model, engine.namespace): engine for engine in wanted}
    if not kinds:
        models = ", ".join(sorted({engine.model for engine in engines})) or "none"
        raise ConfigError(f"no engine of that model is attached; attached are: {models}")
    if len(kinds) > 1:
        names = "; ".join(engine.name for engine in kinds.values())
        raise ConfigError(
            f"engines that share nothing are attached ({names}): choose one with --model, and see "
            "`kvray doctor` if they are of one model"
        )
    return next(iter(kinds.values()))


def token_ids_of(tokens: str, prompt: str, model: str) -> list[int]:
    """Of a list, of a file (@path, a JSON list), or of a text. Raises ConfigError, and
    MissingPackageError without vLLM.
    """
    if bool(tokens) == bool(prompt):
        raise ConfigError("give either --tokens 1,2,3 (or --tokens @FILE) or --prompt TEXT")
    require_installed("`kvray where`")  # it hashes as the engines do, and has the tokenizer
    if prompt:
        return _tokenized(prompt, model)
    try:
        if tokens.startswith("@"):
            found = json.loads(Path(tokens[1:]).read_text())
        else:
            found = [int(part) for part in tokens.split(",")]
    except (OSError, ValueError) as exc:
        raise ConfigError(f"--tokens {tokens[:40]!r} is no list of token ids: {exc}") from exc
    is_list = isinstance(found, list) and all(isinstance(token, int) for token in found)
    if not is_list or not 0 < len(found) <= MAX_TOKENS:
        raise ConfigError(f"expected a list of 1 to {MAX_TOKENS} token ids in {tokens[:40]!r}")
    return [int(token) for token in found]


def _tokenized(prompt: str, model: str) -> list[int]:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as exc:
        raise ConfigError(
            f"the tokenizer of {model} can not be loaded here ({exc}); give --tokens"
        ) from exc
    return [int(token) for token in tokenizer(prompt)["input_ids"]]


def locate_prompt(cluster: Cluster, engine: Engine, token_ids: Sequence[int]) -> dict[str, Any]:
    """What `kvray where --json` prints. prefix_tokens: from the start of the prompt without a gap,
    which is what a request can use; of the cluster, whichever node has each chunk.
    """
    from kvray.engine.chunk_names import chunk_keys  # imports vLLM

    namespace = Namespace(bytes.fromhex(engine.namespace))
    chunk_tokens, keys = chunk_keys(engine.fields, namespace, token_ids)
    held = [{place.node_id for place in places} for places in cluster.where(*keys)]
    node_ids = sorted({node_id for nodes in held for node_id in nodes})
    return {
        "model": engine.model,
        "tokens": len(token_ids),
        "chunk_tokens": chunk_tokens,
        "chunks": len(keys),
        "prefix_tokens": chunk_tokens * _prefix([bool(nodes) for nodes in held]),
        "nodes": [
            {
                "node": node_id,
                "chunks": sum(node_id in nodes for nodes in held),
                "prefix_tokens": chunk_tokens * _prefix([node_id in nodes for nodes in held]),
            }
            for node_id in node_ids
        ],
    }


def _prefix(has: Sequence[bool]) -> int:
    """How many are true before the first that is not."""
    return next((index for index, there in enumerate(has) if not there), len(has))


def where_view(found: dict[str, Any]) -> Group:
    table = Table("node", "chunks", "tokens from the start")
    for row in found["nodes"]:
        table.add_row(
            row["node"][:NODE_CHARS],
            f"{row['chunks']} of {found['chunks']}",
            f"{row['prefix_tokens']:,} of {found['tokens']:,}",
        )
    said = f"the cluster has the first {found['prefix_tokens']:,} of {found['tokens']:,} tokens"
    return Group(table, Text(said, style="bold"))

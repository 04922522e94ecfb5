"""The seam to vLLM: what blocks are called, and what is refused."""

from tests.mutants.mutant import Mutant, tested

WEIGHTS = tested("tests/unit/test_weights.py")
FACTS = tested("tests/unit/test_rank_facts.py")
REFUSALS = tested("tests/unit/test_refusals.py")
TRANSFERS = tested("tests/unit/test_transfers.py")
ADAPTERS = tested("tests/unit/test_adapters.py")

SEAM_NAMES: tuple[Mutant, ...] = (
    Mutant(
        "seam: a digest is of the first piece of a tensor only",
        "kvray.engine.weights",
        (
            (
                "for begin in range(0, data.numel(), PIECE_BYTES):",
                "for begin in range(min(1, len(data))):",
            ),
        ),
        WEIGHTS,
    ),
    Mutant(
        "seam: weights are seen when vLLM has packed them",
        "kvray.engine.weights",
        (
            (
                "        known = _see(model)\n        answer = original(model, *args, **kwargs)\n",
                "        answer = original(model, *args, **kwargs)\n        known = _see(model)\n",
            ),
        ),
        WEIGHTS,
    ),
    Mutant(
        "seam: biases are not in the digest",
        "kvray.engine.weights",
        (
            (
                "        if parameter is not None:\n",
                '        if parameter is not None and name != "bias":\n',
            ),
        ),
        WEIGHTS,
    ),
    Mutant(
        "seam: a packed layer that nobody has loaded anew has its old name",
        "kvray.engine.weights",
        (("    if not layer.is_fresh:\n", "    if layer.is_fresh is None:\n"),),
        WEIGHTS,
    ),
    Mutant(
        "seam: the instruction set is not in the name",
        "kvray.engine.facts",
        (('getattr(layer, "isa", None)', "None"),),
        FACTS,
    ),
    Mutant(
        "seam: how elements lie in a block is not in the name",
        "kvray.engine.facts",
        (
            (
                '["outside" if s > step else s for i, s in enumerate(strides) if i != blocks]',
                "[]",
            ),
        ),
        FACTS,
    ),
    Mutant(
        "seam: the number of blocks is in the name",
        "kvray.engine.facts",
        (('["blocks" if i == blocks else size', "[size if i == blocks else size"),),
        FACTS,
    ),
    Mutant(
        "seam: ranks are named by the first of them",
        "kvray.engine.facts",
        (("column[0] if all(value == column[0] for value in column) else column", "column[0]"),),
        FACTS,
    ),
    Mutant(
        "seam: weights without a digest are shared without a tag",
        "kvray.engine.namespace",
        (
            (
                '        if not fields.get("model_tag"):\n',
                '        if fields.get("model_tag") is None:\n',
            ),
        ),
        FACTS,
    ),
    Mutant(
        "seam: a change of weights keeps the name",
        "kvray.engine.namespace",
        (("    return {**fields, NONCE: nonce}\n", "    return dict(fields)\n"),),
        FACTS,
    ),
    Mutant(
        "seam: chunks of a window have several blocks",
        "kvray.engine.support",
        (("    if has_window or len(specs) > 1:\n", "    if len(specs) > 1:\n"),),
        REFUSALS,
    ),
    Mutant(
        "seam: what is derived from a kind of cache is taken for it",
        "kvray.engine.support",
        (
            (
                "        if type(spec) not in versions.shown_specs():\n",
                "        if not isinstance(spec, versions.shown_specs()):\n",
            ),
        ),
        REFUSALS,
    ),
    Mutant(
        "seam: a cache dtype is refused for its fp8 only",
        "kvray.engine.arguments",
        (
            (
                "return dtype is not None and str(dtype) not in SHOWN_CACHE_DTYPES",
                'return "fp8" in str(dtype)',
            ),
        ),
        REFUSALS,
    ),
    Mutant(
        "seam: a store with a hole is copied as far as it goes",
        "kvray.engine.pieces",
        (
            (
                "        bool(np.all(block_ids))\n        and all(\n",
                "        True\n        or all(\n",
            ),
        ),
        TRANSFERS,
    ),
    Mutant(
        "seam: a replaced adapter is named while the device has blocks of the old one",
        "kvray.engine.adapters",
        (("        if known is None or name in self._mixed:\n", "        if known is None:\n"),),
        ADAPTERS,
    ),
    Mutant(
        "seam: an adapter is named by what one rank has loaded",
        "kvray.engine.adapters",
        (("        if len(self._ranks) < self._rank_count:\n", "        if not self._ranks:\n"),),
        ADAPTERS,
    ),
    Mutant(
        "seam: an adapter that was given up is not remembered",
        "kvray.engine.adapters",
        (
            (
                "            last = self._last.pop(name, None)\n",
                "            last = self._last.pop(name) if name in before else None\n",
            ),
        ),
        ADAPTERS,
    ),
)

"""The seam to vLLM: names, holds, tickets, copies. Their names begin with "seam"."""

from tests.mutants.mutant import Mutant

BUGS: tuple[Mutant, ...] = ()

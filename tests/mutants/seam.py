"""The seam to vLLM: names, holds, tickets, copies. Their names begin with "seam"."""

from tests.mutants.mutant import Mutant
from tests.mutants.seam_lifecycle import SEAM_LIFECYCLE
from tests.mutants.seam_names import SEAM_NAMES

BUGS: tuple[Mutant, ...] = (*SEAM_NAMES, *SEAM_LIFECYCLE)

"""All bugs, gathered from the files that list them by what they break."""

from tests.mutants import directory, eviction, reads, review, seam, seam_proof, seam_trust, slots
from tests.mutants.mutant import Mutant

BUGS: tuple[Mutant, ...] = (
    *reads.BUGS,
    *slots.BUGS,
    *directory.BUGS,
    *eviction.BUGS,
    *review.BUGS,
    *seam.BUGS,
    *seam_trust.SEAM_TRUST,
    *seam_proof.SEAM_PROOF,
)

"""One choice each: basis, rank, refresh, re-basing, residual."""

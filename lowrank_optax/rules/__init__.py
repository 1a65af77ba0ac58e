"""The rules, one choice each: basis, rank, refresh, re-basing, residual."""

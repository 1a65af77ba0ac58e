"""Comparisons of many runs: their suites, their records and their reports."""

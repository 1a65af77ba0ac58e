"""Equality of parameters, bit for bit."""

import jax
import numpy as np


def assert_same_bits(actual, expected):
    """Asserts that two trees have the same structure, dtypes and bits."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()

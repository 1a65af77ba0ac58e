"""Spectra of the first gradient: of which leaves, what they say, where it ends."""

import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_optax
from experiments.run.spectra import (
    captured,
    first_spectra,
    load_spectra,
    needed_ranks,
    save_spectra,
)


def with_values(*values, rows=6, columns=9):
    """A matrix with these singular values."""
    rng = np.random.default_rng(len(values))
    left = np.linalg.qr(rng.normal(size=(rows, rows)))[0][:, : len(values)]
    right = np.linalg.qr(rng.normal(size=(columns, columns)))[0][:, : len(values)]
    return (left * values @ right.T).astype(np.float32)


GRADS = {
    "embedding": np.ones((20, 6), np.float32),
    "blocks": {
        "mlp": {"up": np.stack([with_values(4, 2, 1), with_values(3)])},
        "mlp_norm": {"scale": np.ones((2, 6), np.float32)},
    },
}


def test_each_block_matrix_has_its_singular_values_under_the_name_of_its_rank():
    spectra, line = first_spectra(GRADS)
    assert line is None
    assert list(spectra) == ["blocks/mlp/up"]
    # float32 of matrices with norms near 4.
    expected = [[4, 2, 1, 0, 0, 0], [3, 0, 0, 0, 0, 0]]
    np.testing.assert_allclose(spectra["blocks/mlp/up"], expected, atol=1e-5)


def test_the_rank_that_is_needed_loses_at_most_the_threshold():
    spectrum = np.array([[4, 2, 1, 0.0], [3, 0, 0, 0]])
    np.testing.assert_allclose(captured(spectrum)[0], np.array([16, 20, 21, 21]) / 21)
    for threshold, needed in ((0.9, 1), (0.24, 1), (0.2, 2), (0.04, 3)):
        assert needed_ranks(spectrum, threshold).tolist() == [needed, 1]


def test_gradients_without_a_spectrum_are_zero():
    bad = np.full((1, 6, 9), np.nan, np.float32)
    none = np.zeros((1, 6, 9), np.float32)
    spectra, _ = first_spectra({"blocks": {"down": bad, "up": none}})
    for spectrum in spectra.values():
        assert np.all(captured(spectrum) == 0)
        assert needed_ranks(spectrum, 0.1).tolist() in ([1], [6])


def test_what_would_take_too_long_is_named_and_left_out():
    spectra, line = first_spectra(GRADS, most_work=2 * 6 * 9 * 6 - 1)
    assert spectra == {}
    assert line is not None
    assert "leaves out blocks/mlp/up: " in line
    assert first_spectra(GRADS, most_work=2 * 6 * 9 * 6)[1] is None


def test_spectra_are_read_as_they_were_saved(tmp_path):
    spectra, _ = first_spectra(GRADS)
    save_spectra(tmp_path / "spectra.npz", spectra)
    loaded = load_spectra(tmp_path / "spectra.npz")
    assert loaded.keys() == spectra.keys()
    np.testing.assert_array_equal(loaded["blocks/mlp/up"], spectra["blocks/mlp/up"])


@pytest.mark.parametrize("threshold", [0.01, 0.1, 0.5])
def test_a_rank_rule_of_the_library_asks_for_the_same_rank(threshold):
    spectrum = np.array([[4, 3, 2, 1, 0.5, 0.25], [9, 1, 1, 1, 0, 0.0]], np.float32)
    rule = lowrank_optax.energy_rank(6, threshold, 1, smoothing=0.0)
    energies = spectrum**2 / np.sum(spectrum**2, axis=-1, keepdims=True)
    rank, _ = rule.select(jnp.asarray(energies), jnp.zeros(2), jnp.int32(0))
    assert rank.tolist() == needed_ranks(spectrum, threshold).tolist()

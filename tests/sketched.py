"""What a sketch of a gradient has to be."""

import jax
import numpy as np

import lowrank_optax
from lowrank_optax.binding.optimizer import bind
from lowrank_optax.binding.states import low_rank_states, slots_of
from lowrank_optax.sketch import omegas_of


def assert_sketched(optimizer, params, gradients, state, sketches, rounding=1e-5):
    """Asserts Y = Omega^T A in float64, for each leaf with a computed basis.

    Args:
        optimizer: With low-rank transformations.
        params: Parameters.
        gradients: Full gradients.
        state: State that the sketches belong to.
        sketches: Key path -> sketch.
        rounding: Largest relative error, by the Frobenius norm.
    """
    binding, seen = bind(optimizer, params), set()
    full = dict(jax.tree.leaves_with_path(gradients))
    for node in low_rank_states(state):
        slots = slots_of(node)
        projectors = {
            path: projector
            for path, projector in binding.projectors(params, node).items()
            if not projector.parts.is_random
        }
        omegas = _omegas(projectors, slots)
        for path, projector in projectors.items():
            name, omega = jax.tree_util.keystr(path), omegas[path]
            matrix = np.asarray(projector.view.oriented(full[path]), np.float64)
            expected = np.einsum("ak,...ab->...kb", omega, matrix)
            found = sketches[name].rows
            assert found.shape == expected.shape, name
            error = np.linalg.norm(found - expected)
            assert error <= rounding * np.linalg.norm(expected), name
            seen.add(name)
    assert seen == set(sketches)
    assert seen <= lowrank_optax.projections(optimizer, params).keys()


def _omegas(projectors, slots):
    """The test matrices, compiled: eagerly they take longer than all else."""

    def of(values):
        found = omegas_of(projectors, dict(zip(slots, values, strict=True)), None)
        return list(found.values())

    return dict(zip(projectors, jax.jit(of)(list(slots.values())), strict=True))

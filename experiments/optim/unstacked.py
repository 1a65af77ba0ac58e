"""Shows a transformation the matrices of a scan-stacked leaf one by one."""

import jax
import jax.numpy as jnp
import optax


def unstacked(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Applies ``tx`` to each of the L slices of every leaf of shape (L, ...).

    ``optax.contrib.galore`` projects leaves of two axes and leaves all others alone
    without a word; under this wrapper a leaf (L, n, m) is a tuple of L leaves (n, m).
    The state of ``tx`` holds such tuples, and the updates come back stacked, in the
    shape and dtype that ``tx`` gives them. The L slices are separate operations in
    the compiled program, so its size and the time to compile it grow with L.

    Args:
        tx: A transformation of leaves without the leading axis.

    Returns:
        The transformation of stacked leaves; each must have at least one axis.
    """

    def init_fn(params):
        return tx.init(_split(params))

    def update_fn(updates, state, params=None):
        split_params = None if params is None else _split(params)
        split, state = tx.update(_split(updates), state, split_params)
        return jax.tree.map(lambda _, parts: jnp.stack(parts), updates, split), state

    return optax.GradientTransformation(init_fn, update_fn)


def _split(tree):
    return jax.tree.map(lambda leaf: tuple(leaf[i] for i in range(len(leaf))), tree)

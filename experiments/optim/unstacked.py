"""Shows a transformation the matrices of a scan-stacked leaf one by one."""

import jax
import jax.numpy as jnp
import optax


def unstacked(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Applies ``tx`` to each of the L slices of every leaf of shape (L, n, m).

    ``optax.contrib.galore`` projects leaves of two axes and leaves all others alone
    without a word; under this wrapper a leaf (L, n, m) is a tuple of L leaves (n, m).
    The state of ``tx`` holds such tuples, and the updates come back stacked, in the
    shape and dtype that ``tx`` gives them. The L slices are separate operations in
    the compiled program, so its size and the time to compile it grow with L. A leaf
    (n, m), such as an encoder's pooler, is given to ``tx`` as it is.

    Args:
        tx: A transformation of leaves of two axes.

    Returns:
        The transformation of leaves of two or three axes.
    """

    def init_fn(params):
        return tx.init(_split(params))

    def update_fn(updates, state, params=None):
        split_params = None if params is None else _split(params)
        split, state = tx.update(_split(updates), state, split_params)
        return jax.tree.map(_joined, updates, split), state

    return optax.GradientTransformation(init_fn, update_fn)


def _split(tree):
    def slices(leaf):
        return tuple(leaf[i] for i in range(len(leaf))) if leaf.ndim == 3 else leaf

    return jax.tree.map(slices, tree)


def _joined(leaf, parts):
    return jnp.stack(parts) if leaf.ndim == 3 else parts

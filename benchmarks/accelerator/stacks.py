"""optax's own transformations on leaves with the layer as leading axis."""

from typing import Any

import jax
import jax.numpy as jnp
import optax


def over_layers(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Returns ``tx`` on each layer of (L, ...) leaves, with one counter for all layers.

    ``optax.contrib.galore`` projects leaves of two axes only. Mapped over the layers
    with a common counter, its condition around the SVD stays a single condition. The
    program then does not grow with L; with a leaf per layer, the program would grow.
    """

    def init(params):
        return jax.vmap(tx.init, out_axes=_state_axes(tx, params))(params)

    def update(updates, state, params=None):
        axes = _state_axes(tx, updates)
        return jax.vmap(
            tx.update,
            in_axes=(0, axes, None if params is None else 0),
            out_axes=(0, axes),
        )(updates, state, params)

    return optax.GradientTransformation(init, update)


def layer_by_layer(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Returns the same in a loop, with the temporaries of a single layer's SVD."""

    def update(updates, state, params=None):
        def of_layer(_, layer):
            updates, state, params = layer
            return None, tx.update(updates, state, params)

        # A scan has no arguments in common for all steps, so counters are repeated.
        layers = len(jax.tree.leaves(updates)[0])
        axes = _state_axes(tx, updates)
        is_none = {"is_leaf": lambda x: x is None}
        state = jax.tree.map(
            lambda axis, x: x if axis == 0 else jnp.broadcast_to(x, (layers,)),
            *(axes, state),
            **is_none,
        )
        _, (updates, state) = jax.lax.scan(of_layer, None, (updates, state, params))
        state = jax.tree.map(
            lambda axis, x: x if axis == 0 else x[0], axes, state, **is_none
        )
        return updates, state

    return optax.GradientTransformation(over_layers(tx).init, update)


def _state_axes(tx: optax.GradientTransformation, stacks: Any) -> Any:
    """Returns 0 for state arrays with a layer axis, None for the counters."""
    layer = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), stacks)
    return jax.tree.map(lambda x: 0 if x.ndim else None, jax.eval_shape(tx.init, layer))


def muon_of_stacks(
    learning_rate: float,
) -> optax.GradientTransformation:
    """Returns ``optax.contrib.muon`` for matrices and stacks of matrices."""

    def last_two_axes(tree: Any) -> Any:
        numbers = optax.contrib.MuonDimensionNumbers(-2, -1)
        return jax.tree.map(lambda leaf: numbers, tree)

    return optax.contrib.muon(
        learning_rate, muon_weight_dimension_numbers=last_two_axes
    )

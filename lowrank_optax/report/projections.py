"""``projections``: how an optimizer projects each leaf, or why it does not."""

import dataclasses
from typing import Any

import optax

from lowrank_optax.binding.optimizer import bind
from lowrank_optax.matrix.arrays import as_arrays, leaf_name
from lowrank_optax.matrix.boxes import leaves_by_path
from lowrank_optax.matrix.plan import LeafPlan


def projections(
    optimizer: optax.GradientTransformation, params: Any
) -> dict[str, LeafPlan]:
    """Lists how ``optimizer`` projects each leaf, or why a leaf stays at full size.

    The list comes from the optimizer's own ``init`` on shapes: nothing is allocated,
    and chains, masks and partitions are followed at any depth.

    Args:
        optimizer: Any Optax transformation.
        params: Parameters: arrays or ``jax.ShapeDtypeStruct``.

    Returns:
        Key path -> plan, for each leaf of ``params``. Printing a plan gives a sentence.
        Under :func:`lowrank_optax.by_role` the sentence has the leaf's role.

    Raises:
        TypeError: If a leaf is neither an array nor a number.

    Example:
        >>> import jax.numpy as jnp, lowrank_optax
        >>> params = {"w": jnp.ones((64, 32)), "b": jnp.ones(32)}
        >>> plans = projections(lowrank_optax.galore(1e-2, rank=4), params)
        >>> print(plans["['w']"])
        ['w'] 64x32: (64 x 32), columns projected, 32 -> 4
        >>> print(plans["['b']"])
        ['b'] 32: full size, fewer than two axes
    """
    params = as_arrays(params)
    binding = bind(optimizer, params)
    plans = [plan for who in binding.transformations for plan in who.plans.values()]
    # If several transformations get a leaf, the plan that projects it counts.
    by_path = {plan.path: plan for plan in sorted(plans, key=lambda x: x.is_projected)}

    def plan_of(path, leaf):
        name = leaf_name(path)
        assigned = binding.roles.get(path)
        reason = "not given to a low-rank transformation"
        if assigned:
            is_frozen = assigned.role == "frozen"
            reason = "not trained" if is_frozen else "with another optimizer"
        plan = by_path.get(name, LeafPlan(name, tuple(leaf.shape), None, 0, reason))
        return dataclasses.replace(plan, role=str(assigned or ""))

    found = (plan_of(*leaf) for leaf in leaves_by_path(params).items())
    return {plan.path: plan for plan in found}

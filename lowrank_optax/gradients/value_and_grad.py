"""Gradients inside the subspaces: no full gradient of a projected leaf exists."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.binding.optimizer import bind
from lowrank_optax.binding.states import low_rank_states, slots_of
from lowrank_optax.due import is_due
from lowrank_optax.gradients.leaves import ProjectedLeaf
from lowrank_optax.gradients.program import evaluate
from lowrank_optax.gradients.traced import traced
from lowrank_optax.matrix.boxes import leaves_by_path
from lowrank_optax.parts import check_subspace_is_enough
from lowrank_optax.projected import Projected
from lowrank_optax.renewal import renewed_everywhere


class SubspaceValueAndGrad:
    """What :func:`subspace_value_and_grad` returns: a function, and more about it."""

    def __init__(self, function, optimizer, has_aux, full_gradients):
        self._function = function
        self._optimizer = optimizer
        self._has_aux = has_aux
        self._full_gradients = tuple(full_gradients)

    def __call__(self, params: Any, state: Any, *args: Any, **kwargs: Any):
        """Returns value, gradients and state; see :func:`subspace_value_and_grad`."""
        return self._evaluated(params, state, args, kwargs, draws=True)

    def _evaluated(
        self, params: Any, state: Any, args: tuple, kwargs: Any, draws: bool
    ):
        state, followed = self._prepared(params, state, draws)
        leaves, treedef = leaves_by_path(params).items(), jax.tree.structure(params)
        missing = set(self._full_gradients) - {
            jax.tree_util.keystr(p) for p, _ in leaves
        }
        if missing:
            raise ValueError(
                f"full_gradients has no leaf of the parameters: {', '.join(missing)}."
            )
        program, aux_of = traced(self._function, self._has_aux, params, args, kwargs)

        def merged(inside, outside):
            """Returns leaves in the order of the parameters, from two orders."""
            sources = iter(outside), iter(inside)
            return [next(sources[path in followed]) for path, _ in leaves]

        inside = [(followed[path], x) for path, x in leaves if path in followed]

        def of(coordinates, plain):
            arguments = merged(
                [
                    one.follow(leaf, found)
                    for (one, leaf), found in zip(inside, coordinates, strict=True)
                ],
                plain,
            )
            value, *others = evaluate(program, arguments)
            return value, others

        zeros = [one.zeros(leaf) for one, leaf in inside]
        plain = [leaf for path, leaf in leaves if path not in followed]
        gradient = jax.value_and_grad(of, argnums=(0, 1), has_aux=True)
        (value, aux), (narrow, full) = gradient(zeros, plain)
        narrow = [
            Projected(one.public(leaf, found))
            for (one, leaf), found in zip(inside, narrow, strict=True)
        ]
        gradients = treedef.unflatten(merged(narrow, full))
        aux = aux_of(aux)
        return ((value, aux) if self._has_aux else value), gradients, state

    def keeping(self, params: Any, state: Any, *args: Any, **kwargs: Any):
        """Returns the same without a renewal of random bases in the program.

        For steps on which none is due, beside ``update(..., refresh=False)``.
        """
        return self._evaluated(params, state, args, kwargs, draws=False)

    def full(self, params: Any, state: Any, *args: Any, **kwargs: Any):
        """Returns the same with full gradients: for updates on which a basis is due."""
        gradient = jax.value_and_grad(self._function, has_aux=self._has_aux)
        value, gradients = gradient(params, *args, **kwargs)
        return value, gradients, state

    def renewing(self, *paths: str) -> "SubspaceValueAndGrad":
        """Returns the same with full gradients of these leaves alone.

        For an update that renews the bases of few leaves at a time: their gradients are
        the only full ones then. Bases may wait for their turn, the first ones too: a
        leaf that has none yet does not move.

        Args:
            paths: Key paths, as :meth:`due` has them; none: no basis is renewed.
        """
        full_gradients = (*self._full_gradients, *paths)
        return SubspaceValueAndGrad(
            self._function, self._optimizer, self._has_aux, full_gradients
        )

    def refresh_due(self, params: Any, state: Any, ahead: int = 0) -> jax.Array:
        """Returns whether the next update needs full gradients to renew a basis.

        Args: as for :meth:`due`.

        Returns:
            bool, (): whether any leaf is due.
        """
        found = self.due(params, state, ahead).values()
        return functools.reduce(jnp.logical_or, found, jnp.zeros([], bool))

    def due(
        self, params: Any, state: Any, ahead: int = 0, *, drawn: bool = False
    ) -> dict[str, jax.Array]:
        """Returns for which leaves the next update needs the full gradient.

        Args:
            params: Parameters, or their shapes.
            state: Of the optimizer.
            ahead: Updates between this state and the one that is asked about. Exact for
                ``every``; ``on_convergence`` looks at the norms so far.
            drawn: List leaves with random bases too, which are renewed without one.

        Returns:
            Key path -> bool, (), whether a basis of its stack is due.
        """
        binding = bind(self._optimizer, params)
        due = {}
        for node in low_rank_states(state):
            if not slots_of(node):
                continue
            if binding.of(node).parts.is_random and not drawn:
                continue
            for path, slot in slots_of(node).items():
                later = slot._replace(age=slot.age + ahead)
                parts = binding.of(node).parts
                found = is_due(later, node.count + ahead, parts)
                due[jax.tree_util.keystr(path)] = jnp.any(found)
        return due

    def _prepared(self, params, state, draws: bool):
        """Returns the state with due random bases drawn, and projectors and bases."""
        binding = bind(self._optimizer, params)
        if draws:
            # A draw looks at no gradient.
            state = renewed_everywhere(
                params,
                state,
                params,
                binding,
                kept=lambda parts: not parts.is_random,
            )
        followed: dict[tuple, ProjectedLeaf] = {}
        for node in low_rank_states(state):
            slots = slots_of(node)
            if not slots:
                continue
            for path, projector in binding.projectors(params, node).items():
                if jax.tree_util.keystr(path) in self._full_gradients:
                    continue
                check_subspace_is_enough(projector.parts, path)
                if path in binding.shared:
                    raise ValueError(
                        f"{jax.tree_util.keystr(path)} is given to two low-rank "
                        "transformations, one of which takes it at full size; give "
                        "each its own leaves by optax.masked or optax.partition."
                    )
                followed[path] = ProjectedLeaf(projector, projector.basis(slots[path]))
        if not followed:
            raise ValueError(
                "no leaf of these parameters is projected by the optimizer; "
                "use jax.value_and_grad."
            )
        return state, followed


def subspace_value_and_grad(
    function: Callable[..., Any],
    optimizer: optax.GradientTransformation,
    has_aux: bool = False,
    full_gradients: tuple[str, ...] = (),
) -> SubspaceValueAndGrad:
    r"""As ``jax.value_and_grad``, but projected leaves get gradients in their subspace.

    For y = x W and a basis P of the columns of W, G P = x^T (dy P); for one of the rows
    P^T G = (x P)^T dy. G = x^T dy is not formed, in the program or in memory:
    T r (n + m) multiplications instead of T n m, x P is kept for the backward pass in
    the place of x, and over data-parallel devices (a + b) r numbers are reduced at
    most. ``optimizer.update`` takes the gradients as they are.

    The function is traced over the parameters, as by ``jax.jit``, and its program
    evaluated with other products: the model stays as it is. What else it is called with
    reaches it untouched, arrays, flags, functions, keys.

    Parameters are followed through casts, shardings, moves of their axes, pieces,
    concatenation, sums, products with a number or with a vector along one side, scans,
    checkpoints, conditionals and jitted functions, to products with one another or with
    activations (``dot_general``, ``ragged_dot``; a stack may be matched, free or summed
    over) and to lookups. What they are scaled by or added to gets its gradient too. A
    parameter that is used several times, or tied, gets the sum.

    Some uses form one array of full size in the backward pass and project it at once:
    norms and penalties, of what is computed entry by entry and reduced
    (d sum(W^2) / dW = 2 W); rows looked up, and activations that a parameter is added
    to, whose gradients exist in any case.

    Refused, by an error that names leaf, operation and ways out: products with what was
    computed entry by entry, as x @ tanh(W); functions of whole matrices, as
    convolutions and decompositions; reshapes across both sides; pieces of an axis that
    granularity divides; products with other matrices than ``dimension_numbers`` names;
    a parameter that a scan carries on or a conditional returns; one that enters
    ``shard_map`` or a function with a derivative of its own (``custom_vjp``).

    A basis is renewed from a full gradient: where :meth:`refresh_due` says so, call
    ``.full`` instead, which returns the same three things, in a step of its own. Random
    bases are renewed without one. An update with gradients in the subspace never renews
    a computed basis; being late by some updates does no harm::

        gradient = subspace_value_and_grad(loss_fn, optimizer)

        @jax.jit
        def step(params, state, batch):
            loss, grads, state = gradient(params, state, batch)
            updates, state = optimizer.update(grads, state, params, refresh=False)
            return optax.apply_updates(params, updates), state, loss

        # gradient.full(params, state, batch) and refresh=True: refresh_step
        due = jax.jit(gradient.refresh_due)
        for batch in batches:
            run = refresh_step if due(params, state) else step
            params, state, loss = run(params, state, batch)

    That step holds the full gradients of all leaves; where memory is short, give each
    leaf a step of its own by :meth:`~SubspaceValueAndGrad.renewing`, on one of the
    updates on which it is :meth:`~SubspaceValueAndGrad.due`.

    Norms, and clipping by them, see the projected gradients: at most the full ones for
    orthonormal bases. Sums over the batch are in float32 at least; P is rounded to the
    dtype of what it multiplies. Reverse mode only.

    Args:
        function: (params, \*args, \*\*kwargs) -> scalar, or (scalar, aux).
        optimizer: Any Optax transformation with low-rank ones inside.
        has_aux: Whether the function returns aux too.
        full_gradients: Key paths, as ``jax.tree_util.keystr`` writes them, of projected
            leaves that get full gradients: those of refused uses.

    Returns:
        (params, state, \*args, \*\*kwargs) -> (value, gradients, state). Value is
        (scalar, aux) with ``has_aux``; gradients are a tree like the parameters with
        :class:`lowrank_optax.Projected`, (*stack, a*c, r), for projected leaves; state
        has the random bases drawn anew that were due, and is the one to update.

    Raises:
        ValueError: When called: if nothing is projected, the state was made for other
            parameters, or a projected parameter is used where its gradient cannot be
            computed in the subspace: the message names the leaf and the operation.

    Example:
        >>> import lowrank_optax
        >>> params = {"w": jnp.ones((64, 16)), "b": jnp.ones(16)}
        >>> optimizer = lowrank_optax.galore(1e-2, rank=2)
        >>> gradient = subspace_value_and_grad(
        ...     lambda p, x: jnp.mean((x @ p["w"] + p["b"]) ** 2), optimizer
        ... )
        >>> _, grads, _ = gradient(params, optimizer.init(params), jnp.ones((8, 64)))
        >>> grads["w"].coordinates.shape, grads["b"].shape
        ((64, 2), (16,))
    """
    return SubspaceValueAndGrad(function, optimizer, has_aux, full_gradients)

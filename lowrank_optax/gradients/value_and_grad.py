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
    """The function that :func:`subspace_value_and_grad` returns, and its variants."""

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
                f"full_gradients names {', '.join(missing)}, which the parameters lack."
            )
        program, aux_of = traced(self._function, self._has_aux, params, args, kwargs)

        def merged(inside, outside):
            """Returns the leaves of two lists in the order of the parameters."""
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
        """Returns the same from a program that does not renew random bases.

        Use it beside ``update(..., refresh=False)``, on steps where no basis is due.
        """
        return self._evaluated(params, state, args, kwargs, draws=False)

    def full(self, params: Any, state: Any, *args: Any, **kwargs: Any):
        """Returns the same with full gradients, for an update that renews bases."""
        gradient = jax.value_and_grad(self._function, has_aux=self._has_aux)
        value, gradients = gradient(params, *args, **kwargs)
        return value, gradients, state

    def renewing(self, *paths: str) -> "SubspaceValueAndGrad":
        """Returns the same function with full gradients of the named leaves alone.

        Use it for an update that renews the bases of a few leaves: no other leaf then
        has a full gradient. A basis may wait for its turn, even the first basis of a
        leaf. A leaf without a basis does not move.

        Args:
            paths: Key paths, as :meth:`due` returns them. Without paths, the update
                renews no basis.
        """
        full_gradients = (*self._full_gradients, *paths)
        return SubspaceValueAndGrad(
            self._function, self._optimizer, self._has_aux, full_gradients
        )

    def refresh_due(self, params: Any, state: Any, ahead: int = 0) -> jax.Array:
        """Returns whether the next update needs full gradients to renew a basis.

        Args: as for :meth:`due`.

        Returns:
            bool, (): whether the basis of any leaf is due.
        """
        found = self.due(params, state, ahead).values()
        return functools.reduce(jnp.logical_or, found, jnp.zeros([], bool))

    def due(
        self, params: Any, state: Any, ahead: int = 0, *, drawn: bool = False
    ) -> dict[str, jax.Array]:
        """Returns, for each leaf, whether the next update needs its full gradient.

        Args:
            params: Parameters, or their shapes.
            state: State of the optimizer.
            ahead: Updates between this state and the update in question. The answer is
                exact for ``every``; ``on_convergence`` knows only the norms so far.
            drawn: Whether to list leaves with random bases too. The renewal of a random
                basis needs no full gradient.

        Returns:
            Key path -> bool, (): whether a basis of the leaf's stack is due.
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
        """Returns the state with due random bases drawn, and the projected leaves."""
        binding = bind(self._optimizer, params)
        if draws:
            # A draw needs no gradient: the parameters take the place of gradients.
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
                        "transformations, and one of them takes its full gradient; "
                        "give each its own leaves by optax.masked or optax.partition."
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

    Take y = x W with T rows, the gradient dy of y, and the gradient G = x^T dy of W
    (n, m). For a basis P of the columns of W, G P = x^T (dy P). For a basis P of the
    rows, P^T G = (x P)^T dy. The program never forms G: T r (n + m) multiplications
    take the place of T n m. For a basis of the rows the backward pass keeps x P in the
    place of x. Data-parallel devices reduce (a + b) r numbers at most.
    ``optimizer.update`` takes the projected gradients as they are.

    The function is traced over the parameters, as ``jax.jit`` does, and the traced
    program is evaluated with other products. The model stays as it is. All other
    arguments reach the function untouched: arrays, flags, functions, random keys.

    Each parameter is followed through the program to its products and lookups. On the
    way there may be casts, shardings, moves of axes, slices, concatenation, sums,
    scans, checkpoints, conditionals, jitted functions, and products with a number or
    with a vector along one side. The products may be with another parameter or with
    activations (``dot_general``, ``ragged_dot``). A stack axis may be a batch axis, a
    free axis or summed over. An array that scales a parameter gets its gradient too,
    and so does an added array. A parameter with several uses (tied, for instance) gets
    the sum of the gradients.

    Some uses form one array of full size in the backward pass and project it at once:

    - norms and penalties, which reduce a function of each entry, as in
      d sum(W^2) / dW = 2 W;
    - looked-up rows, and activations plus a parameter: these gradients exist anyway.

    Other uses raise an error. The error names the leaf, the operation and ways out:

    - a product with a function of each entry, as x @ tanh(W);
    - a function of a whole matrix, as a convolution or a decomposition;
    - a reshape across both sides of a matrix;
    - a slice of an axis that granularity divides;
    - a product with matrices other than those of ``dimension_numbers``;
    - a scan with a parameter as carry, or a conditional with a parameter as result;
    - ``shard_map``, and functions with a derivative of their own (``custom_vjp``).

    A computed basis is renewed from a full gradient. Where :meth:`refresh_due` is true,
    call ``.full``, in a step of its own; it returns the same three values. A random
    basis needs no full gradient. An update with projected gradients never renews a
    computed basis; a renewal that is some updates late does no harm::

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

    The refresh step holds the full gradients of all leaves. Where memory is short,
    renew each leaf in a step of its own by :meth:`~SubspaceValueAndGrad.renewing`, on
    an update for which :meth:`~SubspaceValueAndGrad.due` names the leaf.

    Norms, and clipping by norms, see the projected gradients. For orthonormal bases
    these norms are at most those of the full gradients. Sums over the batch are in
    float32 or wider. P is rounded to the dtype of the array that it multiplies. Reverse
    mode only.

    Args:
        function: (params, \*args, \*\*kwargs) -> scalar, or (scalar, aux).
        optimizer: Any Optax transformation that contains low-rank transformations.
        has_aux: Whether the function returns aux too.
        full_gradients: Key paths, as ``jax.tree_util.keystr`` writes them, of projected
            leaves that get full gradients. List leaves here if their uses raise errors.

    Returns:
        A function (params, state, \*args, \*\*kwargs) -> (value, gradients, state).
        ``value`` is (scalar, aux) with ``has_aux``. ``gradients`` is a tree like the
        parameters; a projected leaf has a :class:`lowrank_optax.Projected` of shape
        (*stack, a*c, r). ``state`` holds new random bases where they were due: give
        this state to ``update``.

    Raises:
        ValueError: When called, if no leaf is projected, if the state was made for
            other parameters, or if an operation has no projected gradient. The message
            names the leaf and the operation.

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

"""The function of value, gradients inside subspaces and state, and its variants."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lowrank_optax.binding.optimizer import bind
from lowrank_optax.binding.states import low_rank_states, slots_of
from lowrank_optax.due import due_by_path
from lowrank_optax.gradients.evaluation import evaluated
from lowrank_optax.gradients.leaves import ProjectedLeaf
from lowrank_optax.matrix.arrays import leaf_name
from lowrank_optax.matrix.boxes import leaves_by_path, unboxed
from lowrank_optax.matrix.sharding import with_automatic_axes
from lowrank_optax.parts import check_subspace_is_enough
from lowrank_optax.projected import Projected, Sketch
from lowrank_optax.renewal import renewed_everywhere
from lowrank_optax.sketch import omegas_of
from lowrank_optax.subspace import Projector, Subspace


class SubspaceValueAndGrad:
    """The function that :func:`subspace_value_and_grad` returns, and its variants."""

    def __init__(self, function, optimizer, has_aux, full_gradients):
        self._function = function
        self._optimizer = optimizer
        self._has_aux = has_aux
        self._full_gradients = tuple(full_gradients)

    def __call__(self, params: Any, state: Any, *args: Any, **kwargs: Any):
        """Returns value, gradients and state; see :func:`subspace_value_and_grad`."""
        return self._evaluated(params, state, args, kwargs)[:3]

    def keeping(self, params: Any, state: Any, *args: Any, **kwargs: Any):
        """Returns the same from a program that does not renew random bases.

        Use it beside ``update(..., refresh=False)``, on steps where no basis is due.
        """
        return self._evaluated(params, state, args, kwargs, draws=False)[:3]

    def full(self, params: Any, state: Any, *args: Any, **kwargs: Any):
        """Returns the same with full gradients, for an update that renews bases."""
        gradient = jax.value_and_grad(self._function, has_aux=self._has_aux)
        value, gradients = gradient(params, *args, **kwargs)
        return value, gradients, state

    def sketching(
        self, *paths: str, oversample: int | None = None
    ) -> Callable[..., tuple[Any, Any, Any, dict[str, Sketch]]]:
        r"""Returns a function that gives sketches of the full gradients too.

        The function is (params, state, \*args, \*\*kwargs) -> (value, gradients,
        state, sketches). From the gradient A (a*c, b/c) of a projected leaf it computes
        the coordinates A P and the sketch

        .. math:: Y = \Omega^\top A, \quad E\,[Y^\top Y] = A^\top A

        with a random test matrix Omega (a*c, k), one for all leaves with as many rows.
        As for the coordinates, A is never formed: T k (n + m) multiplications for a
        product with T rows. The coordinates and Y are in float32 or wider.
        :meth:`renewed` makes bases of sketches, after the update::

            sketching = gradient.sketching()

            def renewing_step(params, state, batch):
                loss, grads, state, sketches = sketching(params, state, batch)
                updates, state = optimizer.update(grads, state, params, refresh=False)
                state = gradient.renewed(params, state, sketches)
                return optax.apply_updates(params, updates), state, loss

        The new basis serves from the next update on: run this step where ``due(params,
        state, ahead=1)`` names a leaf, and at first. Omega stays the same up to the
        renewal, so that sketches of several micro-batches may be added up.

        Args:
            paths: Key paths of leaves with computed bases; without paths: of all.
            oversample: Rows of Y beyond the columns of the basis, k - r; None: r.

        Raises:
            ValueError: When called, if a path names no such leaf, or if a basis rule
                follows each full gradient (``power_iteration``).

        References:
            Halko, Martinsson, Tropp, `Finding structure with randomness
            <https://arxiv.org/abs/0909.4061>`_, 2011, Section 4.6 for such an Omega.
            Computing Y in the reverse pass of a product is ours.
        """

        def sketching(params: Any, state: Any, *args: Any, **kwargs: Any):
            wanted = _Wanted(paths, oversample)
            return self._evaluated(params, state, args, kwargs, wanted=wanted)

        return sketching

    def renewed(self, params: Any, state: Any, sketches: Mapping[str, Sketch]) -> Any:
        """Returns the state with bases of sketches where a basis is due.

        Args:
            params: Parameters, or their shapes.
            state: State behind an update.
            sketches: From :meth:`sketching`, or sums of several of these.
        """
        binding = bind(self._optimizer, params)

        def stand_in(path, _):
            return sketches.get(leaf_name(path), Projected(None))

        def renewed(gradients, state):
            return renewed_everywhere(
                gradients, state, params, binding, kept=lambda parts: parts.is_random
            )

        gradients = jax.tree_util.tree_map_with_path(stand_in, unboxed(params))
        return with_automatic_axes(renewed, state, gradients, state)

    def refresh_due(self, params: Any, state: Any, ahead: int = 0) -> jax.Array:
        """Returns whether the next update has to renew a computed basis.

        Args: as for :meth:`due`.

        Returns:
            bool, (): whether the basis of any leaf is due.
        """
        found = self.due(params, state, ahead).values()
        return functools.reduce(jnp.logical_or, found, jnp.zeros([], bool))

    def due(
        self, params: Any, state: Any, ahead: int = 0, *, drawn: bool = False
    ) -> dict[str, jax.Array]:
        """Returns, for each leaf, whether the next update has to renew its basis.

        Args:
            params: Parameters, or their shapes.
            state: State of the optimizer.
            ahead: Updates between this state and the update in question. The answer is
                exact for ``every``; ``on_convergence`` knows only the norms so far.
            drawn: Whether to list leaves with random bases too. The renewal of a random
                basis needs neither a gradient nor a sketch.

        Returns:
            Key path -> bool, (): whether a basis of the leaf's stack is due.
        """
        return due_by_path(bind(self._optimizer, params), state, ahead, drawn=drawn)

    def _evaluated(self, params, state, args, kwargs, draws=True, wanted=None):
        state, leaves = self._prepared(params, state, draws, wanted)
        found = evaluated(self._function, self._has_aux, leaves, params, args, kwargs)
        return found.value, found.gradients, state, found.sketches

    def _prepared(self, params, state, draws: bool, wanted: "_Wanted | None"):
        """Returns the state with due random bases drawn, and the projected leaves."""
        known = leaves_by_path(params)
        named = self._full_gradients
        _check_paths("full_gradients", named, known, "the parameters lack")
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
        leaves: dict[tuple, ProjectedLeaf] = {}
        for node in low_rank_states(state):
            slots = slots_of(node)
            if not slots:
                continue
            projectors = binding.projectors(params, node)
            omegas = {} if wanted is None else wanted.omegas(projectors, slots)
            for path, projector in projectors.items():
                if leaf_name(path) in self._full_gradients:
                    continue
                check_subspace_is_enough(projector.parts, path)
                if path in binding.shared:
                    raise ValueError(
                        f"{leaf_name(path)} is given to two low-rank "
                        "transformations, and one of them takes its full gradient; "
                        "give each its own leaves by optax.masked or optax.partition."
                    )
                basis = projector.basis(slots[path])
                leaves[path] = ProjectedLeaf(projector, basis, omegas.get(path))
        if not leaves:
            raise ValueError(
                "no leaf of these parameters is projected by the optimizer; "
                "use jax.value_and_grad."
            )
        if wanted is not None:
            computed = (x for x in leaves if not leaves[x].projector.parts.is_random)
            _check_paths("sketching", wanted.paths, computed, "have no computed basis")
        return state, leaves


class _Wanted(NamedTuple):
    """The sketches that are wanted: of which leaves (none named: of all), how wide."""

    paths: tuple[str, ...]
    oversample: int | None

    def omegas(
        self, projectors: Mapping[tuple, Projector], slots: Mapping[tuple, Subspace]
    ) -> dict[tuple, jax.Array]:
        """Returns test matrices of a transformation's leaves with wanted sketches."""
        found = {}
        for path, projector in projectors.items():
            name = leaf_name(path)
            is_named = name in self.paths or not self.paths
            if not is_named or projector.parts.is_random:
                continue
            if projector.parts.follows_each_gradient:
                raise ValueError(
                    f"{name}: power_iteration blends each full gradient with the "
                    "momentum, and no sketch holds that; use jax.value_and_grad."
                )
            found[path] = projector
        return omegas_of(found, slots, self.oversample)


def _check_paths(
    what: str, named: Iterable[str], known: Iterable[tuple], why: str
) -> None:
    """Raises ValueError if a key path is not among the known ones."""
    missing = set(named) - set(map(jax.tree_util.keystr, known))
    if missing:
        raise ValueError(f"{what} names {', '.join(sorted(missing))}, which {why}.")

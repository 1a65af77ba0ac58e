"""Orthogonalized momentum in a subspace: SUMO, and Muon with its momentum in one."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.alias import Mask, as_optimizer
from lowrank_optax.bases import BasisRule, range_finder
from lowrank_optax.low_rank import (
    InsideSubspace,
    low_rank_transformation,
    make_parts,
    scale_by_low_rank,
)
from lowrank_optax.matrices import DimensionNumbers
from lowrank_optax.ranks import RankRule
from lowrank_optax.rebase import RebaseRule
from lowrank_optax.refresh import RefreshRule, every


def sumo(
    learning_rate: optax.ScalarOrSchedule,
    rank: int | RankRule = 128,
    beta: jax.typing.ArrayLike = 0.95,
    weight_decay: jax.typing.ArrayLike = 0.0,
    mask: Mask | None = None,
    *,
    nesterov: bool = True,
    ns_steps: int = 5,
    rms: jax.typing.ArrayLike = 0.2,
    basis: BasisRule | None = None,
    refresh: RefreshRule | None = None,
    rebase: str | RebaseRule = "square",
    dimension_numbers: DimensionNumbers | None = None,
    seed: jax.typing.ArrayLike = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""SUMO: Muon inside a subspace, the momentum orthogonalized there.

    ``scale_by_low_rank`` around ``optax.contrib.scale_by_muon``. For a gradient matrix
    oriented to (a, b), b its short side, and R_t = G_t P:

    .. math::
        M_t = \beta M_{t-1} + (1 - \beta) R_t, \quad
        U_t = 0.2 \sqrt{a} \; \mathrm{orth}(\hat M_t) P^\top

    with orth(U S V^T) = U V^T and M^ the momentum with its bias corrected, and with
    Nesterov's step. sqrt(a) is sqrt(max(n, m)), so that 0.2 is the root mean square of
    an update of full rank. One moment and the basis: (a + b) r numbers, float32, where
    Adam in the subspace has (2 a + b) r and AdamW 2 a b. Leaves at full size have Muon
    on their last two axes, whatever ``dimension_numbers`` says of them; vectors have
    Adam with the same learning rate. Embedding, head and stacks of vectors (norms of
    scanned layers) want another optimizer: ``optax.partition``.

    Args:
        learning_rate: Step size, or a schedule of it by update.
        rank: Columns r of the bases, >= 1, or a rule.
        beta: Decay of the momentum, in [0, 1).
        weight_decay: Decoupled decay of the parameters, times the learning rate; >= 0.
        mask: Which leaves decay: a tree of bools, or a function from the parameters to
            one. None: all.
        nesterov: Whether the gradient counts once more in what is orthogonalized.
        ns_steps: Newton-Schulz iterations, >= 1; singular values come to 0.7 ... 1.2
            in 5.
        rms: Root mean square of an update of full rank, in [0, 1).
        basis: Basis rule; None: ``range_finder(power_iterations=1)``.
        refresh: Refresh rule; None: ``every(200)``.
        rebase: Re-basing rule or its name; of the momentum, which follows exactly.
        dimension_numbers: See :func:`scale_by_low_rank`.
        seed: Seed of the random sketches.

    Returns:
        An optimizer; its ``update`` needs ``params``, for the weight decay.

    Raises:
        ValueError: If a value is out of its range.

    Example:
        >>> import jax.numpy as jnp
        >>> state = sumo(1e-3, rank=4).init({"w": jnp.ones((64, 16))})
        >>> [x.shape for x in jax.tree.leaves(state) if x.ndim == 2]
        [(16, 4), (64, 4)]

    References:
        Refael et al., `SUMO <https://arxiv.org/abs/2505.24749>`_, 2025. An exact SVD
        orthogonalizes there, Newton-Schulz here; the norm-growth limiter and its
        factor on the update are not here; Nesterov's step is not there.
    """
    _check(beta, rms, ns_steps)
    inner = _by_kind(
        matrix=optax.chain(
            optax.contrib.scale_by_muon(
                beta=beta,
                nesterov=nesterov,
                ns_steps=ns_steps,
                weight_dimension_numbers=_last_two_axes,
            ),
            optax.stateless(lambda tree, _: _scaled_by_side(tree, rms)),
        )
    )
    return as_optimizer(
        scale_by_low_rank(
            inner,
            rank,
            basis=range_finder(power_iterations=1) if basis is None else basis,
            refresh=every(200) if refresh is None else refresh,
            rebase=rebase,
            dimension_numbers=dimension_numbers,
            seed=seed,
        ),
        learning_rate,
        weight_decay,
        mask,
    )


def low_rank_muon(
    learning_rate: optax.ScalarOrSchedule,
    rank: int | RankRule = 128,
    beta: jax.typing.ArrayLike = 0.95,
    weight_decay: jax.typing.ArrayLike = 0.0,
    mask: Mask | None = None,
    *,
    residual: jax.typing.ArrayLike = 4.0,
    nesterov: bool = True,
    ns_steps: int = 5,
    rms: jax.typing.ArrayLike = 0.2,
    basis: BasisRule | None = None,
    refresh: RefreshRule | None = None,
    rebase: str | RebaseRule = "square",
    dimension_numbers: DimensionNumbers | None = None,
    seed: jax.typing.ArrayLike = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Muon with its momentum in a subspace, and the last gradient outside of it.

    For a gradient matrix G_t (n, m), its short side b and its long one a, R_t the
    projection of G_t onto the basis P (b, r), written for b = m:

    .. math::
        M_t = \beta M_{t-1} + R_t, \quad N_t = R_t + \beta M_t, \quad
        U_t = 0.2 \sqrt{a} \; \mathrm{orth}(N_t P^\top + \phi (G_t - R_t P^\top))

    with orth(U S V^T) = U V^T and phi = ``residual``: along the directions of the basis
    the momentum is that of many steps, along the others it is the last gradient, phi
    times. Both are orthogonalized together, so that every direction gets a step of the
    same size; phi decides from which singular value on. With phi = 1 + beta it is Muon
    (Nesterov's) that forgets its momentum outside the subspace at every step.

    State: that of :func:`sumo`, (a + b) r numbers, float32. Cost: Muon's
    orthogonalization at full size, and 4 a b r flops. Needs the full gradient at every
    update: no subspace gradients, and ``accumulate`` adds up full ones. Leaves at full
    size as for :func:`sumo`.

    Args:
        learning_rate: Step size, or a schedule of it by update.
        rank: Columns r of the bases, >= 1, or a rule.
        beta: Decay of the momentum, in [0, 1).
        weight_decay: Decoupled decay of the parameters, times the learning rate; >= 0.
        mask: Which leaves decay: a tree of bools, or a function from the parameters to
            one. None: all.
        residual: Weight phi of the residual G - R P^T, where one gradient weighs
            1 + beta inside the subspace; >= 0. 0: nothing leaves the subspace, as in
            :func:`sumo`, which is cheaper then. 3 to 6 were alike (``RESULTS.md``).
        nesterov: Whether the gradient counts once more in what is orthogonalized.
        ns_steps: Newton-Schulz iterations, >= 1; singular values come to 0.7 ... 1.2
            in 5, those under 1/500 of the norm to less.
        rms: Root mean square of an update of full rank, in [0, 1).
        basis: Basis rule; None: ``range_finder(power_iterations=1)``.
        refresh: Refresh rule; None: ``every(200)``.
        rebase: Re-basing rule or its name; of the momentum, which follows exactly.
        dimension_numbers: See :func:`scale_by_low_rank`.
        seed: Seed of the random sketches.

    Returns:
        An optimizer; its ``update`` needs ``params``, for the weight decay.

    Raises:
        ValueError: If a value is out of its range.

    Example:
        >>> state = low_rank_muon(1e-3, rank=4).init({"w": jnp.ones((64, 16))})
        >>> [x.shape for x in jax.tree.leaves(state) if x.ndim == 2]
        [(16, 4), (64, 4)]

    References:
        Of this library. Jordan, `Muon <https://kellerjordan.github.io/posts/muon/>`_,
        2024, for the update; Refael et al., `SUMO <https://arxiv.org/abs/2505.24749>`_,
        2025, for the momentum in the subspace of a gradient; Chen et al., `Fira
        <https://arxiv.org/abs/2410.01623>`_, 2024, adds what the subspace does not
        hold, scaled by row, to Adam's update.
    """
    _check(beta, rms, ns_steps)
    if isinstance(residual, (int, float)) and not residual >= 0:
        raise ValueError(f"residual must be >= 0, got {residual}.")
    trace = optax.trace(beta, nesterov=nesterov)
    inner = optax.with_extra_args_support(_by_kind(matrix=trace))

    def finish(matrices: jax.Array) -> jax.Array:
        # With a decay of 0 its momentum is what it is given: nothing to keep.
        muon = optax.contrib.scale_by_muon(
            beta=0.0,
            nesterov=False,
            ns_steps=ns_steps,
            weight_dimension_numbers=_last_two_axes,
        )
        update, _ = muon.update(matrices, muon.init(matrices))
        return _scaled_by_side(update, rms)

    core = BesideSubspace(InsideSubspace(inner, 1.0), residual, finish)
    parts = make_parts(
        rank=rank,
        basis=range_finder(power_iterations=1) if basis is None else basis,
        refresh=every(200) if refresh is None else refresh,
        rebase=rebase,
        side="short",
        granularity=1,
        dimension_numbers=dimension_numbers,
        moments=None,
        seed=seed,
        needs_full_gradients=True,
    )
    transformation = low_rank_transformation(core, parts)
    return as_optimizer(transformation, learning_rate, weight_decay, mask)


class BesideSubspace(NamedTuple):
    """A core: what ``inside`` makes of projections, and the gradients beside them.

    With R = G P and N what ``inside`` makes of it,

        U = finish(N P^T + residual (G - R P^T))

    matrix by matrix; leaves at full size get finish(N), their vectors N.

    Attributes:
        inside: Transformation of the projected gradients.
        residual: >= 0.
        finish: (*stack, n, m) -> the same.
    """

    inside: InsideSubspace
    residual: jax.typing.ArrayLike
    finish: Callable[[jax.Array], jax.Array]

    def init(self, params, coordinates, projectors):
        """Returns the state; see :class:`lowrank_optax.low_rank.Core`."""
        return self.inside.init(params, coordinates, projectors)

    def check(self, coordinates, state):
        """Raises if ``inner`` needs parameters; see ``lowrank_optax.low_rank.Core``."""
        self.inside.check(coordinates, state)

    def update(
        self, gradients, coordinates, state, bases, projectors, count, extra_args
    ):
        """Returns the updates; see :class:`lowrank_optax.low_rank.Core`."""
        del count
        updates, state = self.inside.inner.update(
            coordinates, state, None, **extra_args
        )

        def whole(path, update, gradient, r):
            if path not in projectors:
                return self.finish(update) if update.ndim > 1 else update
            view, dtype = projectors[path].view, projectors[path].dtype
            residual = jnp.asarray(self.residual, dtype)
            # One lift for both: N P^T - residual R P^T.
            narrow = update.astype(dtype) - residual * r.astype(dtype)
            full = view.lift(narrow, bases[path]) + residual * gradient.astype(dtype)
            return view.leaf(self.finish(view.matrices(full)))

        updates = jax.tree_util.tree_map_with_path(
            whole, updates, gradients, coordinates
        )
        return updates, state


def _check(beta, rms, ns_steps) -> None:
    for name, value in (("beta", beta), ("rms", rms)):
        if isinstance(value, (int, float)) and not 0 <= value < 1:
            raise ValueError(f"{name} must be inside [0, 1), got {value}.")
    is_traced = isinstance(ns_steps, jax.Array)
    if not is_traced and not (isinstance(ns_steps, int) and ns_steps >= 1):
        raise ValueError(f"ns_steps must be an int >= 1, got {ns_steps!r}.")


def _by_kind(
    matrix: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Returns ``matrix`` for matrices and their stacks, Adam for vectors."""
    return optax.partition(
        {"matrix": matrix, "vector": optax.scale_by_adam()},
        functools.partial(
            jax.tree.map, lambda leaf: "matrix" if leaf.ndim > 1 else "vector"
        ),
    )


def _last_two_axes(tree: Any) -> Any:
    """Returns Muon's dimension numbers of stacks of matrices."""
    numbers = optax.contrib.MuonDimensionNumbers(-2, -1)
    return jax.tree.map(lambda leaf: numbers, tree)


def _scaled_by_side(tree: Any, rms: jax.typing.ArrayLike) -> Any:
    """Returns orthogonal matrices scaled to the root mean square of full rank.

    The kept side, the longer one, is there in the subspace too.
    """
    return jax.tree.map(lambda x: x * (rms * max(x.shape[-2:]) ** 0.5), tree)

"""What becomes of the residual: of E = G - R P^T, which the subspace does not hold.

===============  ==============================  ============================  =======
residual         update                          method                        state
===============  ==============================  ============================  =======
dropped          N P^T                           GaLore, AdaRankGrad, SUMO     none
scaled           N P^T + limited(phi E)          Fira                          a number
sign             N P^T + w sign(E)               FRUGAL                        none
normalized       N P^T + w E_j / ||E_j||         SCALE, beside a subspace      none
orthogonalized   orth(N P^T + w E)               low_rank_muon                 none
===============  ==============================  ============================  =======

with R = G P, N what the inner transformation makes of it, and a number a matrix. All
but the first look at the full gradient at every update.
"""

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.matrix.sharding import stack_axes, zeros_beside
from lowrank_optax.matrix.view import MatrixView


@dataclasses.dataclass(frozen=True)
class Pieces:
    """What an update of one projected leaf is made of.

    Attributes:
        view: The leaf as matrices.
        gradient: G, in the leaf's shape; None, if it came projected.
        coordinates: R; (*stack, a*c, r).
        narrow: N; (*stack, a*c, r).
        basis: P; (*stack, b/c, r), whose dtype is that of the computation.
        scale: Factor on the update.
    """

    view: MatrixView
    gradient: jax.Array | None
    coordinates: jax.Array
    narrow: jax.Array
    basis: jax.Array
    scale: jax.typing.ArrayLike

    def scaled(self, array: jax.Array) -> jax.Array:
        """Returns an array times the scale, which a plain 1 leaves as it is."""
        if isinstance(self.scale, (int, float)) and self.scale == 1:
            return array
        return array * jnp.asarray(self.scale, array.dtype)

    def beside(self, inside: jax.Array, weight: jax.typing.ArrayLike) -> jax.Array:
        """Returns (inside) P^T + weight E in the leaf's shape, by one lift.

        Args:
            inside: (*stack, a*c, r).
            weight: Of the residual.
        """
        assert self.gradient is not None
        dtype = self.basis.dtype
        weight = jnp.asarray(weight, dtype)
        both = inside.astype(dtype) - weight * self.coordinates.astype(dtype)
        whole = self.view.lift(both, self.basis)
        return whole + weight * self.gradient.astype(dtype)

    def residual(self) -> jax.Array:
        """Returns E = G - R P^T in the leaf's shape."""
        return self.beside(jnp.zeros_like(self.coordinates), 1)


class ResidualRule(Protocol):
    """What ``scale_by_low_rank`` asks of a residual."""

    @property
    def needs_full_gradients(self) -> bool:
        """Whether gradients inside the subspace do not do."""
        ...

    def init(self, view: MatrixView, leaf: Any) -> Any:
        """Returns the rule's own state of one leaf: a pytree, () for most.

        Args:
            view: The leaf as matrices.
            leaf: The parameter; only its sharding counts.
        """
        ...

    def update(self, pieces: Pieces, state: Any) -> tuple[jax.Array, Any]:
        """Returns the update of a projected leaf, in its shape, and the new state."""
        ...

    def at_full_size(self, update: jax.Array) -> jax.Array:
        """Returns the update of a leaf that is not projected: R = G and E = 0 there."""
        ...


@dataclasses.dataclass(frozen=True)
class _Stateless:
    """What most rules have in common."""

    @property
    def needs_full_gradients(self) -> bool:
        """Returns True; see :class:`ResidualRule`."""
        return True

    def init(self, view: MatrixView, leaf: Any) -> tuple[()]:
        """Returns no state; see :class:`ResidualRule`."""
        del view, leaf
        return ()

    def at_full_size(self, update: jax.Array) -> jax.Array:
        """Returns the update as it is; see :class:`ResidualRule`."""
        return update


@dataclasses.dataclass(frozen=True)
class Dropped(_Stateless):
    """The update is N P^T: what is not in the subspace does nothing."""

    @property
    def needs_full_gradients(self) -> bool:
        """Returns False; see :class:`ResidualRule`."""
        return False

    def update(self, pieces: Pieces, state: tuple[()]) -> tuple[jax.Array, tuple[()]]:
        """Returns scale N P^T; see :class:`ResidualRule`."""
        # The scale goes on the small factor.
        narrow = pieces.scaled(pieces.narrow.astype(pieces.basis.dtype))
        return pieces.view.lift(narrow, pieces.basis), state


@dataclasses.dataclass(frozen=True)
class Sign(_Stateless):
    """See :func:`sign_residual`."""

    weight: jax.typing.ArrayLike

    def update(self, pieces: Pieces, state: tuple[()]) -> tuple[jax.Array, tuple[()]]:
        """Returns scale (N P^T + w sign(E)); see :class:`ResidualRule`."""
        signs = jnp.sign(pieces.residual())
        return _added(pieces, self.weight * signs), state


def sign_residual(weight: jax.typing.ArrayLike = 1.0) -> Sign:
    """The signs of what the subspace does not hold, as FRUGAL adds them.

    U = scale (N P^T + weight sign(G - R P^T)). No state. Needs the full gradient at
    every update: no subspace gradients, and ``accumulate`` adds up full ones.

    Args:
        weight: Step of each entry, where Adam's is about 1; >= 0.

    Raises:
        ValueError: If ``weight`` is negative.

    References:
        Zmushko et al., `FRUGAL <https://arxiv.org/abs/2411.07837>`_, 2024: there the
        subspace may be made of whole blocks, and the two parts have learning rates of
        their own, whose ratio is ``weight`` here.
    """
    _check_weight("weight", weight)
    return Sign(weight)


@dataclasses.dataclass(frozen=True)
class Normalized(_Stateless):
    """See :func:`normalized_residual`."""

    weight: jax.typing.ArrayLike

    def update(self, pieces: Pieces, state: tuple[()]) -> tuple[jax.Array, tuple[()]]:
        """Returns scale (N P^T + w E_j / ||E_j||); see :class:`ResidualRule`."""
        view = pieces.view
        matrices = view.matrices(pieces.residual())
        norms = jnp.linalg.norm(matrices, axis=-2, keepdims=True)
        unit = matrices / jnp.where(norms > 0, norms, 1)
        return _added(pieces, self.weight * view.leaf(unit)), state


def normalized_residual(weight: jax.typing.ArrayLike = 1.0) -> Normalized:
    """What the subspace does not hold, each output's column at length one.

    U = scale (N P^T + weight E_j / ||E_j||) with E = G - R P^T (n, m) and j over its m
    columns, the outputs of a kernel; a column of zeros stays zero. No state. Needs the
    full gradient at every update.

    Args:
        weight: Length of each column; >= 0.

    Raises:
        ValueError: If ``weight`` is negative.

    References:
        Glentis et al., `SCALE <https://arxiv.org/abs/2506.16659>`_, 2025, which
        normalizes the columns of the whole gradient and has no subspace.
    """
    _check_weight("weight", weight)
    return Normalized(weight)


@dataclasses.dataclass(frozen=True)
class Orthogonalized(_Stateless):
    """See :func:`orthogonalized_residual`."""

    weight: jax.typing.ArrayLike
    ns_steps: jax.typing.ArrayLike
    rms: jax.typing.ArrayLike

    def update(self, pieces: Pieces, state: tuple[()]) -> tuple[jax.Array, tuple[()]]:
        """Returns scale orth(N P^T + w E); see :class:`ResidualRule`."""
        view = pieces.view
        whole = view.matrices(pieces.beside(pieces.narrow, self.weight))
        return pieces.scaled(view.leaf(self._orthogonal(whole))), state

    def at_full_size(self, update: jax.Array) -> jax.Array:
        """Returns the orthogonal factor of matrices; vectors as they are."""
        return self._orthogonal(update) if update.ndim > 1 else update

    def _orthogonal(self, matrices: jax.Array) -> jax.Array:
        # With a decay of 0 Muon's momentum is what it is given: nothing to keep.
        muon = optax.contrib.scale_by_muon(
            beta=0.0,
            nesterov=False,
            ns_steps=self.ns_steps,
            weight_dimension_numbers=last_two_axes,
        )
        update, _ = muon.update(matrices, muon.init(matrices))
        return scaled_by_side(update, self.rms)


def orthogonalized_residual(
    weight: jax.typing.ArrayLike = 4.0,
    ns_steps: jax.typing.ArrayLike = 5,
    rms: jax.typing.ArrayLike = 0.2,
) -> Orthogonalized:
    r"""What the subspace does not hold, orthogonalized together with what it does.

    U = scale rms sqrt(a) orth(N P^T + weight (G - R P^T)), orth(U S V^T) = U V^T, a the
    longer side: every direction of a matrix gets a step of the same size. Matrices at
    full size are orthogonalized too. No state; costs ``ns_steps`` Newton-Schulz
    iterations at full size, and needs the full gradient at every update.

    Args:
        weight: Of the residual; >= 0.
        ns_steps: Newton-Schulz iterations, >= 1; singular values come to 0.7 ... 1.2 in
            5, those under 1/500 of the norm to less.
        rms: Root mean square of an update of full rank, in [0, 1).

    Raises:
        ValueError: If a value is out of its range.

    References:
        Jordan, `Muon <https://kellerjordan.github.io/posts/muon/>`_, 2024.
    """
    _check_weight("weight", weight)
    check_orthogonalization(ns_steps, rms)
    return Orthogonalized(weight, ns_steps, rms)


@dataclasses.dataclass(frozen=True)
class Scaled:
    """See :func:`scaled_residual`.

    Attributes:
        growth: >= 1.
        by_matrix: One phi for a matrix and not for each row.
        whole: Whether it is the gradient itself that is scaled, N dropped: APOLLO.
    """

    growth: jax.typing.ArrayLike
    by_matrix: bool = False
    whole: bool = False

    @property
    def needs_full_gradients(self) -> bool:
        """Returns True; see :class:`ResidualRule`."""
        return True

    def init(self, view: MatrixView, leaf: Any) -> jax.Array:
        """Returns the norm of the scaled part, 0 before the first; (*stack,)."""
        return zeros_beside(leaf, view.stack, jnp.float32, stack_axes(view))

    def at_full_size(self, update: jax.Array) -> jax.Array:
        """Returns the update as it is; see :class:`ResidualRule`."""
        return update

    def update(self, pieces: Pieces, state: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns scale (N P^T + limited(phi E)); see :class:`ResidualRule`."""
        view, dtype = pieces.view, pieces.basis.dtype
        if self.whole:
            assert pieces.gradient is not None
            part = pieces.gradient.astype(dtype)
        else:
            part = pieces.residual()
        part = view.oriented(part) * self._phi(pieces)
        norm = jnp.linalg.norm(part, axis=(-1, -2)).astype(jnp.float32)
        most = jnp.where(state > 0, self.growth * state, norm)
        limited = jnp.minimum(norm, most)
        shrink = limited / jnp.where(norm > 0, norm, 1)
        part = view.unoriented(part * shrink[..., None, None].astype(dtype))
        if not self.whole:
            return _added(pieces, part), limited
        return pieces.scaled(part), limited

    def _phi(self, pieces: Pieces) -> jax.Array:
        """Returns ||N_i|| / ||R_i|| of each row i of the kept side."""
        axes = (-1, -2) if self.by_matrix else -1
        n, r = (
            jnp.linalg.norm(x.astype(pieces.basis.dtype), axis=axes, keepdims=True)
            for x in (pieces.narrow, pieces.coordinates)
        )
        # A row that is zero inside its subspace says nothing of the rest of it.
        return jnp.where(r > 0, n / jnp.where(r > 0, r, 1), 0)


def scaled_residual(growth: jax.typing.ArrayLike = 1.01) -> Scaled:
    r"""What the subspace does not hold, scaled as the optimizer scales what it does.

    For each row i of the kept side

    .. math::
        U = \mathrm{scale} \, (N P^\top + \mathrm{limited}(\phi (G - R P^\top))), \quad
        \phi_i = \|N_i\| / \|R_i\|

    limited(S) shrinks S to ``growth`` times the norm that it had at the update before,
    where it is longer. State: one number a matrix, that norm. Needs the full gradient
    at every update: no subspace gradients, and ``accumulate`` adds up full ones.

    Args:
        growth: Largest growth of the residual's norm from one update to the next; >= 1.

    Raises:
        ValueError: If ``growth`` is below 1.

    References:
        Chen et al., `Fira <https://arxiv.org/abs/2410.01623>`_, 2024.
    """
    check_growth(growth)
    return Scaled(growth)


def _added(pieces: Pieces, part: jax.Array) -> jax.Array:
    """Returns scale (N P^T + part), ``part`` in the leaf's shape."""
    inside = pieces.view.lift(pieces.narrow.astype(pieces.basis.dtype), pieces.basis)
    return pieces.scaled(inside + part)


def last_two_axes(tree: Any) -> Any:
    """Returns Muon's dimension numbers of stacks of matrices."""
    numbers = optax.contrib.MuonDimensionNumbers(-2, -1)
    return jax.tree.map(lambda leaf: numbers, tree)


def scaled_by_side(tree: Any, rms: jax.typing.ArrayLike) -> Any:
    """Returns orthogonal matrices scaled to the root mean square of full rank.

    The kept side, the longer one, is there in the subspace too.
    """
    return jax.tree.map(lambda x: x * (rms * max(x.shape[-2:]) ** 0.5), tree)


def check_growth(growth: jax.typing.ArrayLike) -> None:
    """Raises ValueError if the limiter's growth is below 1."""
    if isinstance(growth, (int, float)) and growth < 1:
        raise ValueError(f"growth must be >= 1, got {growth}.")


def check_orthogonalization(
    ns_steps: jax.typing.ArrayLike, rms: jax.typing.ArrayLike
) -> None:
    """Raises ValueError if a value of Muon's is out of its range."""
    if isinstance(rms, (int, float)) and not 0 <= rms < 1:
        raise ValueError(f"rms must be inside [0, 1), got {rms}.")
    is_traced = isinstance(ns_steps, jax.Array)
    if not is_traced and not (isinstance(ns_steps, int) and ns_steps >= 1):
        raise ValueError(f"ns_steps must be an int >= 1, got {ns_steps!r}.")


def _check_weight(name: str, weight: jax.typing.ArrayLike) -> None:
    if isinstance(weight, (int, float)) and not weight >= 0:
        raise ValueError(f"{name} must be >= 0, got {weight}.")

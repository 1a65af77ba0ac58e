"""``extract_adapter``: the change of every matrix as a product of two thin matrices."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_optax.checks import as_count
from lowrank_optax.matrix.arrays import as_arrays, leaf_name, wide
from lowrank_optax.matrix.boxes import boxed_like, leaves_by_path, unboxed
from lowrank_optax.matrix.dimension_numbers import DimensionNumbers
from lowrank_optax.matrix.plan import plan_leaves, views_of
from lowrank_optax.matrix.roles import Patterns, assigned_roles
from lowrank_optax.matrix.sharding import named_sharding
from lowrank_optax.matrix.view import MatrixView
from lowrank_optax.rules.lapack import one_by_one


class Factors(NamedTuple):
    """Two thin factors per matrix of a leaf, on the host, float32 or wider.

    Attributes:
        down: A; (*stack, n, r).
        up: B; (*stack, r, m).
    """

    down: np.ndarray
    up: np.ndarray


@dataclasses.dataclass(frozen=True)
class Adapter:
    """The changes of matrices, each as A B; see :func:`extract_adapter`.

    A key is the key path of a leaf, as ``jax.tree_util.keystr`` writes it. A leaf that
    did not change has no entry.

    Attributes:
        factors: Key path -> A (*stack, n, r) and B (*stack, r, m). r is the largest
            rank of the leaf's matrices; what is behind a smaller rank is zero.
        ranks: Key path -> rank of each matrix, int32 (*stack,).
        errors: Key path -> ||D - A B||_F / ||D||_F of each matrix, float64 (*stack,);
            0 for a matrix of a stack that did not change.
        not_covered: Key paths of the leaves that changed and have no factors.
        dimension_numbers: Axes of the matrices, as :func:`extract_adapter` took them.
    """

    factors: Mapping[str, Factors]
    ranks: Mapping[str, np.ndarray]
    errors: Mapping[str, np.ndarray]
    not_covered: tuple[str, ...]
    dimension_numbers: DimensionNumbers | None = None

    def merged(self, pretrained: Any) -> Any:
        """Returns the parameters W + A B, each leaf in its dtype and sharding.

        Args:
            pretrained: Parameters with the names and shapes of those that the adapter
                was extracted from.

        Raises:
            ValueError: If a leaf with factors is missing or has another shape.
        """
        arrays = as_arrays(pretrained)
        found = _views(arrays, self.dimension_numbers)
        views = {leaf_name(path): view for path, view in found.items()}
        for name, factors in self.factors.items():
            view = views.get(name)
            shape = (*factors.down.shape[:-1], factors.up.shape[-1])
            if view is None or (*view.stack, view.rows, view.columns) != shape:
                found = "missing" if view is None else f"of shape {view.shape}"
                raise ValueError(
                    f"{name} is {found}; the adapter has factors for {shape}."
                )

        def leaf(path, array):
            factors, view = self.factors.get(leaf_name(path)), views[leaf_name(path)]
            if factors is None or view is None:
                return array
            change = view.leaf(np.matmul(*factors))
            total = (array.astype(change.dtype) + change).astype(array.dtype)
            sharding = named_sharding(array)
            return total if sharding is None else jax.device_put(total, sharding)

        new = jax.tree_util.tree_map_with_path(leaf, unboxed(arrays))
        return boxed_like(new, arrays)


def extract_adapter(
    tuned: Any,
    pretrained: Any,
    rank: int | None = None,
    energy: float | None = None,
    *,
    patterns: Patterns | None = None,
    dimension_numbers: DimensionNumbers | None = None,
) -> Adapter:
    r"""Returns the change of every matrix as a product of two thin matrices.

    For each hidden matrix of :func:`lowrank_optax.roles`, and each matrix of a stack:

    .. math::
        D = W_{tuned} - W_{pretrained} = U \Sigma V^\top, \quad
        A = U_r \Sigma_r^{1/2}, \quad B = \Sigma_r^{1/2} V_r^\top

    No product of rank r is nearer to D (Eckart and Young), and A^T A = B B^T. The
    relative error is the root of the share of the squared norm that is left out.

    Trees are read leaf by leaf on the host, matrices are decomposed one after another
    on the default device. One matrix costs O(n m min(n, m)) operations, in float32 for
    parameters of up to 32 bits. Float64 needs ``jax_enable_x64``; without it JAX reads
    such parameters as float32.

    Args:
        tuned: Parameters after fine-tuning: arrays, or boxes such as those of
            ``nnx.state``. All shards must be on devices of this process.
        pretrained: Parameters before it, with the same names and shapes.
        rank: r of every matrix, from 1 to its shorter side.
        energy: Share of ||D||_F^2 to keep, in (0, 1]. Each matrix gets the least rank
            that keeps this share; 0 if it did not change. Float32 resolves singular
            values down to max(n, m) 1.2e-7 of the largest one, and smaller ones count
            as zero: 1 asks for the numerical rank of D. Rounding is a part of D: what
            was trained in bfloat16 has full rank.
        patterns: {regular expression: role}, as for :func:`lowrank_optax.roles`. A leaf
            with another role than ``"hidden"`` gets no factors, a new classifier for
            example: ``{"classifier": "frozen"}``.
        dimension_numbers: Axes of the matrices, where the optimizer was given some; see
            :func:`scale_by_low_rank <lowrank_optax.scale_by_low_rank>`.

    Returns:
        The factors, ranks and errors by key path, the leaves that changed and are not
        covered (vectors, embeddings, heads), and ``merged(pretrained)``.

    Raises:
        ValueError: If not exactly one of rank and energy is given, or it is out of its
            range for a matrix; if the trees differ in names or shapes; if a change is
            not finite; if a pattern does not fit, as for :func:`lowrank_optax.roles`,
            or if dimension numbers do not fit a leaf.
        TypeError: If a leaf is neither an array nor a number.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> w = jnp.asarray(rng.normal(size=(64, 32)), jnp.float32)
        >>> change = rng.normal(size=(64, 2)) @ rng.normal(size=(2, 32))
        >>> before, after = {"up": w, "b": w[0]}, {"up": w + change, "b": w[1]}
        >>> adapter = extract_adapter(after, before, energy=0.999)
        >>> adapter.ranks, adapter.not_covered
        ({"['up']": array(2, dtype=int32)}, ("['b']",))
        >>> bool(jnp.allclose(adapter.merged(before)["up"], after["up"], atol=1e-4))
        True

    References:
        AdaRankGrad, Section 3.3. The paper takes rank(D) and finds A and B by gradient
        descent; the truncated SVD is the optimum that the descent approaches.
    """
    if rank is not None:
        rank = as_count("rank", rank)
    _check(rank, energy)
    tuned, pretrained = as_arrays(tuned), as_arrays(pretrained)
    before, after = leaves_by_path(pretrained), leaves_by_path(tuned)
    _check_same(after, before)
    roles = assigned_roles(pretrained, patterns)
    views = _views(pretrained, dimension_numbers)
    changed = [path for path in before if _differ(after[path], before[path])]
    covered: dict[tuple, MatrixView] = {}
    for path in changed:
        view = views[path]
        if view is not None and roles[path].role == "hidden":
            if rank is not None and rank > min(view.rows, view.columns):
                raise ValueError(
                    f"{leaf_name(path)}: rank {rank} is above the shorter side of "
                    f"({view.rows} x {view.columns}); give a smaller rank, or leave "
                    "the leaf out by a pattern."
                )
            covered[path] = view
    factors, ranks, errors = {}, {}, {}
    for path, view in covered.items():
        name = leaf_name(path)
        change = view.matrices(_change(after[path], before[path]))
        if not np.isfinite(change).all():
            raise ValueError(f"{name}: the change is not finite everywhere.")
        factors[name], ranks[name], errors[name] = _factored(change, rank, energy)
    left = tuple(leaf_name(path) for path in changed if path not in covered)
    return Adapter(factors, ranks, errors, left, dimension_numbers)


def _factored(
    change: Any, rank: int | None, energy: float | None
) -> tuple[Factors, np.ndarray, np.ndarray]:
    """Returns the factors of a stack (*stack, n, m), its ranks and its errors."""
    *stack, n, m = change.shape
    matrices = change.reshape(-1, n, m)
    found = [_of_matrix(matrix, rank, energy) for matrix in matrices]
    ranks = [down.shape[-1] for down, _ in found]
    downs = np.zeros((len(found), n, max(ranks)), change.dtype)
    ups = np.zeros((len(found), max(ranks), m), change.dtype)
    errors = np.zeros(len(found))
    for i, (down, up) in enumerate(found):
        downs[i, :, : ranks[i]], ups[i, : ranks[i]] = down, up
        wide_matrix = matrices[i].astype(np.float64)
        if size := np.linalg.norm(wide_matrix):
            errors[i] = np.linalg.norm(wide_matrix - down @ up) / size
    factors = Factors(downs.reshape(*stack, n, -1), ups.reshape(*stack, -1, m))
    return factors, np.array(ranks, np.int32).reshape(stack), errors.reshape(stack)


def _of_matrix(
    matrix: np.ndarray, rank: int | None, energy: float | None
) -> tuple[np.ndarray, np.ndarray]:
    """Returns A (n, r) and B (r, m) of one matrix."""
    peak = np.abs(matrix).max()
    # Far from 1, the squares inside the decomposition overflow or underflow.
    u, s, v = map(np.asarray, _svd(matrix / (peak or 1)))
    if rank is None:
        rank = _needed(s, max(matrix.shape), energy)
    root = np.sqrt(s[:rank] * peak)
    return u[:, :rank] * root, root[:, None] * v[:rank]


@jax.jit
def _svd(matrix: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    thin = functools.partial(jnp.linalg.svd, full_matrices=False)
    return one_by_one(thin, matrix)


def _needed(values: np.ndarray, longest: int, energy: float | None) -> int:
    """Returns the least rank with a share of the energy; 0 if there is none."""
    assert energy is not None
    resolved = values > values[0] * longest * np.finfo(values.dtype).eps
    kept = np.cumsum(np.where(resolved, values, 0).astype(np.float64) ** 2)
    return int(np.argmax(kept >= energy * kept[-1])) + 1 if kept[-1] else 0


def _check(rank: int | None, energy: float | None) -> None:
    if (rank is None) == (energy is None):
        raise ValueError(f"give one of rank and energy, got {rank=}, {energy=}.")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"energy must be inside (0, 1], got {energy}.")


def _check_same(after: Mapping[tuple, Any], before: Mapping[tuple, Any]) -> None:
    for path in [*before, *after]:
        if path not in before or path not in after:
            where = "tuned" if path in before else "pretrained"
            raise ValueError(f"{leaf_name(path)} is missing in {where}.")
    for path, leaf in before.items():
        if tuple(leaf.shape) != tuple(after[path].shape):
            raise ValueError(
                f"{leaf_name(path)} has shape {tuple(after[path].shape)} in tuned and "
                f"{tuple(leaf.shape)} in pretrained."
            )


def _differ(one: Any, other: Any) -> bool:
    return not np.array_equal(_on_host(one), _on_host(other))


def _change(after: Any, before: Any) -> Any:
    """Returns D on the host, in the dtype of linear algebra."""
    one, other = _on_host(after), _on_host(before)
    return one.astype(wide(one.dtype)) - other.astype(wide(other.dtype))


def _on_host(leaf: Any) -> np.ndarray:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf)


def _views(
    params: Any, dimension_numbers: DimensionNumbers | None
) -> dict[tuple, MatrixView | None]:
    """Returns each leaf as a stack of matrices; None for a leaf without a matrix."""
    return views_of(plan_leaves(params, 0, "short", dimension_numbers))

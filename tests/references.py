"""The methods again: float64 NumPy, one matrix at a time, plain loops, no JAX.

Written from the equations of the papers and of the docstrings, not from the library's
code, so that a fault has to be made twice to go unseen. Gradients are plain (n, m)
arrays; a stack is a list of them, one run each.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

# A, basis in use (b, r), number of the refresh -> columns (b, <= r), energies
Basis = Callable[[np.ndarray, np.ndarray, int], tuple[np.ndarray, np.ndarray]]
# energies, demand so far -> rank, demand
RankChoice = Callable[[np.ndarray, float], tuple[int, float]]
# R, M, V, number of the update from 1 -> N, M, V
Inner = Callable[..., tuple[np.ndarray, np.ndarray, np.ndarray]]
# M, V, R = P_old^T P_new, updates done -> M, V
Rebase = Callable[..., tuple[np.ndarray, np.ndarray]]


# --- bases -----------------------------------------------------------------------


def captured(a: np.ndarray, basis: np.ndarray) -> np.ndarray:
    """||A p_j||^2 / ||A||_F^2 of each column p_j of the basis (b, r)."""
    return np.sum((a @ basis) ** 2, axis=0) / np.sum(a**2)


def range_finder(
    a: np.ndarray, omega: np.ndarray, rank: int, power_iterations: float = 0.5
) -> tuple[np.ndarray, np.ndarray]:
    """P (b, rank) and energies of A (a, b) from the test matrix Omega, (a or b, k).

    Halko, Martinsson, Tropp 2011: Y = A^T Omega, algorithm 4.1, or A^T orth(A Omega);
    for each power iteration Y <- A^T orth(A orth(Y)), algorithm 4.4; last, the leading
    left singular vectors of Y, algorithm 5.1.
    """
    whole = int(power_iterations)
    if whole < power_iterations:
        omega = np.linalg.qr(a @ omega)[0]
    sketch = a.T @ omega
    for _ in range(whole):
        sketch = a.T @ np.linalg.qr(a @ np.linalg.qr(sketch)[0])[0]
    basis = np.linalg.svd(sketch, full_matrices=False)[0][:, :rank]
    return basis, captured(a, basis)


def warm_start(omega: np.ndarray, previous: np.ndarray) -> np.ndarray:
    """orth of Omega (b, k) with its first columns replaced by those of P in use."""
    start = omega.copy()
    for j in range(previous.shape[1]):
        if np.any(previous[:, j]):
            start[:, j] = previous[:, j]
    return np.linalg.qr(start)[0]


def exact_svd(a: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """The leading right singular vectors of A, and sigma_i^2 / ||A||_F^2."""
    _, values, right = np.linalg.svd(a, full_matrices=False)
    return right[:rank].T, values[:rank] ** 2 / np.sum(a**2)


def dct_matrix(b: int) -> np.ndarray:
    """The orthonormal DCT-II matrix, column after column."""
    places = (2 * np.arange(b) + 1) * np.pi / (2 * b)
    columns = [np.cos(j * places) * np.sqrt(2 / b) for j in range(b)]
    columns[0] = np.full(b, b**-0.5)
    return np.stack(columns, axis=1)


def dct_columns(a: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """The columns q of the DCT-II matrix with the largest ||A q||, and their shares."""
    q = dct_matrix(a.shape[1])
    chosen = np.argsort(-captured(a, q))[:rank]
    return q[:, chosen], captured(a, q[:, chosen])


def power_iteration(
    a: np.ndarray, previous: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Gram-Schmidt of A^T A P_old, column after column: LDAdam, Algorithm 1."""
    basis = np.linalg.qr(a.T @ (a @ previous))[0]
    return basis, captured(a, basis)


def with_momentum(rho: float, b1: float):
    """rho M P^T / (1 - b1^t) + (1 - rho) G: what LDAdam's basis follows."""

    def source(g, m, p, t):
        return rho * (m @ p.T) / (1 - b1 ** max(t, 1)) + (1 - rho) * g

    return source


# --- ranks -----------------------------------------------------------------------


def needed_rank(energies: Sequence[float], threshold: float) -> int:
    """The least k with 1 - (e_1 + ... + e_k) <= eta: AdaRankGrad, Equation 2."""
    lost = 1.0
    for k, energy in enumerate(energies, start=1):
        lost -= energy
        if lost <= threshold:
            return k
    return len(energies)


def energy_rank(
    threshold: float, min_rank: int, capacity: int, smoothing: float = 0.5
) -> RankChoice:
    """d <- s d + (1 - s) k; rank = ceil(d), clipped to [min_rank, capacity]."""

    def choose(energies, demand):
        needed = needed_rank(energies, threshold)
        demand = smoothing * demand + (1 - smoothing) * needed
        return min(max(int(np.ceil(demand)), min_rank), capacity), demand

    return choose


def fixed_rank(rank: int) -> RankChoice:
    """Always ``rank``."""
    return lambda energies, demand: (rank, float(rank))


# --- refresh schedules -----------------------------------------------------------


class Every:
    """Due at step 0, ``offset`` early the next time, then every ``interval`` steps."""

    def __init__(self, interval: int, offset: int = 0):
        self.interval, self.offset = interval, offset
        self.next_step = 0

    def is_due(self, step: int) -> bool:
        return step >= self.next_step

    def refreshed(self, step: int) -> None:
        self.next_step = step + self.interval - self.offset
        self.offset = 0

    def observe(self, norm: float) -> None:
        pass


class OnConvergence:
    """AdaRankGrad, Block 3 of Algorithm 3, smoothed and bounded from both sides.

    With the norms ||G_t P|| since the refresh, but not the first one, whose gradient
    the basis was computed from, and w = 1 / (1 - decay): average = the mean of the
    first w, from there on an exponential moving average of ``decay``; reference = the
    mean of the first w. A norm that is not finite counts as the average so far.
    Convergence counts at ages that ``check_interval`` divides.
    """

    def __init__(
        self,
        min_interval: int,
        max_interval: int,
        fraction: float,
        decay: float = 0.95,
        check_interval: int = 25,
    ):
        self.min_interval, self.max_interval = min_interval, max_interval
        self.fraction, self.decay = fraction, decay
        self.check_interval = check_interval
        self.last: int | None = None
        self.norms: list[float] = []

    def is_due(self, step: int) -> bool:
        if self.last is None:
            return True
        age = step - self.last
        if age >= self.max_interval:
            return True
        if age < self.min_interval or age % self.check_interval:
            return False
        average, reference = self.smoothed()
        return average < self.fraction * reference

    def smoothed(self) -> tuple[float, float]:
        # 1 - 0.95 is a little above 0.05 in binary: without the 1e-9 w would be 19.
        window = int(1 / (1 - self.decay) + 1e-9)
        norms = self.norms[1:] or self.norms
        reference = average = float(np.mean(norms[:window]))
        for norm in norms[window:]:
            average = self.decay * average + (1 - self.decay) * norm
        return average, reference

    def refreshed(self, step: int) -> None:
        self.last, self.norms = step, []

    def observe(self, norm: float) -> None:
        if self.last is not None:
            self.norms.append(norm if np.isfinite(norm) else self.smoothed()[0])


# --- re-basing: R = P_old^T P_new, moments (a, r) --------------------------------


def rebase(rule: str, b1: float = 0.9, b2: float = 0.999) -> Rebase:
    """The named rule: (M, V, R, updates done) -> (M, V) in the new basis."""

    def transported(m, v, r, t):
        # Coordinate by coordinate: the new j-th one is sum_i R_ij times the old i-th.
        new_m, new_v = np.zeros((len(m), r.shape[1])), np.zeros((len(v), r.shape[1]))
        correction = 1 - b2 ** max(t, 1)
        mean = m / (1 - b1 ** max(t, 1))
        for j in range(r.shape[1]):
            new_m[:, j] = sum(m[:, i] * r[i, j] for i in range(len(r)))
            linear = sum(v[:, i] * r[i, j] for i in range(len(r)))
            squared = sum(v[:, i] * r[i, j] ** 2 for i in range(len(r)))
            variance = sum(
                (v[:, i] / correction - mean[:, i] ** 2) * r[i, j] ** 2
                for i in range(len(r))
            )
            new_mean = sum(mean[:, i] * r[i, j] for i in range(len(r)))
            outside = max(0, 1 - sum(r[i, j] ** 2 for i in range(len(r))))
            new_v[:, j] = {
                "abs": np.abs(linear),
                "square": squared,
                "filled": squared + outside * _mean_in_use(v, r),
                "clamp": np.maximum(linear, 0),  # AdaRankGrad, Block 2, clamped
                # LDAdam, Algorithm 1: of moments whose bias is corrected
                "ldadam": correction * np.abs(variance + new_mean**2),
            }[rule]
        return new_m, new_v

    if rule == "keep":
        return lambda m, v, r, t: (m, v)
    if rule == "first":
        return lambda m, v, r, t: (m @ r, v)
    if rule == "zero":
        return lambda m, v, r, t: (
            np.zeros_like(m),
            np.repeat(_mean_in_use(v, r)[:, None], v.shape[1], axis=1),
        )
    return transported


def _mean_in_use(v: np.ndarray, r: np.ndarray) -> np.ndarray:
    """Means of the rows over the columns that the old basis had, (a,)."""
    in_use = [i for i in range(len(r)) if np.any(r[i])]
    return np.sum(v, axis=1) / max(1, len(in_use))


# --- inner transformations, on the projected gradient R ---------------------------


def adam(
    b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, raw_eps: bool = False
) -> Inner:
    """Kingma and Ba 2014, Algorithm 1; ``raw_eps``: their last remark of Section 2."""

    def step(r, m, v, t):
        m = b1 * m + (1 - b1) * r
        v = b2 * v + (1 - b2) * r**2
        if raw_eps:
            return np.sqrt(1 - b2**t) / (1 - b1**t) * m / (np.sqrt(v) + eps), m, v
        return (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps), m, v

    return step


def momentum(decay: float = 0.9) -> Inner:
    """M <- decay M + R, N = M: Polyak's heavy ball."""

    def step(r, m, v, t):
        m = decay * m + r
        return m, m, v

    return step


def lion(b1: float = 0.9, b2: float = 0.99) -> Inner:
    """Chen et al. 2023, Algorithm 2."""

    def step(r, m, v, t):
        return np.sign(b1 * m + (1 - b1) * r), b2 * m + (1 - b2) * r, v

    return step


def rms(decay: float = 0.9, eps: float = 1e-8) -> Inner:
    """Tieleman and Hinton 2012, eps inside the root as in Optax."""

    def step(r, m, v, t):
        v = decay * v + (1 - decay) * r**2
        return r / np.sqrt(v + eps), m, v

    return step


# --- the whole method --------------------------------------------------------------


class Record(NamedTuple):
    """What the state holds after one update."""

    refreshed: bool
    basis: np.ndarray
    rank: int
    demand: float
    first: np.ndarray
    second: np.ndarray


def low_rank(
    grads: Sequence[np.ndarray],
    *,
    capacity: int,
    inner: Inner,
    basis: Basis,
    rank: RankChoice,
    schedule: Every | OnConvergence,
    rebase: Rebase,
    side: str = "short",
    scale: float = 1.0,
    like: Sequence[np.ndarray] | None = None,
    lift: Callable[..., np.ndarray] = lambda g, r, n, p: n @ p.T,
    source: Callable[..., np.ndarray] = lambda g, m, p, t: g,
) -> tuple[list[np.ndarray], list[Record]]:
    """U_t = scale N_t P^T with R_t = G_t P, N_t = inner(R_t), for one matrix.

    ``lift``: (G_t, R_t, N_t, P) -> U_t / scale, where a method has another one.
    ``source``: (G_t, M, P, updates done) -> what a basis is computed from.

    GaLore, Algorithm 2, and AdaRankGrad, Algorithm 3. G_t is transposed where its rows
    are projected: for "short" if there are fewer rows than columns, for "long" if not.

    Singular vectors have no sign of their own, and the rules "abs" and "clamp", being
    linear in V under an absolute value, depend on the signs. ``like``: the library's
    basis at each step, whose columns' signs (nothing else) are taken over.
    """
    rows = projects_rows(grads[0].shape, side)
    oriented = [grad.T if rows else grad for grad in grads]
    kept, projected = oriented[0].shape
    p = np.zeros((projected, capacity))
    m, v = np.zeros((kept, capacity)), np.zeros((kept, capacity))
    in_use, demand, refreshes = capacity, float(capacity), 0
    updates, records = [], []
    for t, g in enumerate(oriented):
        refreshed = bool(schedule.is_due(t) and np.all(np.isfinite(g)) and np.any(g))
        if refreshed:
            columns, energies = basis(source(g, m, p, t), p, refreshes)
            in_use, demand = rank(energies, demand)
            new = np.zeros_like(p)
            for j in range(in_use):
                flip = like is not None and columns[:, j] @ like[t][:, j] < 0
                new[:, j] = -columns[:, j] if flip else columns[:, j]
            if refreshes > 0:
                m, v = rebase(m, v, p.T @ new, t)
            p = new
            refreshes += 1
            schedule.refreshed(t)
        r = g @ p
        schedule.observe(float(np.linalg.norm(r)))
        n, m, v = inner(r, m, v, t + 1)
        update = scale * lift(g, r, n, p)
        updates.append(update.T if rows else update)
        records.append(Record(refreshed, p, in_use, demand, m, v))
    return updates, records


def galore(
    grads: Sequence[np.ndarray],
    learning_rate: float,
    capacity: int,
    gap: int = 200,
    scale: float = 0.25,
    side: str = "short",
    like: Sequence[np.ndarray] | None = None,
) -> tuple[list[np.ndarray], list[Record]]:
    """GaLore, Algorithm 2: exact SVD every ``gap`` steps, Adam, moments kept."""
    updates, records = low_rank(
        grads,
        capacity=capacity,
        inner=adam(eps=1e-6),
        basis=lambda a, p, i: exact_svd(a, capacity),
        rank=fixed_rank(capacity),
        schedule=Every(gap),
        rebase=rebase("keep"),
        side=side,
        scale=scale,
        like=like,
    )
    return [-learning_rate * update for update in updates], records


def adarankgrad(
    grads: Sequence[np.ndarray],
    learning_rate: float,
    capacity: int,
    omega: Callable[[int, int], np.ndarray],
    threshold: float = 0.01,
    intervals: tuple[int, int] = (200, 300),
    decay: float = 0.95,
    check_interval: int = 25,
    side: str = "short",
    like: Sequence[np.ndarray] | None = None,
    warm: bool = False,
) -> tuple[list[np.ndarray], list[Record]]:
    """AdaRankGrad, Algorithm 3, with the differences that its docstring lists.

    ``omega``: (length of a side, number of the refresh) -> the test matrix.
    ``warm``: start from the basis in use.
    """

    def basis(a, p, i):
        start = omega(a.shape[1] if warm else a.shape[0], i)
        if warm:
            # On the projected side, with the product more that brings it there.
            return range_finder(a, warm_start(start, p), capacity, power_iterations=1.5)
        return range_finder(a, start, capacity, power_iterations=1)

    updates, records = low_rank(
        grads,
        capacity=capacity,
        inner=adam(),
        basis=basis,
        rank=energy_rank(threshold, max(1, 7 * capacity // 8), capacity),
        # Theorem 2: the norm inside the subspace has fallen under sqrt(1 - eta).
        schedule=OnConvergence(
            *intervals, np.sqrt(1 - threshold), decay, check_interval
        ),
        rebase=rebase("square"),
        side=side,
        like=like,
    )
    return [-learning_rate * update for update in updates], records


# --- relatives ---------------------------------------------------------------------


def orthogonalized_momentum(beta: float = 0.95, rms: float = 0.2) -> Inner:
    """Muon, Jordan 2024: Nesterov's momentum, five Newton-Schulz steps, RMS matched."""

    def step(r, m, v, t):
        m = beta * m + (1 - beta) * r
        mean = beta * m / (1 - beta ** (t + 1)) + (1 - beta) * r / (1 - beta**t)
        return orthogonalized(mean, rms), m, v

    return step


def orthogonalized(x: np.ndarray, rms: float) -> np.ndarray:
    """Five Newton-Schulz steps; of full rank it would have this root mean square."""
    size = rms * np.sqrt(max(x.shape))
    return size * newton_schulz(x, 5, [(3.4445, -4.7750, 2.0315)])


def newton_schulz(
    x: np.ndarray, steps: int, coefficients: Sequence[Sequence[float]]
) -> np.ndarray:
    """X <- X (a I + b G + c G^2), G = X^T X; the last coefficients are repeated."""
    x = x / np.linalg.norm(x)
    for k in range(steps):
        a, b, c = coefficients[min(k, len(coefficients) - 1)]
        gram = x.T @ x
        x = a * x + x @ (b * gram + c * gram @ gram)
    return x


def nesterov(beta: float = 0.95) -> Inner:
    """Momentum of sums, with Nesterov's step."""

    def step(r, m, v, t):
        m = beta * m + r
        return r + beta * m, m, v

    return step


def orthogonalized_whole(residual: float, rms: float = 0.2):
    """Lifts N, adds the gradient outside the subspace, and orthogonalizes the sum."""

    def lift(g, r, n, p):
        return orthogonalized(n @ p.T + residual * (g - r @ p.T), rms)

    return lift


def outside(g: np.ndarray, r: np.ndarray, p: np.ndarray) -> np.ndarray:
    """G - R P^T, 0 where four roundings of float32 to a row would be as large."""
    e = g - r @ p.T
    least = 4 * np.finfo(np.float32).eps * np.linalg.norm(g, axis=-1, keepdims=True)
    return np.where(np.abs(e) > least, e, 0)


def with_signs(weight: float):
    """Adds the signs of the gradient outside the subspace: FRUGAL, Zmushko et al. 2024.

    With signSGD as its optimizer without a state.
    """

    def lift(g, r, n, p):
        return n @ p.T + weight * np.sign(outside(g, r, p))

    return lift


def with_unit_columns(weight: float, rows: bool):
    """Adds the gradient outside the subspace, each output's column at length one.

    SCALE, Glentis et al. 2025. ``rows``: gradients come transposed, outputs as rows.
    """

    def lift(g, r, n, p):
        outside = (g - r @ p.T).T if rows else g - r @ p.T
        unit = np.zeros_like(outside)
        for j in range(outside.shape[1]):
            norm = np.sqrt(sum(x**2 for x in outside[:, j]))
            unit[:, j] = outside[:, j] / norm if norm > 0 else 0
        return n @ p.T + weight * (unit.T if rows else unit)

    return lift


class Limited:
    """Fira's norm-growth limiter, and what it limits.

    S = phi (G - k R P^T), k = ``taken``, phi by row or one; k = 0, and N is dropped,
    where the subspace is not kept. U = alpha N P^T + S. ``decays``: those of an Adam;
    the norms are then those of S without its bias corrections, which the authors' code
    multiplies the update by afterwards.
    """

    def __init__(
        self,
        keeps_subspace: bool,
        by_matrix: bool = False,
        growth: float = 1.01,
        alpha: float = 1.0,
        taken: float = 1.0,
        decays: tuple[float, float] | None = None,
    ):
        self.keeps_subspace, self.by_matrix = keeps_subspace, by_matrix
        self.growth, self.alpha, self.decays = growth, alpha, decays
        self.taken = taken if keeps_subspace else 0
        self.norm, self.t = None, 0

    def __call__(self, g, r, n, p):
        self.t += 1
        if self.by_matrix:
            phi = np.full(len(r), np.linalg.norm(n) / np.linalg.norm(r))
        else:
            phi = np.array(
                [np.linalg.norm(n[i]) / np.linalg.norm(r[i]) for i in range(len(r))]
            )
        correction = 1
        if self.decays is not None:
            b1, b2 = self.decays
            correction = np.sqrt(1 - b2**self.t) / (1 - b1**self.t)
        part = phi[:, None] / correction * (g - self.taken * r @ p.T)
        norm = np.linalg.norm(part)
        if self.norm is not None and norm > self.growth * self.norm:
            part = part * (self.growth * self.norm / norm)
        self.norm = np.linalg.norm(part)
        inside = self.alpha * n @ p.T if self.keeps_subspace else 0
        return inside + correction * part


# --- random bases of various granularity: VLoRP and ProjFactor ------------------------

# R = G P, P, M, V, number of the update from 1 -> U (a c, b / c), M, V
Step = Callable[..., tuple[np.ndarray, np.ndarray, Any]]


class Moments(NamedTuple):
    """What is known after one update; V of ProjFactor is (v_row, v_col)."""

    basis: np.ndarray
    first: np.ndarray
    second: Any


def projects_rows(shape: tuple[int, int], side: str) -> bool:
    """Whether b is the number of rows: the smaller one for "short", not if square."""
    n, m = shape
    return n < m if side == "short" else n >= m


def divisor(b: int, granularity: int) -> int:
    """The largest c <= granularity that divides b."""
    return max(c for c in range(1, granularity + 1) if b % c == 0)


def cut(g: np.ndarray, c: int) -> np.ndarray:
    """(a, b) -> (a c, b / c): each row's c pieces, one below the other."""
    return np.array([piece for row in g for piece in np.split(row, c)])


def paste(g: np.ndarray, c: int) -> np.ndarray:
    """(a c, b / c) -> (a, b): undoes ``cut``."""
    return np.array([np.concatenate(g[i : i + c]) for i in range(0, len(g), c)])


def transfer(old: np.ndarray, new: np.ndarray) -> np.ndarray:
    """R = (P_old^T P_old)^-1 P_old^T P_new: P_old R is nearest to P_new."""
    return np.linalg.lstsq(old, new, rcond=None)[0]


def various_grained(
    grads: Sequence[np.ndarray],
    step: Step,
    start: Any,
    *,
    draw: Callable[[int, int], np.ndarray],
    gap: int,
    granularity: int = 1,
    side: str = "short",
    rule: str = "first",
    projected: Callable[[int, np.ndarray], np.ndarray] | None = None,
) -> tuple[list[np.ndarray], list[Moments]]:
    """VLoRP: G_t (a, b) seen as (a c, b / c) meets P (b / c, r), new every ``gap``.

    ``draw``: (b / c, number of the refresh from 0) -> P. ``start``: V before the first
    update. ``projected``: (t, P) -> what is taken for G_t P.
    """
    rows = projects_rows(grads[0].shape, side)
    follow = rebase(rule)
    m, v, p = 0.0, start, np.empty((0, 0))
    updates, records = [], []
    for t, grad in enumerate(grads):
        g = grad.T if rows else grad
        c = divisor(g.shape[1], granularity)
        g = cut(g, c)
        if t % gap == 0:
            new = draw(g.shape[1], t // gap)
            if t > 0:
                m, v = follow(m, v, transfer(p, new), t)
            p = new
        r = g @ p if projected is None else projected(t, p)
        update, m, v = step(r, p, m, v, t + 1)
        update = paste(update, c)
        updates.append(update.T if rows else update)
        records.append(Moments(p, m, v))
    return updates, records


def vlorp(
    grads: Sequence[np.ndarray], learning_rate: float, **parts: Any
) -> tuple[list[np.ndarray], list[Moments]]:
    """VLoRP, the scheme SS: Adam on G_t P, lifted by P^T; ``parts``: see above."""
    inner = adam()

    def step(r, p, m, v, t):
        n, m, v = inner(r, m, v, t)
        return -learning_rate * n @ p.T, m, v

    return various_grained(grads, step, 0.0, **parts)


def projfactor(
    grads: Sequence[np.ndarray],
    learning_rate: float,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    **parts: Any,
) -> tuple[list[np.ndarray], list[Moments]]:
    """ProjFactor: G_s = G P, G_o = G_s P^T, m on G_s, rank-one v on G_o^2.

    v = outer(v_row, v_col) / sum(v_row),
    U = sqrt(1 - b2^t) / (1 - b1^t) m P^T / (sqrt(v) + eps).
    """

    def step(r, p, m, v, t):
        back = r @ p.T
        row, col = v
        m = b1 * m + (1 - b1) * r
        row = b2 * row + (1 - b2) * np.sum(back**2, axis=1)
        col = b2 * col + (1 - b2) * np.sum(back**2, axis=0)
        root = np.sqrt(np.outer(row, col) / np.sum(row))
        correction = np.sqrt(1 - b2**t) / (1 - b1**t)
        update = correction * (m @ p.T) / (root + eps)
        return -learning_rate * update, m, (row, col)

    return various_grained(grads, step, (0.0, 0.0), **parts)


# --- accumulation ------------------------------------------------------------------


def window_means(
    grads: Sequence[np.ndarray], weights: Sequence[float], k: int
) -> list[np.ndarray]:
    """sum_i w_i G_i / sum_i w_i over each k micro-batches that follow each other."""
    means = []
    for start in range(0, len(grads), k):
        total, weight = np.zeros_like(grads[0]), 0.0
        for i in range(start, start + k):
            total += weights[i] * grads[i]
            weight += weights[i]
        means.append(total / weight)
    return means


# --- adapters: Section 3.3 of AdaRankGrad, by Eckart and Young -----------------------


def nearest_of_rank(change: np.ndarray, rank: int) -> tuple[np.ndarray, float]:
    """The nearest matrix of a rank, D V_r V_r^T, and its relative distance.

    V_r has the leading eigenvectors of D^T D; what is lost are the other eigenvalues.
    """
    values, vectors = np.linalg.eigh(change.T @ change)  # sorted upward
    values = np.maximum(values, 0)
    leading = vectors[:, len(values) - rank :]
    total, lost = values.sum(), values[: len(values) - rank].sum()
    return change @ leading @ leading.T, float(np.sqrt(lost / total)) if total else 0.0


# --- gradients to run them on --------------------------------------------------------


def drifting_gradients(
    rng: np.random.Generator, steps: int, shape: tuple[int, int], rank: int = 6
) -> np.ndarray:
    """(steps, n, m) gradients whose singular values lie apart and whose vectors drift.

    Bases are then unique up to the signs of their columns, in any precision. The decay
    of the spectrum swings from 0.35 to 0.75, so that the rank asked for moves both
    ways, and the norm from 1 to 0.5, so that subspaces converge.
    """
    n, m = shape
    rank = min(rank, n, m)
    left, right = rng.normal(size=(n, rank)), rng.normal(size=(m, rank))
    left_drift, right_drift = rng.normal(size=(n, rank)), rng.normal(size=(m, rank))
    grads = []
    for t in range(steps):
        phase = 2 * np.pi * t / 16
        u = np.linalg.qr(left + 0.8 * np.sin(phase / 3) * left_drift)[0]
        v = np.linalg.qr(right + 0.8 * np.sin(phase / 3) * right_drift)[0]
        decay = 0.55 - 0.2 * np.cos(phase)
        values = (0.75 + 0.25 * np.cos(phase)) * decay ** np.arange(rank)
        grads.append((u * values) @ v.T)
    return np.asarray(grads)

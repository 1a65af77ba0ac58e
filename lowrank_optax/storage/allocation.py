"""Columns for each leaf, so that a given number of bytes captures the most energy."""

import heapq
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_optax.binding.states import arrays_by_leaf
from lowrank_optax.checks import as_count
from lowrank_optax.codes import decode
from lowrank_optax.kinds import Kind, kinds_of
from lowrank_optax.matrix.arrays import leaf_name
from lowrank_optax.rules.budget import parse_bytes
from lowrank_optax.storage.resize import Columns, columns, resized


def reallocate(
    state: Any,
    limit: int | str | None = None,
    *,
    bucket: int = 8,
    weight: Literal["share", "energy"] = "share",
    moments: Mapping[str, Kind] | None = None,
) -> Any:
    r"""Spreads the columns over the leaves anew, by captured energy.

    The energy of column j of leaf l is e_lj, the sum of the second moment V over rows
    (and layers). V averages the squared projected gradient. Without a second moment the
    squares of the first moment take its place. Beyond the columns of a leaf, a power
    law through the middle and the last column extends the energies. Columns are given
    out in buckets. Each bucket goes to the leaf with the largest gain per byte:

    .. math:: \max_k \sum_l w_l \sum_{j \le k_l} e_{lj} \quad \text{so that} \quad
        \sum_l k_l \, \mathrm{bytes}_l \le \text{limit},

    "energy" maximises the captured energy, with w_l = 1. "share" maximises the sum of
    the captured shares, with w_l = 1 / sum_j e_lj; like Adam's updates, "share" does
    not depend on the scale of a leaf. A leaf that loses columns loses its last columns,
    with the least energy, and their moments. A leaf that gains columns has empty ones
    until its next refresh.

    Use it with a fixed rank or a :func:`lowrank_optax.budget`, after some gradients,
    and not inside ``jax.jit``.

    Args:
        state: State of any optimizer that contains low-rank transformations.
        limit: Bytes for all arrays with columns: bases, moments, sums of micro-batches;
            an int, or text as in :func:`lowrank_optax.budget`. None: the present bytes
            of these arrays.
        bucket: Columns given out at a time, and the least number per leaf; >= 1.
        weight: "share" or "energy": the weights w_l above.
        moments: Kinds of further fields of the inner state, as in
            :func:`scale_by_low_rank <lowrank_optax.scale_by_low_rank>`.

    Returns:
        The state with other capacities.

    Raises:
        ValueError: If a value is unknown, if the limit is below one bucket per leaf, or
            if a leaf has no known moment.
    """
    bucket = as_count("bucket", bucket)
    if weight not in ("share", "energy"):
        raise ValueError(f"weight must be 'share' or 'energy', got {weight!r}.")
    found = columns(state)
    if limit is None:
        limit = int(sum(x.capacity * x.bytes_per_column for x in found.values()))
    limit = parse_bytes(limit)
    wanted = allocate(found, energies(state, moments), limit, bucket, weight)
    by_name = {leaf_name(path): path for path in arrays_by_leaf(state)}
    return resized(state, {by_name[name]: k for name, k in wanted.items()})


def energies(
    state: Any, moments: Mapping[str, Kind] | None = None
) -> dict[str, np.ndarray]:
    """Returns the mean captured energy of each column, by the leaf's path.

    Args:
        state: State of any optimizer that contains low-rank transformations.
        moments: Kinds of further fields of the inner state.

    Returns:
        Key path of the parameter -> energies, in squared gradients, (capacity,).

    Raises:
        ValueError: If a leaf has no known moment.
    """
    squares, known = {}, kinds_of(moments)
    for path, arrays in arrays_by_leaf(state).items():
        kinds = {known.get(field): x for field, x in arrays.items()}
        if "second" in kinds:
            values = decode(kinds["second"])
        elif "first" in kinds:
            values = decode(kinds["first"]) ** 2
        else:
            raise ValueError(
                f"{leaf_name(path)}: there is no moment in the subspace to "
                f"read energies from; its arrays are {', '.join(arrays)}. Name the "
                "kind of another field by reallocate(..., moments={field: kind})."
            )
        squares[leaf_name(path)] = jnp.sum(values.reshape(-1, values.shape[-1]), axis=0)
    return {path: np.asarray(x) for path, x in jax.device_get(squares).items()}


def allocate(
    found: Mapping[str, Columns],
    captured: Mapping[str, np.ndarray],
    limit: int,
    bucket: int,
    weight: str,
) -> dict[str, int]:
    """Returns the columns of each leaf; see :func:`reallocate`.

    The gains of a leaf fall from bucket to bucket. Giving each bucket to the largest
    gain per byte is therefore optimal for whole buckets, up to the last bucket.
    """
    # Column numbers may show less of a side than the capacity that is there.
    most = {path: max(leaf.most - 1, leaf.capacity) for path, leaf in found.items()}
    wanted = {path: min(bucket, most[path]) for path in found}
    spent = sum(wanted[path] * leaf.bytes_per_column for path, leaf in found.items())
    if spent > limit:
        raise ValueError(
            f"{limit:,} bytes are below the least, {int(np.ceil(spent)):,}: {bucket} "
            f"columns for each of {len(found)} leaves."
        )
    spectra = {path: spectrum(captured[path], most[path]) for path in found}
    if weight == "share":
        spectra = {path: x / max(x.sum(), 1e-38) for path, x in spectra.items()}

    def gain(path: str) -> tuple[float, str]:
        start = wanted[path]
        more = spectra[path][start : start + bucket]
        return (-float(more.mean()) / found[path].bytes_per_column, path)

    queue = [gain(path) for path in found if wanted[path] < most[path]]
    heapq.heapify(queue)
    while queue:
        _, path = heapq.heappop(queue)
        step = min(bucket, most[path] - wanted[path])
        cost = step * found[path].bytes_per_column
        if spent + cost > limit:
            continue
        spent += cost
        wanted[path] += step
        if wanted[path] < most[path]:
            heapq.heappush(queue, gain(path))
    return wanted


def spectrum(captured: np.ndarray, length: int) -> np.ndarray:
    """Returns falling energies: those of the known columns, then a power law.

    Args:
        captured: Energies of the present columns; (capacity,).
        length: Length of the result.
    """
    known = np.sort(np.maximum(np.asarray(captured, np.float64), 0))[::-1]
    # Columns that are still empty tell nothing.
    known = known[known > 0]
    if not len(known):
        return np.zeros(length)
    count, middle = len(known), max(1, len(known) // 2)
    slope = 1.0
    if count > middle:
        slope = np.log(known[middle - 1] / known[-1]) / np.log(count / middle)
    positions = np.arange(count + 1, max(length, count) + 1)
    tail = known[-1] * (count / positions) ** max(slope, 0.5)
    return np.concatenate([known, tail])[:length]

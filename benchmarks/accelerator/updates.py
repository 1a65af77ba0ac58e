"""Stages a and c: an update of a LLaMA's block matrices alone."""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import lowrank_optax
from benchmarks import llama
from benchmarks.accelerator import filled, records, rounds
from benchmarks.accelerator.stacks import muon_of_stacks, over_layers

RATE = 1e-3
NEVER = 10**6  # updates between two renewals
_SLOW = 2.0  # seconds; a longer call is timed once

SIZES = {**llama.SIZES, "1b": (2048, 5461, 24), "toy": (32, 88, 1)}
RANKS = {"60m": 128, "1b": 512, "1b-one-layer": 512, "toy": 8}
KERNELS = ("query", "key", "value", "output", "gate", "up", "down")
# float32 as in the tables of a CPU; seven optimizers of 1b would not fit together.
DTYPES = {"1b": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class Case:
    """The task of the alternatives: matrices to update.

    Attributes:
        size: Key of :data:`SIZES`.
        is_stacked: Whether the layers of a kernel are one leaf.
        renews: Whether every update renews all bases. If not, no update renews a basis.
        kernels: The matrices of a layer.
        seconds: Time for the rounds.
    """

    size: str
    is_stacked: bool
    renews: bool
    kernels: tuple[str, ...] = KERNELS
    seconds: float = 10.0

    @property
    def rank(self) -> int:
        """Columns of the bases."""
        return RANKS[self.size]

    @property
    def gap(self) -> int:
        """Updates between two renewals."""
        return 1 if self.renews else NEVER

    @property
    def refresh(self) -> Any:
        """The refresh rule with this gap."""
        return lowrank_optax.every(self.gap, stagger=False)


Make = Callable[[Case], optax.GradientTransformation]


def _scaled_by_low_rank(case: Case, basis: Any) -> optax.GradientTransformation:
    return optax.chain(
        lowrank_optax.scale_by_low_rank(
            optax.scale_by_adam(), case.rank, basis=basis, refresh=case.refresh
        ),
        optax.scale_by_learning_rate(RATE),
    )


def _range_finder(power_iterations: float) -> Make:
    basis = lowrank_optax.range_finder(power_iterations=power_iterations)
    return lambda case: _scaled_by_low_rank(case, basis)


def _contrib_galore(case: Case) -> optax.GradientTransformation:
    tx = optax.contrib.galore(RATE, rank=case.rank, update_proj_gap=case.gap)
    return over_layers(tx) if case.is_stacked else tx


OURS: dict[str, Make] = {
    "range_finder(0)": _range_finder(0),
    "range_finder(0.5)": _range_finder(0.5),
    "range_finder(1)": _range_finder(1),
    "range_finder(2)": _range_finder(2),
    "exact_svd": lambda case: _scaled_by_low_rank(case, lowrank_optax.exact_svd()),
    "adarankgrad": lambda case: lowrank_optax.adarankgrad(
        RATE, case.rank, refresh=case.refresh
    ),
    "low_rank_muon": lambda case: lowrank_optax.low_rank_muon(
        RATE, case.rank, refresh=case.refresh
    ),
}
THEIRS: dict[str, Make] = {
    "adamw": lambda case: optax.adamw(RATE),
    "contrib.muon": lambda case: muon_of_stacks(RATE),
    "contrib.galore": _contrib_galore,
}


def measure(
    write: records.Write,
    case: Case,
    together: tuple[str, ...],
    apart: tuple[str, ...],
    deadline: float,
) -> None:
    """Times the alternatives, and writes the results after each part.

    Args:
        write: Function of the results so far.
        case: The task.
        together: Alternatives that are compiled first and then timed in turns.
        apart: Slow alternatives, timed one by one after the others.
        deadline: Time of ``time.monotonic``. No alternative starts after it.
    """
    start = time.monotonic()
    found: dict[str, Any] = {**dataclasses.asdict(case), "rank": case.rank}
    rows: dict[str, dict[str, Any]] = {}
    found["alternatives"] = rows
    params, gradients = _arrays(case)

    def prepare(name: str, until: float) -> rounds.Step | None:
        if time.monotonic() > until:
            rows[name] = {"skipped": "no time left to compile it"}
        else:
            try:
                step, rows[name] = _prepared(name, case, params, gradients)
                return step
            except Exception as error:
                rows[name] = {"error": records.text_of(error)}
            finally:
                write(found)
        return None

    steps = {}
    for name in together:
        # A third of the time is for the rounds.
        step = prepare(name, start + (deadline - start) * 2 / 3)
        if step is not None and rows[name]["milliseconds"]["median"] < 1e3 * _SLOW:
            steps[name] = step
    left = deadline - time.monotonic()
    timed = rounds.in_turns(steps, min(case.seconds, left / 2 if apart else left))
    for name, milliseconds in timed.items():
        rows[name]["milliseconds"] = milliseconds
    steps.clear()
    _compare(rows)
    write(found)
    for name in apart:
        step = prepare(name, deadline)
        if step is not None and rows[name]["milliseconds"]["median"] < 1e3 * _SLOW:
            rows[name]["milliseconds"] = rounds.in_turns({name: step}, 0)[name]
        _compare(rows)
        write(found)


def _arrays(case: Case) -> tuple[Any, Any]:
    """Returns parameters and gradients: stacks, or lists of matrices."""
    d, f, layers = SIZES[case.size]
    sides = {"gate": (d, f), "up": (d, f), "down": (f, d)}
    shapes = {name: (layers, *sides.get(name, (d, d))) for name in case.kernels}
    dtype = DTYPES.get(case.size, jnp.float32)

    @functools.partial(jax.jit, static_argnums=0)
    def draw(shape, seed):
        return filled.gradient(shape, seed).astype(dtype)

    def tree(first_seed):
        stacks = {
            name: draw(shape, first_seed + 3 * i)
            for i, (name, shape) in enumerate(shapes.items())
        }
        return stacks if case.is_stacked else llama.unstacked(stacks)

    return tree(1), tree(100)


def _prepared(
    name: str, case: Case, params: Any, gradients: Any
) -> tuple[rounds.Step, dict[str, Any]]:
    """Returns the compiled update after two calls, with the times of all three."""
    tx = {**OURS, **THEIRS}[name](case)
    # Without a renewal in the program no basis can be due.
    options = {"refresh": False} if name in OURS and not case.renews else {}

    def update(gradients, state, params):
        return tx.update(gradients, state, params, **options)

    def make(params, seed):
        if case.renews:
            return tx.init(params)
        return filled.state_like(tx, params, seed)

    seed = jnp.uint32(1)
    started = time.perf_counter()
    lowered = jax.jit(update, donate_argnums=1).lower(
        gradients, jax.eval_shape(make, params, seed), params
    )
    traced = time.perf_counter()
    compiled = lowered.compile()
    row: dict[str, Any] = {
        "trace_seconds": traced - started,
        "compile_seconds": time.perf_counter() - traced,
    }
    state = jax.block_until_ready(jax.jit(make)(params, seed))

    def step():
        nonlocal state
        updates, state = compiled(gradients, state, params)
        return updates

    seconds = rounds.seconds_of(step)
    if seconds < _SLOW:
        seconds = rounds.seconds_of(step)
    row["milliseconds"] = rounds.summary([seconds])
    return step, row


def _compare(rows: dict[str, dict[str, Any]]) -> None:
    """Adds each alternative's time as a multiple of optax's."""
    for base in ("adamw", "contrib.galore"):
        theirs = rows.get(base, {}).get("milliseconds")
        for row in rows.values():
            if theirs and "milliseconds" in row:
                ratio = row["milliseconds"]["median"] / theirs["median"]
                row[f"ratio_to_{base}"] = ratio

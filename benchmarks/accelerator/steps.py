"""Stages b and d: the whole training step of a LLaMA, its time and its bytes.

The steps are those of ``train_step``: the usual one, or the one that renews every basis
from sketches. Each case has a process of its own, because a process cannot reset a
device's peak. The step is compiled and run on a filled state. The processes share XLA's
cache of tuned kernels, so that the first process compiles longest.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import lowrank_optax
from benchmarks.accelerator import filled, records
from benchmarks.accelerator.stacks import layer_by_layer, muon_of_stacks

RATE = 1e-5
VOCABULARY = 32_000
_WARM_UP = 3
_STEPS = (3, 10)  # timed, at least and at most
_NEVER = 10**6


@dataclasses.dataclass(frozen=True)
class Case:
    """One training step.

    Attributes:
        model: Name of a preset of the experiments.
        optimizer: Optimizer of the block matrices, a key of :data:`OPTIMIZERS`.
        rank: Columns of the bases.
        in_subspace: Whether gradients are computed inside the subspaces.
        renews: Whether each step renews every basis.
        sequences: Sequences in a batch.
        tokens: Tokens in a sequence.
        byte_limit: Limit on the peak in bytes; None: no limit.
        overrides: Fields of the preset to replace.
    """

    model: str
    optimizer: str
    rank: int
    in_subspace: bool
    sequences: int
    tokens: int = 1024
    renews: bool = False
    byte_limit: int | None = None
    overrides: tuple[tuple[str, Any], ...] = ()


def _adamw(rank: int) -> optax.GradientTransformation:
    del rank
    return optax.adamw(RATE)


def _contrib_galore(rank: int) -> optax.GradientTransformation:
    galore = optax.contrib.galore(RATE, rank=rank, update_proj_gap=_NEVER)
    return layer_by_layer(galore)


def _contrib_muon(rank: int) -> optax.GradientTransformation:
    del rank
    return muon_of_stacks(RATE)


def _galore(rank: int, **options: Any) -> optax.GradientTransformation:
    basis = lowrank_optax.range_finder()
    return lowrank_optax.galore(RATE, rank, basis=basis, **options)


def _adarankgrad(rank: int, **options: Any) -> optax.GradientTransformation:
    return lowrank_optax.adarankgrad(RATE, rank, **options)


def _sumo(rank: int, **options: Any) -> optax.GradientTransformation:
    return lowrank_optax.sumo(RATE, rank, **options)


def _low_rank_muon_8_bit(rank: int) -> optax.GradientTransformation:
    return lowrank_optax.low_bit(lowrank_optax.low_rank_muon(RATE, rank), 8, 8)


def _galore_8_bit(rank: int) -> optax.GradientTransformation:
    return lowrank_optax.low_bit(_galore(rank), 8, 8)


def _adarankgrad_8_bit(rank: int) -> optax.GradientTransformation:
    return lowrank_optax.low_bit(_adarankgrad(rank), 8, 4)


THEIRS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "adamw": _adamw,
    "contrib.galore": _contrib_galore,
    "contrib.muon": _contrib_muon,
}
OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    **THEIRS,
    "galore": _galore,
    "adarankgrad": _adarankgrad,
    "sumo": _sumo,
    "low_rank_muon 8-bit": _low_rank_muon_8_bit,
    "galore 8-bit, basis 8-bit": _galore_8_bit,
    "adarankgrad 8-bit, basis 4-bit": _adarankgrad_8_bit,
}


def measure(write: records.Write, case: Case, deadline: float) -> None:
    """Compiles and times the step, and writes the results after each part.

    Args:
        write: Function of the results so far.
        case: The step.
        deadline: Time of ``time.monotonic``. Close to it, fewer steps are timed.
    """
    found: dict[str, Any] = {**dataclasses.asdict(case), "bytes": {}}
    del found["overrides"]
    shapes, loss = _model(case)
    tx = _partitioned(case)
    gradients = "subspace" if case.in_subspace else "full"
    step = lowrank_optax.train_step(loss, tx, gradients=gradients)

    def make(seed):
        params = filled.params_like(shapes, seed)
        return params, step.state_of(params, filled.state_like(tx, params, seed))

    # The seed is an argument, so that XLA does not fold the arrays at compile time.
    seed = jnp.uint32(0)
    batch = filled.tokens((case.sequences, case.tokens + 1), _vocabulary(shapes))
    started = time.perf_counter()
    lowered = step.lower(*jax.eval_shape(make, seed), batch, renews=case.renews)
    traced = time.perf_counter()
    compiled = lowered.compile()
    found["trace_seconds"] = traced - started
    found["compile_seconds"] = time.perf_counter() - traced
    plan = lowrank_optax.memory_plan(tx, shapes, compiled)
    found["planned_bytes"] = {
        "parameters": plan.parameter_bytes,
        "full_gradients": plan.gradient_bytes,
        "state": plan.optimizer_bytes,
        **(plan.compiled or {}),
    }
    write(found)
    params, state = jax.block_until_ready(jax.jit(make)(seed))
    found["bytes"]["before_steps"] = _device_bytes("bytes_in_use")
    write(found)

    def seconds() -> float:
        nonlocal params, state
        start = time.perf_counter()
        after = compiled(params, (), state, batch, ())
        params, _, state, metrics, _ = jax.block_until_ready(after)
        taken = time.perf_counter() - start
        found["loss"] = float(metrics["loss"])
        return taken

    warm = [seconds() for _ in range(_WARM_UP)][-1]
    left = deadline - time.monotonic()
    count = max(_STEPS[0], min(_STEPS[1], int(min(left, 6.0) / warm)))
    times = sorted(seconds() for _ in range(count))
    median = times[len(times) // 2]
    found["milliseconds"] = {
        "median": 1e3 * median,
        "min": 1e3 * times[0],
        "max": 1e3 * times[-1],
        "steps": count,
    }
    found["tokens_per_second"] = case.sequences * case.tokens / median
    peak = _device_bytes("peak_bytes_in_use")
    found["bytes"] |= {"peak": peak, "limit": _device_bytes("bytes_limit")}
    if peak is not None:
        found["peak_to_planned"] = peak / found["planned_bytes"]["peak"]
        if case.byte_limit is not None:
            found["is_inside_limit"] = peak <= case.byte_limit
    write(found)


def _model(case: Case) -> tuple[Any, Callable[[Any, jax.Array], jax.Array]]:
    """Returns the parameters' shapes and the mean loss of the next token."""
    # Imported here, so that the other stages do not need the model.
    from experiments.model.llama import apply, init_params
    from experiments.model.shape import preset

    overrides: dict[str, Any] = {
        "remat": True,
        "compute_dtype": "bfloat16",
        "param_dtype": "bfloat16",
        **dict(case.overrides),
    }
    vocabulary = overrides.pop("vocab_size", VOCABULARY)
    config = preset(case.model, vocabulary, **overrides)
    shapes = jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))

    def loss(params, batch):
        logits = apply(config, params, batch[:, :-1])
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:])
        return jnp.mean(nats)

    return shapes, loss


def _vocabulary(shapes: Any) -> int:
    return shapes["embedding"].shape[0]


def _partitioned(case: Case) -> optax.GradientTransformation:
    """Returns the optimizer of the block matrices, and AdamW for the rest."""
    rest = optax.adamw(RATE)
    if case.byte_limit is not None:
        rest = lowrank_optax.low_bit(rest)

    def group(leaf) -> str:
        return "blocks" if leaf.ndim == 3 else "rest"

    options = {"refresh": lowrank_optax.every(1)} if case.renews else {}
    blocks = OPTIMIZERS[case.optimizer](case.rank, **options)
    return optax.partition(
        {"blocks": blocks, "rest": rest},
        functools.partial(jax.tree.map, group),
    )


def _device_bytes(name: str) -> int | None:
    """Returns a statistic of the device itself, or None."""
    return (jax.local_devices()[0].memory_stats() or {}).get(name)

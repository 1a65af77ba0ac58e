"""Time, memory and traffic of a training step with gradients inside the subspaces.

The step is compared with ``optax.adamw`` and ``optax.contrib.galore``, side by side in
one run. The model is a LLaMA of d = 512, 8 scanned layers and f = 1,376 with a small
vocabulary; a batch has 2,048 tokens, float32. A refresh counts with 1/200 of its time.
"""

import argparse
import functools
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax

import lowrank_optax
from benchmarks import harness
from benchmarks.memory import bytes_of, loss_of
from experiments.model.groups import parameter_groups
from experiments.model.llama import init_params
from experiments.model.shape import preset
from experiments.optim.unstacked import unstacked

SEQUENCES, TOKENS = 8, 256
INTERVAL = 200  # steps between two refreshes


def on_blocks(blocks: optax.GradientTransformation) -> optax.GradientTransformation:
    """Returns an optimizer of the block matrices, and AdamW for the rest."""
    adamw = optax.adamw(1e-3)

    def groups(params):
        found = parameter_groups(params)
        return jax.tree.map(lambda x: "blocks" if x == "blocks" else "rest", found)

    return optax.partition({"blocks": blocks, "rest": adamw}, groups)


def steps(model, rank: int) -> dict[str, tuple[Any, Any]]:
    """Returns name -> (optimizer, step): (params, state, tokens) -> the same, loss."""
    loss = loss_of(model)
    ours = on_blocks(
        lowrank_optax.scale_by_low_rank(
            optax.scale_by_adam(),
            rank,
            basis=lowrank_optax.range_finder(),
            refresh=lowrank_optax.every(INTERVAL, stagger=False),
            scale=1e-3,
        )
    )
    theirs = on_blocks(
        unstacked(optax.contrib.galore(1e-3, rank=rank, update_proj_gap=INTERVAL))
    )
    gradient = lowrank_optax.subspace_value_and_grad(loss, ours)
    plain = jax.value_and_grad(loss)

    def step(tx, gradient, **static):
        def run(params, state, tokens):
            value, grads, state = gradient(params, state, tokens)
            updates, state = tx.update(grads, state, params, **static)
            return optax.apply_updates(params, updates), state, value

        return jax.jit(run, donate_argnums=(0, 1))

    def full(params, state, tokens):
        return *plain(params, tokens), state

    adamw = optax.adamw(1e-3)
    return {
        "subspace": (ours, step(ours, gradient, refresh=False)),
        "refresh": (ours, step(ours, gradient.full)),
        # The largest stack.
        "refresh apart": (
            ours,
            step(ours, gradient.renewing("['blocks']['mlp']['gate']")),
        ),
        "adamw": (adamw, step(adamw, full)),
        "contrib.galore": (theirs, step(theirs, full)),
    }


def memory(compiled: Any) -> dict[str, int]:
    """Returns XLA's bytes of a compiled step."""
    analysis = compiled.memory_analysis()
    live = analysis.argument_size_in_bytes + analysis.output_size_in_bytes
    return {
        "arguments": analysis.argument_size_in_bytes,
        "temporaries": analysis.temp_size_in_bytes,
        "peak": live - analysis.alias_size_in_bytes + analysis.temp_size_in_bytes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--rounds", type=int, default=10, help="of each comparison")
    parser.add_argument("--remat", action="store_true", help="recompute each layer")
    arguments = parser.parse_args()
    model = preset("60m", 256, remat=arguments.remat)
    found = {
        f"rank {rank}": compare(model, rank, arguments.rounds)
        for rank in arguments.ranks
    }
    name = "step-60m" + ("-remat" if arguments.remat else "")
    harness.save(name, found)


def compare(model, rank: int, rounds: int) -> dict[str, Any]:
    """Times the steps in turns; prints and returns the results."""
    tokens = jax.random.randint(
        jax.random.key(1), (SEQUENCES, TOKENS + 1), 0, model.vocab_size
    )
    draw = jax.jit(functools.partial(init_params, model))
    compiled, carried, found = {}, {}, {"memory": {}, "compile_seconds": {}}
    for name, (tx, step) in steps(model, rank).items():
        params = draw(jax.random.key(0))
        state = jax.jit(tx.init)(params)
        started = time.perf_counter()
        compiled[name] = step.lower(params, state, tokens).compile()
        found["compile_seconds"][name] = time.perf_counter() - started
        found["memory"][name] = {**memory(compiled[name]), "state": bytes_of(state)}
        if name not in ("subspace", "refresh apart"):
            # Every first step of ours and of theirs is a refresh.
            carried[name] = compiled[name](params, state, tokens)[:2]
    names = ("subspace", "adamw", "contrib.galore")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    state_of = {"subspace": "refresh"}
    for _ in range(rounds + 1):
        for name, times in seconds.items():
            who = state_of.get(name, name)
            params, state = carried[who]
            started = time.perf_counter()
            *new, loss = jax.block_until_ready(compiled[name](params, state, tokens))
            times.append(time.perf_counter() - started)
            assert jnp.isfinite(loss)
            carried[who] = tuple(new)
    refreshes = []
    for name in ("refresh", "contrib.galore"):
        params = draw(jax.random.key(0))
        tx = steps(model, rank)[name][0]
        state = jax.jit(tx.init)(params)
        jax.block_until_ready((params, state))
        started = time.perf_counter()
        jax.block_until_ready(compiled[name](params, state, tokens))
        refreshes.append(time.perf_counter() - started)
    # The first round warms up.
    seconds = {name: times[1:] for name, times in seconds.items()}
    ours = amortised(seconds["subspace"], refreshes[0])
    theirs = amortised(seconds["contrib.galore"], refreshes[1])
    found |= {
        "seconds": seconds,
        "refresh_seconds": {"ours": refreshes[0], "contrib.galore": refreshes[1]},
        "against_adamw": ratios(ours, seconds["adamw"]),
        "against_contrib.galore": ratios(ours, theirs),
    }
    for who in ("against_adamw", "against_contrib.galore"):
        pairs = " ".join(f"{x:.3f}" for x in found[who]["pairs"])
        print(
            f"rank {rank} {who}: median {found[who]['median']:.3f} "
            f"({found[who]['least']:.3f} to {found[who]['most']:.3f}); {pairs}"
        )
    for name, row in found["memory"].items():
        sizes = (f"{k} {v / 1e6:.1f} MB" for k, v in row.items())
        print(f"rank {rank} {name:16}", *sizes)
    return found


def amortised(times: list[float], refresh: float) -> list[float]:
    """Returns the times with a refresh's share in each."""
    return [((INTERVAL - 1) * x + refresh) / INTERVAL for x in times]


def ratios(ours: list[float], theirs: list[float]) -> dict[str, Any]:
    """Returns ours / theirs, pair by pair."""
    pairs = [a / b for a, b in zip(ours, theirs, strict=True)]
    return {
        "pairs": pairs,
        "median": statistics.median(pairs),
        "least": min(pairs),
        "most": max(pairs),
    }


if __name__ == "__main__":
    main()

"""Time, memory and compilation of whole training steps, by ``train_step``.

Steps with gradients inside the subspaces are compared with ``optax.adamw`` and
``optax.contrib.galore``, side by side in one run. The model is a LLaMA of d = 512, 8
scanned layers and f = 1,376 with a small vocabulary; a batch has 2,048 tokens, float32.
A renewal counts with 1/200 of its time. The limit is forward and backward without the
gradient of any weight of the blocks, timed in the same turns: no update at all.
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
INTERVAL = 200  # steps between two renewals


def on_blocks(blocks: optax.GradientTransformation) -> optax.GradientTransformation:
    """Returns an optimizer of the block matrices, and AdamW for the rest."""
    adamw = optax.adamw(1e-3)

    def groups(params):
        found = parameter_groups(params)
        return jax.tree.map(lambda x: "blocks" if x == "blocks" else "rest", found)

    return optax.partition({"blocks": blocks, "rest": adamw}, groups)


def optimizers(rank: int) -> dict[str, optax.GradientTransformation]:
    """Returns the optimizers that are compared."""
    ours = lowrank_optax.scale_by_low_rank(
        optax.scale_by_adam(),
        rank,
        basis=lowrank_optax.range_finder(),
        refresh=lowrank_optax.every(INTERVAL, stagger=False),
        scale=1e-3,
    )
    theirs = optax.contrib.galore(1e-3, rank=rank, update_proj_gap=INTERVAL)
    return {
        "ours": on_blocks(ours),
        "adamw": optax.adamw(1e-3),
        "contrib.galore": on_blocks(unstacked(theirs)),
    }


def limit_of(loss: Any) -> Any:
    """Returns forward and backward without gradients of the blocks' weights."""

    @jax.jit
    def run(params, tokens):
        # The gradient goes to the embedding, and on its way through every layer.
        rest = {name: x for name, x in params.items() if name != "blocks"}

        def of(rest):
            return loss({**rest, "blocks": params["blocks"]}, tokens)

        return jax.value_and_grad(of)(rest)

    return run


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


class _Runner:
    """One optimizer's steps, compiled, with parameters and state of their own.

    Attributes:
        programs: Name of a program -> the program.
        compile_seconds: By the same names.
        state_bytes: Of the optimizer's state.
    """

    def __init__(self, loss, optimizer, params, tokens, kinds: dict[str, Any]):
        self._tokens = tokens
        self.programs, self.compile_seconds = {}, {}
        for name, (options, renews) in kinds.items():
            step = lowrank_optax.train_step(loss, optimizer, **options)
            state = step.init(params)
            started = time.perf_counter()
            lowered = step.lower(params, state, tokens, renews=renews)
            self.programs[name] = lowered.compile()
            self.compile_seconds[name] = time.perf_counter() - started
        self.state_bytes = bytes_of(state.optimizer)
        self._held = [params, state]

    def seconds(self, name: str) -> float:
        """Runs a program once, and returns its time."""
        params, state = self._held
        started = time.perf_counter()
        params, _, state, metrics, _ = jax.block_until_ready(
            self.programs[name](params, (), state, self._tokens, ())
        )
        seconds = time.perf_counter() - started
        assert jnp.isfinite(metrics["loss"])
        self._held = [params, state]
        return seconds

    def renewal(self) -> float:
        """Returns the seconds of a step that renews all bases from sketches.

        The counters are those of the start, where all bases are due.
        """
        params, state = self._held
        first = jax.tree.map(
            lambda x: x * 0 if jnp.issubdtype(x.dtype, jnp.integer) else x, state
        )
        self._held = [params, first]
        return self.seconds("renewal by sketches")


# Program -> options of train_step, and whether the program renews bases.
KINDS: dict[str, dict[str, tuple[dict[str, Any], bool]]] = {
    "ours": {
        "subspace": ({}, False),
        "renewal by sketches": ({}, True),
        "renewal by full gradients": ({"refresh": "full"}, True),
    },
    "adamw": {"adamw": ({}, False)},
    "contrib.galore": {"contrib.galore": ({}, False)},
}


def compare(model, rank: int, rounds: int) -> dict[str, Any]:
    """Times the steps in turns; prints and returns the results."""
    tokens = jax.random.randint(
        jax.random.key(1), (SEQUENCES, TOKENS + 1), 0, model.vocab_size
    )
    draw = jax.jit(functools.partial(init_params, model))
    loss = loss_of(model)
    runners = {
        name: _Runner(loss, optimizer, draw(jax.random.key(0)), tokens, KINDS[name])
        for name, optimizer in optimizers(rank).items()
    }
    found: dict[str, Any] = {"memory": {}, "compile_seconds": {}}
    for runner in runners.values():
        for name, program in runner.programs.items():
            found["compile_seconds"][name] = runner.compile_seconds[name]
            found["memory"][name] = {**memory(program), "state": runner.state_bytes}
    # Every first step of ours and of theirs renews.
    first = runners["contrib.galore"].seconds("contrib.galore")
    renewals = {"contrib.galore": first}
    for name in ("renewal by full gradients", "renewal by sketches"):
        runners["ours"].seconds(name)
    limit, params = limit_of(loss), draw(jax.random.key(0))
    jax.block_until_ready(limit(params, tokens))

    def of_limit():
        started = time.perf_counter()
        jax.block_until_ready(limit(params, tokens))
        return time.perf_counter() - started

    turns = {
        "subspace": lambda: runners["ours"].seconds("subspace"),
        "adamw": lambda: runners["adamw"].seconds("adamw"),
        "contrib.galore": lambda: runners["contrib.galore"].seconds("contrib.galore"),
        "limit": of_limit,
    }
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for number in range(rounds + 1):
        for name, turn in turns.items():
            one = turn()
            # The first round warms up.
            if number:
                seconds[name].append(one)
    renewals["ours"] = runners["ours"].renewal()
    ours = amortised(seconds["subspace"], renewals["ours"])
    theirs = amortised(seconds["contrib.galore"], renewals["contrib.galore"])
    found |= {
        "seconds": seconds,
        "renewal_seconds": renewals,
        "against_adamw": ratios(ours, seconds["adamw"]),
        "against_contrib.galore": ratios(ours, theirs),
        "limit_against_adamw": ratios(seconds["limit"], seconds["adamw"]),
    }
    _tell(rank, found)
    return found


def _tell(rank: int, found: dict[str, Any]) -> None:
    for who in ("against_adamw", "against_contrib.galore", "limit_against_adamw"):
        pairs = " ".join(f"{x:.3f}" for x in found[who]["pairs"])
        print(
            f"rank {rank} {who}: median {found[who]['median']:.3f} "
            f"({found[who]['least']:.3f} to {found[who]['most']:.3f}); {pairs}"
        )
    for name, row in found["memory"].items():
        sizes = (f"{k} {v / 1e6:.1f} MB" for k, v in row.items())
        compiled = found["compile_seconds"][name]
        print(f"rank {rank} {name:26}", *sizes, f"compiled in {compiled:.1f} s")
    print(f"rank {rank} seconds of a renewing step:", found["renewal_seconds"])


def amortised(times: list[float], refresh: float) -> list[float]:
    """Returns the times with a renewal's share in each."""
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

"""Trains a small LLaMA for a while, and measures what the figures of concepts show.

    python -m docs.figures.states

Two runs of ``tiny`` on the bytes of Python's standard library, 8 sequences of 128 bytes
a step: one with bases of a fixed rank, renewed every 50 steps, and one whose rank
follows the gradients. They take about two minutes on two CPU cores. What was measured
goes to ``states.json`` beside this file; nothing else is kept.
"""

import json
import platform
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lowrank_optax
from docs.figures.style import STATES
from experiments.data.pipeline import make_data
from experiments.data.tokenizers import load_tokenizer
from experiments.model.groups import parameter_groups
from experiments.model.llama import apply, init_params
from experiments.model.shape import preset

RANK = 32
INTERVAL = 50
STEPS = 200
# Share of a gradient's squared norm that the ranks of the second figure may lose.
THRESHOLD = 0.05
SPECTRUM = "['blocks']['mlp']['up']"
SPECTRUM_STEPS = (0, 20, STEPS - 1)
SECOND_MOMENT = "['blocks']['attention']['value']"
LAYER = 1

CAPACITY = 48
CAPACITY_STEPS = 240
CAPACITY_LEAF = "['blocks']['mlp']['down']"
# After so many steps of the second run: arrays cut, and grown.
COMPACTED, RESIZED, RESIZED_TO = 80, 160, 40
BUCKET = 8


def measure() -> dict[str, Any]:
    """Returns what ``states.json`` holds; its keys are the names of figures."""
    measured = {
        "command": "python -m docs.figures.states",
        "model": "tiny",
        "text": f"standard library of Python {platform.python_version()}",
        "versions": {"jax": jax.__version__, "optax": optax.__version__},
    }
    return measured | _fixed_rank() | {"capacity": _falling_rank()}


def _fixed_rank() -> dict[str, Any]:
    """Returns the measurements of the run with bases of a fixed rank."""
    method = lowrank_optax.scale_by_low_rank(
        optax.scale_by_adam(),
        RANK,
        basis=lowrank_optax.range_finder(power_iterations=1),
        refresh=lowrank_optax.every(INTERVAL, stagger=False),
        rebase="square",
    )
    spectra, needed, in_use, best = {}, [], [], []
    seen: list[np.ndarray] = []
    second: dict[str, list[float]] = {}
    last = STEPS - INTERVAL
    bases: dict[str, np.ndarray] = {}
    for step, (grads, state) in enumerate(_steps(method, STEPS)):
        energies = {name: _energies(g) for name, g in grads.items()}
        if step in SPECTRUM_STEPS:
            spectra[step] = _numbers(np.cumsum(energies[SPECTRUM][LAYER])[:64])
        needed.append({name: _needed(e) for name, e in energies.items()})
        old = bases
        found = lowrank_optax.subspaces(state)
        bases = {name: np.asarray(subspace.basis) for name, subspace in found.items()}
        in_use.append({n: _captured(g, bases[n]) for n, g in grads.items()})
        best.append({n: e[:, :RANK].sum(-1) for n, e in energies.items()})
        if step == last:
            # The update that renews the basis does so before it adds its gradient.
            pair = (old[SECOND_MOMENT][LAYER], bases[SECOND_MOMENT][LAYER])
            second = _second_moments(*pair, seen)
        seen.append(grads[SECOND_MOMENT][LAYER])
    late = range(INTERVAL, STEPS)
    return {
        "subspace": {"leaf": SPECTRUM, "layer": LAYER, "captured": spectra},
        "rank": {
            "threshold": THRESHOLD,
            "needed": {n: _numbers(x[n].mean() for x in needed) for n in needed[0]},
        },
        "refresh": {
            "rank": RANK,
            "interval": INTERVAL,
            "in_use": _numbers(_mean_of_all(x) for x in in_use),
            "best": _numbers(_mean_of_all(x) for x in best),
        },
        "residual": {
            "rank": RANK,
            "steps": [late[0], late[-1]],
            "outside": {
                n: _number(np.mean([1 - in_use[t][n] for t in late])) for n in needed[0]
            },
            "least": {
                n: _number(np.mean([1 - best[t][n] for t in late])) for n in needed[0]
            },
        },
        "rebasing": {"leaf": SECOND_MOMENT, "step": last, "factor": second},
    }


def _falling_rank() -> dict[str, Any]:
    """Returns ranks and capacities of one leaf in the run whose rank follows."""
    rule = lowrank_optax.energy_rank(CAPACITY, threshold=0.02, min_rank=4)
    method = lowrank_optax.scale_by_low_rank(
        optax.scale_by_adam(), rule, refresh=lowrank_optax.every(20, stagger=False)
    )

    def between(step: int, state: Any) -> Any:
        if step == COMPACTED:
            return lowrank_optax.compact(state, bucket=BUCKET)
        if step == RESIZED:
            return lowrank_optax.resize(state, RESIZED_TO)
        return state

    ranks, capacities, sizes = [], [], []
    for _, state in _steps(method, CAPACITY_STEPS, between):
        ranks.append(lowrank_optax.ranks(state)[CAPACITY_LEAF].tolist())
        capacities.append(lowrank_optax.capacities(state)[CAPACITY_LEAF])
        blocks = state.inner_states["blocks"]
        sizes.append(int(sum(x.nbytes for x in jax.tree.leaves(blocks))))
    return {
        "leaf": CAPACITY_LEAF,
        "ranks": ranks,
        "capacities": capacities,
        "block_state_bytes": sizes,
        "compacted": COMPACTED,
        "resized": RESIZED,
    }


def _steps(
    method: optax.GradientTransformation,
    steps: int,
    between: Callable[[int, Any], Any] = lambda step, state: state,
) -> Iterator[tuple[dict[str, np.ndarray], Any]]:
    """Trains, and yields oriented gradients (4, a, b) of the blocks, and the state.

    Args:
        method: Of the block matrices; embedding, head and norms have AdamW.
        steps: Of training.
        between: (step, state) -> the state with which this step begins.
    """
    tokenizer = load_tokenizer("bytes")
    model = preset("tiny", tokenizer.vocab_size)
    data = make_data("embedded", tokenizer, batch_size=8, sequence_length=128, seed=0)
    params = init_params(model, jax.random.key(0))

    def rate(peak):
        curve = optax.warmup_cosine_decay_schedule(0, peak, 20, steps, 0.1 * peak)
        return optax.scale_by_learning_rate(lambda count: curve(count + 1))

    rest = optax.chain(optax.scale_by_adam(), rate(16e-3))
    groups: dict[Hashable, optax.GradientTransformation] = {
        "blocks": optax.chain(method, rate(4e-3)),
        "rest": rest,
        "norms": rest,
    }
    optimizer = optax.partition(groups, parameter_groups)
    clip = optax.clip_by_global_norm(1.0)

    def loss_fn(params, batch):
        logits = apply(model, params, batch["inputs"])
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
        return nats.mean()

    @jax.jit
    def one_step(params, state, batch):
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        grads, _ = clip.update(grads, optax.EmptyState())
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss, grads

    views = {
        name: plan.view
        for name, plan in lowrank_optax.projections(optimizer, params).items()
        if plan.is_projected and plan.view is not None
    }
    state = jax.jit(optimizer.init)(params)
    batches = data.train_iterator()
    for step in range(steps):
        state = between(step, state)
        params, state, loss, grads = one_step(params, state, next(batches))
        if step % 20 == 0:
            print(f"step {step}, loss {float(loss):.3f}")
        by_name = {
            jax.tree_util.keystr(path): leaf
            for path, leaf in jax.tree.leaves_with_path(grads)
        }
        oriented = {n: np.asarray(v.oriented(by_name[n])) for n, v in views.items()}
        yield oriented, state


def _energies(gradient: np.ndarray) -> np.ndarray:
    """Returns the share of the squared norm of each direction, largest first."""
    wide = gradient.astype(np.float64)
    squares = np.linalg.eigvalsh(np.swapaxes(wide, -1, -2) @ wide)[:, ::-1]
    return squares / squares.sum(-1, keepdims=True)


def _needed(energies: np.ndarray) -> np.ndarray:
    """Returns the least number of directions that keep enough, (layers,)."""
    lost = 1 - np.cumsum(energies, axis=-1)
    return np.argmax(lost <= THRESHOLD, axis=-1) + 1


def _captured(gradient: np.ndarray, basis: np.ndarray) -> np.ndarray:
    """Returns the share of the squared norm inside a basis, (layers,)."""
    inside = np.sum((gradient @ basis) ** 2, axis=(-1, -2))
    return inside / np.sum(gradient.astype(np.float64) ** 2, axis=(-1, -2))


def _second_moments(
    old: np.ndarray, new: np.ndarray, gradients: list[np.ndarray]
) -> dict[str, list[float]]:
    """Returns by what factor each rule makes updates too large, by new direction.

    The gradients of all steps, projected onto either basis, say what Adam's moments are
    in it, had it been in use from the start. A rule is given those of the old basis; a
    factor is the root of the mean of a column in the new basis by what the rule has.

    Args:
        old: The basis before; (b, r).
        new: The basis after; (b, r).
        gradients: Of all updates before the new basis came; (a, b) each.
    """

    def moments(basis: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        mu = nu = np.zeros((gradients[0].shape[0], basis.shape[1]), np.float32)
        for gradient in gradients:
            projected = gradient @ basis
            mu = 0.9 * mu + 0.1 * projected
            nu = 0.999 * nu + 0.001 * projected**2
        return mu, nu

    (mu, nu), (_, exact) = moments(old), moments(new)
    factors = {}
    for name, rule in lowrank_optax.REBASE_RULES.items():
        count = jnp.int32(len(gradients))
        before = jnp.asarray(nu), jnp.asarray(mu)
        moved = rule.second(*before, jnp.asarray(old.T @ new), count)
        ratio = exact.mean(0) / np.maximum(np.asarray(moved).mean(0), 1e-30)
        factors[name] = _numbers(np.sqrt(ratio))
    return factors


def _mean_of_all(by_leaf: dict[str, np.ndarray]) -> float:
    return float(np.mean(np.concatenate(list(by_leaf.values()))))


def _number(x: Any) -> float:
    return float(f"{float(x):.4g}")


def _numbers(values: Any) -> list[float]:
    return [_number(x) for x in values]


if __name__ == "__main__":
    lines = (f"{json.dumps(k)}: {json.dumps(v)}" for k, v in measure().items())
    STATES.write_text("{" + ",\n".join(lines) + "}\n", encoding="utf-8")

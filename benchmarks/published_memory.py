"""The papers' memory tables, recomputed from the shapes of the models.

The published tables are AdaRankGrad's Table 4 (parameters and optimizer state in
bfloat16, 60M to 1B) and Table 3 (7B in 8 bits). The paper does not say whether "G" is
10^9 or 2^30. No model runs here.
"""

import functools
from collections.abc import Hashable
from typing import Any

import jax
import optax

import lowrank_optax
from benchmarks import harness
from experiments.model.groups import parameter_groups
from experiments.model.llama import init_params
from experiments.model.shape import preset

VOCABULARY = 32_000
RANKS = {"60m": 128, "130m": 256, "350m": 256, "1b": 512, "7b": 1024}
PUBLISHED = {
    "full rank": {"60m": 0.36, "130m": 0.76, "350m": 2.06, "1b": 7.80},
    "GaLore": {"60m": 0.24, "130m": 0.52, "350m": 1.22, "1b": 4.38},
    "AdaRankGrad": {"60m": 0.206, "130m": 0.497, "350m": 1.106, "1b": 3.62},
}
PUBLISHED_8_BIT = {"8-bit Adam": 26.0, "8-bit GaLore": 18.0, "8-bit AdaRankGrad": 16.4}


def model_shapes(size: str) -> Any:
    """Returns the parameters as shapes, bfloat16."""
    model = preset(size, VOCABULARY, param_dtype="bfloat16")
    return jax.eval_shape(functools.partial(init_params, model), jax.random.key(0))


def on_blocks(blocks: optax.GradientTransformation) -> optax.GradientTransformation:
    """Returns an optimizer with AdamW outside the blocks, as in the papers."""
    rest = optax.adamw(1e-3)
    groups: dict[Hashable, optax.GradientTransformation] = {
        "blocks": blocks,
        "rest": rest,
        "norms": rest,
    }
    return optax.partition(groups, parameter_groups)


def numbers(plan: Any) -> int:
    """Returns the number of values of parameters and state, without scalars."""
    total = 0
    for leaf in plan.leaves:
        # Moments of leaves at full size have the parameters' dtype.
        size = 4 if leaf.is_projected else 2
        held = sum(v for name, v in leaf.bytes.state.items() if name != "scalars")
        total += leaf.bytes.parameters // 2 + held // size
    return total


def bfloat16_table() -> dict[str, dict[str, float]]:
    """Returns GB by method and size, every number counted as two bytes."""
    found: dict[str, dict[str, float]] = {}
    for size in PUBLISHED["full rank"]:
        params, rank = model_shapes(size), RANKS[size]
        optimizers = {
            "full rank": optax.adamw(1e-3),
            "GaLore, short side": on_blocks(lowrank_optax.galore(1e-3, rank)),
            "GaLore, long side": on_blocks(
                lowrank_optax.galore(1e-3, rank, side="long")
            ),
            "projected at 0.75 of the rank, long side": on_blocks(
                lowrank_optax.galore(1e-3, 3 * rank // 4, side="long")
            ),
        }
        for name, optimizer in optimizers.items():
            plan = lowrank_optax.memory_plan(optimizer, params)
            found.setdefault(name, {})[size] = 2 * numbers(plan) / 1e9
    return found


def eight_bit_table() -> dict[str, dict[str, float]]:
    """Returns GB of parameters and state of 7B, by method."""
    params, rank = model_shapes("7b"), RANKS["7b"]
    galore = on_blocks(lowrank_optax.galore(1e-3, rank))
    low_bit = lowrank_optax.low_bit
    optimizers = {
        "8-bit Adam": low_bit(optax.adamw(1e-3)),
        "8-bit GaLore, basis float32": low_bit(galore),
        "8-bit GaLore, basis 8 bits": low_bit(galore, 8, 8),
        "8-bit GaLore, basis 4 bits": low_bit(galore, 8, 4),
        "8-bit, 0.75 of the rank, basis 8 bits": low_bit(
            on_blocks(lowrank_optax.galore(1e-3, 3 * rank // 4)), 8, 8
        ),
    }
    plans = {
        name: lowrank_optax.memory_plan(optimizer, params)
        for name, optimizer in optimizers.items()
    }
    return {
        name: {
            "state": plan.optimizer_bytes / 1e9,
            "parameters and state": (plan.parameter_bytes + plan.optimizer_bytes) / 1e9,
        }
        for name, plan in plans.items()
    }


def main() -> None:
    harness.parse_no_flags(__doc__)
    found, eight_bit = bfloat16_table(), eight_bit_table()
    for name, row in PUBLISHED.items():
        print(f"{name:44}published G ", *(f"{size} {x:.3f}" for size, x in row.items()))
    for name, row in found.items():
        in_gib = {size: x * 1e9 / 2**30 for size, x in row.items()}
        for unit, values in (("GB", row), ("GiB", in_gib)):
            texts = (f"{size} {x:.3f}" for size, x in values.items())
            print(f"{name:44}{unit:12}", *texts)
    for name, value in PUBLISHED_8_BIT.items():
        print(f"7b {name:41}published G  {value:.2f}")
    for name, row in eight_bit.items():
        print(f"7b {name:53}", *(f"{k} {v:.2f}" for k, v in row.items()))
    harness.save(
        "published-memory",
        {
            "published_G": {**PUBLISHED, "7b": PUBLISHED_8_BIT},
            "recomputed_GB": found,
            "7b_GB": eight_bit,
        },
    )


if __name__ == "__main__":
    main()

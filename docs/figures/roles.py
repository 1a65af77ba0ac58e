"""The figure of roles: what is kept for which leaves, from shapes of models alone."""

from typing import Any

import jax
import optax
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

import lowrank_optax
from docs.figures.style import BLUE, GREY, ORANGE, new
from experiments.model.llama import init_params
from experiments.model.shape import MODELS, preset

SHOWN = ("60m", "350m", "7b")
VOCABULARY = 32_000
# Vectors are below a thousandth everywhere.
COLORS = {"hidden": BLUE, "vocabulary": ORANGE}


def _optimizers(hidden_size: int) -> dict[str, optax.GradientTransformation]:
    """Returns AdamW and two partitions by role, at a quarter of the hidden size."""
    muon = lowrank_optax.low_rank_muon(8e-3, rank=hidden_size // 4)
    factored = optax.chain(
        optax.scale_by_factored_rms(), optax.scale_by_learning_rate(16e-3)
    )
    few_bits = lowrank_optax.low_bit(muon, 8, 8)
    return {
        "AdamW": optax.adamw(1e-3),
        "low_rank_muon": lowrank_optax.by_role(muon, 16e-3),
        "8 bits, factored": lowrank_optax.by_role(few_bits, factored, 16e-3),
    }


def _bytes_by_role(
    optimizer: optax.GradientTransformation, params: Any
) -> dict[str, int]:
    """Returns the bytes of an optimizer's state for the leaves of each role."""
    roles = {
        jax.tree_util.keystr(path): role
        for path, role in jax.tree.leaves_with_path(lowrank_optax.roles(params))
    }
    found = dict.fromkeys((*COLORS, "vectors"), 0)
    for leaf in lowrank_optax.memory_plan(optimizer, params).leaves:
        found[roles[leaf.path]] += leaf.bytes.optimizer
    return found


def roles() -> Figure:
    """Optimizer state by role, as a share of AdamW's, for three sizes of models."""
    figure, axes = new(height=4.0)
    names, row = [], 0.0
    rows: list[float] = []
    for model in SHOWN:
        config = preset(model, VOCABULARY)
        params = jax.eval_shape(lambda c=config: init_params(c, jax.random.key(0)))
        adamw = None
        for name, tx in _optimizers(MODELS[model]["hidden_size"]).items():
            found = _bytes_by_role(tx, params)
            adamw = adamw or sum(found.values())
            left = 0.0
            for role, color in COLORS.items():
                share = found[role] / adamw
                axes.barh(row, share, left=left, color=color, height=0.75)
                left += share
            axes.annotate(
                f"{left:.1%}" if left < 0.1 else f"{left:.0%}",
                (left, row),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=9,
                color=GREY,
            )
            names.append(f"{model}: {name}")
            rows.append(row)
            row += 1
        row += 0.6
    for role, color in COLORS.items():
        axes.barh([0], [0], color=color, label=role)
    axes.set_yticks(rows, names)
    axes.invert_yaxis()
    axes.set(xlabel="optimizer state, share of AdamW's bytes", xlim=(0, 1.12))
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.grid(axis="x")
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 0.02))
    return figure


FIGURES = {"roles": roles}

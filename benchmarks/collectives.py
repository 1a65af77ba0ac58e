"""What eight devices send in a training step: collectives by kind, and bytes.

``python -m benchmarks.collectives`` compiles steps of a small LLaMA for eight simulated
devices, and reads the collectives in their programs. No step runs.
"""

import json
from collections import Counter
from typing import Any

import jax
import optax
from jax.sharding import Mesh

import lowrank_optax
from benchmarks import harness
from benchmarks.collectives_tables import clipping, operations, table, total
from benchmarks.hlo import collectives
from benchmarks.sharded_llama import (
    SEQUENCES,
    compiled_step,
    model_of,
    sharded_params,
)
from benchmarks.tables import markdown
from experiments.distribution.mesh import make_mesh

RANK = 32  # c * r, of a hidden size of 256
LAYERS = (2, 8, 16)
MESHES = ("data=8", "data=2,fsdp=4")
# Measured without clipping too, with gradients at full size and in subspaces.
CLIPPED = (("optax.adamw", "full"), ("galore", "subspace"))
NOTE = """\
The steps renew no basis. An operation in a loop counts once, and its bytes count at
each run of the loop. MB: of the whole arrays that a group of devices gathers, adds up
or exchanges. Sent: by one device, if a ring of devices does it. XLA's CPU backend has
no reduce-scatter: an all-reduce and a slice stand in its place, and send twice as much.
"""

Rows = list[dict[str, Any]]


def optimizers() -> dict[str, optax.GradientTransformation]:
    """Returns the optimizers; beside ours, AdamW has vocabulary and vectors."""
    ours = {
        "galore": lowrank_optax.galore(1e-3, RANK),
        "adarankgrad": lowrank_optax.adarankgrad(1e-3, RANK),
        "sumo": lowrank_optax.sumo(1e-3, RANK),
        "vlorp c=4": lowrank_optax.vlorp(1e-3, RANK // 4, 4),
        "projfactor c=4": lowrank_optax.projfactor(1e-3, RANK // 4, 4),
        "low_rank_muon": lowrank_optax.low_rank_muon(1e-3, RANK),
    }
    muon = optax.contrib.muon(1e-3, muon_weight_dimension_numbers=_axes_of_muon)
    return {
        "optax.adamw": optax.adamw(1e-3),
        "optax.contrib.muon": muon,
        **{name: lowrank_optax.by_role(tx, 1e-3) for name, tx in ours.items()},
    }


def _axes_of_muon(params: Any) -> Any:
    axes = optax.contrib.MuonDimensionNumbers(-2, -1)
    return jax.tree.map(lambda x: axes if x.ndim == 3 else None, params)


def gradients_of(name: str) -> tuple[str, ...]:
    """Returns the kinds of gradients that an optimizer takes."""
    needs_full = name.startswith("optax.") or name == "low_rank_muon"
    return ("full",) if needs_full else ("full", "subspace")


def measured(
    tx: optax.GradientTransformation, layers: int, mesh: Mesh, gradients: str
) -> Rows:
    """Returns the collectives of a step; operations alike are one row."""
    text = compiled_step(model_of(layers), tx, mesh, gradients == "subspace")
    found, in_renewals = collectives(text, mesh.size)
    assert not in_renewals
    counts = Counter(x._replace(line="") for x in found)
    return [
        {
            **{name: x for name, x in one._asdict().items() if name != "line"},
            "sent": one.sent,
            "operations": count,
        }
        for one, count in sorted(counts.items())
    ]


def per_layer(rows: dict[int, Rows]) -> float:
    """Returns the numbers that one layer's matrices move.

    These are the numbers that a further layer adds, without its two norms.
    """
    few, many = LAYERS[1:]
    added = total(rows[many], "numbers") - total(rows[few], "numbers")
    return added / (many - few) - 2 * model_of(1).hidden_size


def measurement(
    name: str, tx: optax.GradientTransformation, gradients: str, mesh: Mesh
) -> dict[str, Any]:
    """Returns all that is said of one optimizer on one mesh."""
    clipped = optax.chain(optax.clip_by_global_norm(1.0), tx)
    rows = {n: measured(clipped, n, mesh, gradients) for n in LAYERS}
    found: dict[str, Any] = {"optimizer": name, "gradients": gradients}
    if mesh.shape["data"] == mesh.size:
        # Nothing is cut: no parameters are among what a layer's matrices move.
        blocks = jax.tree.leaves(sharded_params(model_of(1), mesh)["blocks"])
        bound = RANK * sum(sum(x.shape[1:]) for x in blocks if x.ndim == 3)
        found["of_a_plus_b_times_r"] = per_layer(rows) / bound
    if (name, gradients) in CLIPPED:
        plain = measured(tx, LAYERS[1], mesh, gradients)
        with_norm = rows[LAYERS[1]]
        found["clipping"] = {
            "numbers": total(with_norm, "numbers") - total(plain, "numbers"),
            "operations": operations(with_norm) - operations(plain),
        }
    return {**found, "collectives": rows}


def main() -> None:
    harness.parse_no_flags(__doc__)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    found: dict[str, list[dict[str, Any]]] = {}
    for label in MESHES:
        mesh = make_mesh(label, SEQUENCES)
        found[label] = [
            measurement(name, tx, gradients, mesh)
            for name, tx in optimizers().items()
            for gradients in gradients_of(name)
        ]
    record = {"environment": harness.environment(), "measurements": found}
    path = harness.RESULTS / "collectives.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(NOTE)
    written = json.loads(path.read_text())["measurements"]
    for rows in (*(table(mesh, written) for mesh in MESHES), clipping(written)):
        print(markdown(rows))


if __name__ == "__main__":
    main()

"""Training steps compiled for a mesh that is not here: bytes, and what devices send.

``python -m benchmarks.sharded_compile --model 7b --mesh data=8,fsdp=8`` compiles the
experiment's own step ahead of time, for simulated devices. No array of the model is
made, and no step runs.
"""

import argparse
import dataclasses
import functools
import json
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import optax

import lowrank_optax
from benchmarks import harness
from benchmarks.hlo import Collective, collectives
from experiments.distribution.mesh import make_mesh, planned_mesh
from experiments.distribution.mesh import rows as cut_by_rows
from experiments.distribution.rules import (
    bytes_per_device,
    memory_plan,
    on_mesh,
    parameter_shardings,
    placed_shapes,
)
from experiments.model.adapters import adapted
from experiments.model.llama import apply
from experiments.model.shape import LlamaConfig, preset
from experiments.optim.methods import gradients_of
from experiments.run.config import parse
from experiments.run.flags import Config
from experiments.run.plans import on_a_device, shapes_of
from experiments.run.step import BATCH, make_train_step, summed_token_loss

VOCABULARY = 32_000


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="7b")
    parser.add_argument("--layers", type=int, help="fewer than the model's own")
    parser.add_argument("--mesh", default="data=8,fsdp=8")
    parser.add_argument("--sequence-length", type=int, default=1024)
    parser.add_argument("--optimizer", default="adamw,adarankgrad,low_rank_muon,sumo")
    parser.add_argument("--no-renewal", action="store_true", help="that program alone")
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "sharded-7b.json")
    return parser.parse_args()


def measured(config: Config, model: LlamaConfig, renews: bool) -> dict[str, Any]:
    """Returns the plan and, by program, what was compiled.

    Args:
        config: Of the run; its batch has a sequence for each device.
        model: Shape of its model.
        renews: Whether to compile the program with a renewal too.
    """
    config, tx, shapes = shapes_of(config, model)
    mesh = make_mesh(config.mesh, config.batch_size)
    placed = on_mesh(shapes, parameter_shardings(shapes, mesh))
    params, state = placed_shapes(tx, placed)
    plan = on_a_device(memory_plan(tx, params))
    own = bytes_per_device(params), bytes_per_device(state)
    assert (plan.parameters, plan.optimizer) == own, (plan, own)
    programs: dict[str, Any] = {}
    kinds = {"without renewal": False} | ({"with renewal": True} if renews else {})
    gradients = gradients_of(config)
    step = make_train_step(
        lambda p, batch: summed_token_loss(
            lambda p, tokens: apply(model, adapted(p), tokens), p, batch
        ),
        tx,
        gradients=gradients,
        refresh=config.refresh,
    )
    state = step.state_of(params, state)
    for name, renewing in kinds.items():
        batch_shape = (config.batch_size, config.sequence_length)
        batch = {
            k: jax.ShapeDtypeStruct(batch_shape, t, sharding=cut_by_rows(mesh))
            for k, t in BATCH.items()
        }
        lower = functools.partial(step.lower, renews=renewing)
        found = compiled(lower, mesh, params, state, batch)
        planned = sum(own) + sum(x.size * 4 for x in batch.values()) // mesh.size
        programs[name] = {
            "gradients": gradients,
            "planned_arguments": planned,
            "of_plan": found["bytes"]["arguments"] / planned,
            **found,
        }
        print(config.optimizer, name, told(programs[name]), flush=True)
    kinds_of_bytes = ("parameters", "gradients", "optimizer_state")
    return {
        "plan": dict(zip(kinds_of_bytes, plan, strict=True)),
        "leaves": list(leaves(tx, params)),
        "programs": programs,
    }


def leaves(tx: optax.GradientTransformation, params: Any) -> Iterator[dict[str, Any]]:
    """Yields shape, the axis that fsdp cuts, and the projection of each parameter."""
    plans = lowrank_optax.projections(tx, params)
    for path, leaf in jax.tree.leaves_with_path(params):
        name = jax.tree_util.keystr(path)
        plan, spec = plans[name], tuple(leaf.sharding.spec)
        yield {
            "path": jax.tree_util.keystr(path, simple=True, separator="/"),
            "shape": leaf.shape,
            "cut": spec.index("fsdp") if "fsdp" in spec else None,
            "rank": plan.capacity if plan.is_projected else None,
            "kept": None if plan.view is None else plan.view.kept_axes,
        }


def compiled(lower, mesh, params, state, batch) -> dict[str, Any]:
    """Returns seconds, bytes of one device and collectives of a step."""
    start = time.perf_counter()
    with jax.set_mesh(mesh):
        lowered = lower(params, state, batch)
    lowered_at = time.perf_counter()
    program = lowered.compile()
    done = time.perf_counter()
    memory = program.memory_analysis()
    return {
        "lower_seconds": lowered_at - start,
        "compile_seconds": done - lowered_at,
        "bytes": {
            "arguments": memory.argument_size_in_bytes,
            "outputs": memory.output_size_in_bytes,
            "aliased": memory.alias_size_in_bytes,
            "temporaries": memory.temp_size_in_bytes,
        },
        "collectives": list(rows(program.as_text(), mesh.size)),
    }


def rows(text: str, devices: int) -> Iterator[dict[str, Any]]:
    """Yields the collectives of a program; operations alike are one row.

    What stands behind a condition, ``conditional``, is the work of the update: there is
    none where a gradient is not finite, and no renewal where no basis is due.
    """
    for is_conditional, found in enumerate(collectives(text, devices)):
        counts = Counter(_without_names(x) for x in found)
        for one, count in sorted(counts.items(), key=lambda x: -_sent(*x)):
            yield {
                **{k: v for k, v in one._asdict().items() if k != "line"},
                "shape": one.line,
                "operations": count,
                "sent": _sent(one, count),
                "conditional": bool(is_conditional),
            }


def _without_names(one: Collective) -> Collective:
    return one._replace(line=one.line.split(" = ")[1].split(f" {one.kind}")[0])


def _sent(one: Collective, count: int) -> float:
    return count * one.sent * (one.trips or 1)


def told(program: dict[str, Any]) -> str:
    """Returns a program's numbers as one line."""
    collectives, size = program["collectives"], program["bytes"]
    sent = sum(row["sent"] for row in collectives)
    return (
        f"({program['gradients']} gradients): "
        f"traced in {program['lower_seconds']:.0f} s, "
        f"compiled in {program['compile_seconds']:.0f} s; "
        f"arguments {size['arguments'] / 1e9:.3f} GB, "
        f"{program['of_plan']:.4f} of the plan, "
        f"temporaries {size['temporaries'] / 1e9:.3f} GB; "
        f"a device sends {sent / 1e9:.3f} GB in "
        f"{sum(row['operations'] for row in collectives)} operations"
    )


def main() -> None:
    flags = arguments()
    devices = planned_mesh(flags.mesh).size
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)
    model = preset(
        flags.model,
        VOCABULARY,
        remat=True,
        max_positions=flags.sequence_length,
        param_dtype="bfloat16",
        compute_dtype="bfloat16",
    )
    if flags.layers:
        model = dataclasses.replace(model, num_layers=flags.layers)
    found: dict[str, Any] = {}
    for name in flags.optimizer.split(","):
        words = ["--model", flags.model, "--mesh", flags.mesh, "--optimizer", name]
        words += ["--batch-size", str(devices), "--remat", "--param-dtype", "bfloat16"]
        words += ["--sequence-length", str(flags.sequence_length)]
        found[name] = measured(parse(words), model, not flags.no_renewal)
        jax.clear_caches()
        record = {
            "environment": harness.environment(),
            "measurements": {
                "model": dataclasses.asdict(model) | {"name": flags.model},
                "mesh": dict(planned_mesh(flags.mesh).shape),
                "sequence_length": flags.sequence_length,
                "batch_size": devices,
                "optimizers": found,
            },
        }
        flags.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""What an update is made of on an accelerator: its program, before a compiler sees it.

For the matrices of LLaMA-60m's blocks, as one scanned stack of each kind and as leaves
of their own. Lowered for CUDA, which needs no GPU.
"""

import functools
import re

import jax
import jax.numpy as jnp
import optax
import pytest

import lowrank_optax

LAYERS, WIDTH, HIDDEN = 8, 512, 1376
BLOCK = {
    **dict.fromkeys(("q", "k", "v", "o"), (WIDTH, WIDTH)),
    **dict.fromkeys(("gate", "up"), (WIDTH, HIDDEN)),
    "down": (HIDDEN, WIDTH),
}
TREES = {
    "stacked": {name: (LAYERS, *shape) for name, shape in BLOCK.items()},
    "unstacked": {
        f"{layer}.{name}": shape
        for layer in range(LAYERS)
        for name, shape in BLOCK.items()
    },
}
OPTIMIZERS = {
    "adarankgrad": lambda: lowrank_optax.adarankgrad(1e-3, 128),
    "adamw": lambda: optax.adamw(1e-3),
}
every_tree = pytest.mark.parametrize("tree", TREES)


@functools.cache
def lowered(name: str, tree: str, refresh: bool | None = None) -> str:
    """Returns the StableHLO of one update."""
    optimizer = OPTIMIZERS[name]()
    params = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in TREES[tree].items()}
    options = {} if refresh is None else {"refresh": refresh}

    def update(updates, state, params):
        return optimizer.update(updates, state, params, **options)

    state = jax.eval_shape(optimizer.init, params)
    traced = jax.jit(update).trace(params, state, params)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


def count(text: str, operation: str) -> int:
    return len(re.findall(rf"\bstablehlo\.{operation}\b", text))


@every_tree
def test_without_renewal_nothing_is_asked_looped_or_decomposed(tree):
    text = lowered("adarankgrad", tree, refresh=False)
    assert [count(text, name) for name in ("case", "if", "while")] == [0, 0, 0]
    assert not re.findall(r"syevd|cholesky|triangular_solve|custom_call", text)


@every_tree
def test_without_renewal_it_is_at_most_twice_the_program_of_adamw(tree):
    ours = lowered("adarankgrad", tree, refresh=False)
    assert ours.count("\n") <= 2 * lowered("adamw", tree).count("\n")


@every_tree
def test_each_leaf_is_projected_and_lifted_once(tree):
    text = lowered("adarankgrad", tree, refresh=False)
    # A product in and one out, but leaves of one shape may share a function.
    calls = sum(
        count(body, "dot_general") * max(1, len(re.findall(rf"call @{name}\(", text)))
        for name, body in re.findall(
            r"func\.func (?:public|private) @(\w+)\((.*?)\n  \}", text, re.DOTALL
        )
    )
    assert calls == 2 * len(TREES[tree])


@every_tree
def test_with_renewal_one_condition_stands_in_front_of_all_leaves(tree):
    text = lowered("adarankgrad", tree, refresh=True)
    (body,) = re.findall(r"func\.func public @main\(.*?\n  \}", text, re.DOTALL)
    # Others stand inside of it, where the lines are indented further.
    outermost = "\n".join(re.findall(r"^    \S.*", body, re.MULTILINE))
    assert count(outermost, "case") + count(outermost, "if") == 1
    assert "syevd" in text
    assert not re.findall(r"syevd|cholesky|triangular_solve", outermost)


def test_a_renewal_of_leaves_of_one_kind_is_one_program():
    """Eight layers of their own take no more products than a stack of eight does."""
    stacked, unstacked = (
        count(lowered("adarankgrad", tree, refresh=True), "dot_general")
        - count(lowered("adarankgrad", tree, refresh=False), "dot_general")
        for tree in ("stacked", "unstacked")
    )
    assert unstacked == stacked > 0

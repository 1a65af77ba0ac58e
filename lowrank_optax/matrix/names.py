"""What the names of leaves and of their axes say of them: the words of the field.

Flax, Equinox, Haiku, Haliax, MaxText and Tunix name attention kernels, norms and layers
in few ways. What is not among these words says nothing.
"""

import re
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

from lowrank_optax.matrix.boxes import leaves_by_path, names_by_path

Kind = Literal["in", "fused", "out"]
"""What an attention kernel makes: queries, keys or values, several of them, outputs."""

_TOKENS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_FILLERS = {"proj", "projection", "einsum", "dense", "linear", "attention", "attn"}
_IN = {"q", "k", "v", "query", "key", "value", "queries", "keys", "values"}
_FUSED = {"qkv": 3, "kv": 2}
_OUT = {"o", "out", "output", "vec"}
_OF_VECTORS = {"scale", "bias", "weight", "w", "offset", "gamma", "beta", "g", "b"}
_LAYERS = {"layers", "blocks", "stack", "stacked", "scan", "scanned"}

# Names of axes. Those of a mesh are none of these, but for experts and stages.
_LAYER_AXES = {"layers", "layer", "scan", "stack", "qkv", "block", "blocks"}
_STACK_AXES = {"exp", "expert", "experts", "num_experts", "stage", "stages"}
_HEAD_AXES = {
    *("heads", "q_heads", "kv_heads", "kv_head", "num_heads", "q_heads_per_group"),
    *("kv", "head_dim", "head_size", "kv_head_dim", "qk_head_dim", "v_head_dim"),
}
_OTHER_AXES = {"embed", "mlp", "vocab", "joined_kv", "norm", "q_lora", "kv_lora"}


class Leaf(NamedTuple):
    """A leaf, and what is known of it.

    Attributes:
        path: Its key path.
        keys: The names on the way to it, one for each module.
        shape: Its shape.
        axes: The names of its axes, as long as the shape; () if nobody wrote them.
    """

    path: tuple
    keys: tuple[str, ...]
    shape: tuple[int, ...]
    axes: tuple[Any, ...]

    @property
    def containers(self) -> Iterable[tuple[str, ...]]:
        """The modules that it is in, the outermost first."""
        return (self.keys[:depth] for depth in range(len(self.keys)))


def named_leaves(params: Any) -> list[Leaf]:
    """Returns the leaves of a tree, with what boxes and key paths say of them."""
    names = names_by_path(params)

    def leaf(path, array):
        shape, axes = tuple(array.shape), tuple(names.get(path, ()))
        is_logical = bool({*axes} & (_LAYER_AXES | _HEAD_AXES | _OTHER_AXES))
        known = axes if is_logical and len(axes) == len(shape) else ()
        return Leaf(path, _keys(path), shape, known)

    return [leaf(*item) for item in leaves_by_path(params).items()]


def _keys(path: tuple) -> tuple[str, ...]:
    # Haiku writes the way to a module into one key.
    keys = [
        str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key))))
        for key in path
    ]
    parts = [part for key in keys for part in re.split(r"[/.]", key) if part]
    return tuple(parts) or ("",)


def _tokens(key: str) -> list[str]:
    """Returns the words of a name: "LayerNorm_0" has layer, norm, 0."""
    return [token.lower() for token in _TOKENS.findall(key)]


def is_norm(leaf: Leaf) -> bool:
    """Returns whether a leaf is of a norm, which scales or shifts vectors."""

    def named(key):
        return any(token.endswith("norm") or token == "ln" for token in _tokens(key))

    *modules, last = ("", *leaf.keys)
    return named(last) or (named(modules[-1]) and last in _OF_VECTORS)


def is_bias(leaf: Leaf, leaves: Iterable[Leaf]) -> bool:
    """Returns whether a leaf is added to vectors.

    Args:
        leaf: Of those leaves; "b" is a bias beside a "w" of more axes.
        leaves: In the same module.
    """
    last = leaf.keys[-1]
    kernels = [len(x.shape) for x in leaves if x.keys[-1] == "w"]
    is_b = last == "b" and len(leaf.shape) < max(kernels, default=0)
    return is_b or _tokens(last)[-1:] == ["bias"]


def is_convolution(leaf: Leaf) -> bool:
    """Returns whether a leaf is the kernel of a convolution."""
    return any("conv" in _tokens(key) for key in leaf.keys[-2:])


def is_output_first(leaf: Leaf) -> bool:
    """Returns whether a leaf's first axis is its output, as in Equinox and PyTorch."""
    return leaf.keys[-1] == "weight"


def is_of_experts(leaf: Leaf) -> bool:
    """Returns whether a leaf is of the experts of a mixture, and not their router."""
    words = {token for key in leaf.keys for token in _tokens(key)}
    is_router = any({*_tokens(key)} <= {"gate", "router"} for key in leaf.keys[-2:])
    return bool(words & {"expert", "experts", "moe"}) and not is_router


def is_of_layers(leaf: Leaf) -> bool:
    """Returns whether a leaf is in what is named after its layers."""
    return any(_LAYERS & {*_tokens(key)} for key in leaf.keys)


class InAttention(NamedTuple):
    """What an attention kernel is.

    Attributes:
        module: Names on the way to the attention that it is in.
        kind: What it makes.
        fused: How many kernels it is.
        heads_first: Whether its heads come before its input, as in Gemma's einsums.
    """

    module: tuple[str, ...]
    kind: Kind
    fused: int = 1
    heads_first: bool = False


def in_attention(leaf: Leaf) -> InAttention | None:
    """Returns what attention kernel a leaf may be, None if it cannot be one."""
    for depth in range(len(leaf.keys) - 1, max(len(leaf.keys) - 4, -1), -1):
        tokens = _tokens(leaf.keys[depth])
        words = [t.removeprefix("w") for t in tokens if t not in _FILLERS]
        words = [w for w in words if w not in {"", "a", "b"} and not w.isdigit()]
        module = leaf.keys[:depth]
        if words and {*words} <= _IN:
            return InAttention(module, "in", 1, "einsum" in tokens)
        if len(words) == 1 and words[0] in _FUSED:
            return InAttention(module, "fused", _FUSED[words[0]], "einsum" in tokens)
        if words and {*words} <= _OUT:
            return InAttention(module, "out")
    return None


def is_attention(module: tuple[str, ...], kinds: Iterable[Kind]) -> bool:
    """Returns whether a module is an attention, from its names and what is in it."""
    found = list(kinds)
    words = {token for key in module for token in _tokens(key)}
    named = any(w.startswith("att") or w.endswith("attention") for w in words)
    return named or "fused" in found or found.count("in") > 1


def stack_axes_by_name(leaf: Leaf) -> tuple[int, ...]:
    """Returns the axes of a leaf whose names are those of layers and experts."""
    layers = [k for k, name in enumerate(leaf.axes) if name in _LAYER_AXES]
    both = [k for k, n in enumerate(leaf.axes) if n in _LAYER_AXES | _STACK_AXES]
    # What routes to experts has them for its output.
    return tuple(both if len(leaf.shape) - len(both) > 1 else layers)


def head_axes_by_name(leaf: Leaf) -> tuple[int, ...]:
    """Returns the axes of a leaf whose names are those of heads and their width."""
    return tuple(k for k, name in enumerate(leaf.axes) if name in _HEAD_AXES)

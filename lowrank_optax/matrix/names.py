"""What the names of leaves and axes say about a leaf: the words of the field.

Flax, Equinox, Haiku, Haliax, MaxText and Tunix name attention kernels, norms and layers
in few ways. Any other word says nothing.
"""

import re
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

from lowrank_optax.matrix.boxes import leaves_by_path, names_by_path

Kind = Literal["in", "fused", "out"]
"""The output of an attention kernel: "in" is queries, keys or values; "fused" several
of these; "out" the attention's output."""

_TOKENS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_FILLERS = {"proj", "projection", "einsum", "dense", "linear", "attention", "attn"}
_IN = {"q", "k", "v", "query", "key", "value", "queries", "keys", "values"}
_FUSED = {"qkv": 3, "kv": 2}
_OUT = {"o", "out", "output", "vec"}
_OF_VECTORS = {"scale", "bias", "weight", "w", "offset", "gamma", "beta", "g", "b"}
# Words in the names of embeddings (of tokens or positions) and of the head.
_EMBEDDINGS = {"embed", "embedding", "embeddings", "embedder", "wte", "wpe", "unembed"}
_HEADS = {"head", "lm", "logits", "vocab", "vocabulary", "unembedding"}
_LAYERS = {"layers", "blocks", "stack", "stacked", "scan", "scanned"}

# Names of axes. Mesh axes have other names, except for experts and stages.
_LAYER_AXES = {"layers", "layer", "scan", "stack", "qkv", "block", "blocks"}
_STACK_AXES = {"exp", "expert", "experts", "num_experts", "stage", "stages"}
_HEAD_AXES = {
    *("heads", "q_heads", "kv_heads", "kv_head", "num_heads", "q_heads_per_group"),
    *("kv", "head_dim", "head_size", "kv_head_dim", "qk_head_dim", "v_head_dim"),
}
_OTHER_AXES = {"embed", "mlp", "vocab", "joined_kv", "norm", "q_lora", "kv_lora"}


class Leaf(NamedTuple):
    """A leaf with its names.

    Attributes:
        path: Key path of the leaf.
        keys: Names along the path, one for each module.
        shape: Shape of the leaf.
        axes: Names of the axes, one for each; () if the axes have no names.
    """

    path: tuple
    keys: tuple[str, ...]
    shape: tuple[int, ...]
    axes: tuple[Any, ...]

    @property
    def containers(self) -> Iterable[tuple[str, ...]]:
        """The modules around the leaf, the outermost first."""
        return (self.keys[:depth] for depth in range(len(self.keys)))


def named_leaves(params: Any) -> list[Leaf]:
    """Returns the leaves of a tree with their names from boxes and key paths."""
    names = names_by_path(params)

    def leaf(path, array):
        shape, axes = tuple(array.shape), tuple(names.get(path, ()))
        is_logical = bool({*axes} & (_LAYER_AXES | _HEAD_AXES | _OTHER_AXES))
        known = axes if is_logical and len(axes) == len(shape) else ()
        return Leaf(path, _keys(path), shape, known)

    return [leaf(*item) for item in leaves_by_path(params).items()]


def _keys(path: tuple) -> tuple[str, ...]:
    # Haiku writes the whole path to a module into one key.
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
    """Returns whether a leaf belongs to a norm, which scales or shifts vectors."""

    def named(key):
        return any(token.endswith("norm") or token == "ln" for token in _tokens(key))

    *modules, last = ("", *leaf.keys)
    return named(last) or (named(modules[-1]) and last in _OF_VECTORS)


def is_bias(leaf: Leaf, leaves: Iterable[Leaf]) -> bool:
    """Returns whether a leaf is added to vectors.

    Args:
        leaf: The leaf; a "b" is a bias beside a "w" with more axes.
        leaves: All leaves of the same module.
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
    """Returns whether a leaf belongs to the experts of a mixture, not to the router."""
    words = {token for key in leaf.keys for token in _tokens(key)}
    is_router = any({*_tokens(key)} <= {"gate", "router"} for key in leaf.keys[-2:])
    return bool(words & {"expert", "experts", "moe"}) and not is_router


def is_of_vocabulary(leaf: Leaf) -> bool:
    """Returns whether a leaf is an embedding or the head by the name of a module.

    A word like ``embedding`` says so in any name. A word like ``head`` says so only in
    a name without other words: ``MultiHeadAttention`` is not a head. Names farther out
    say nothing: a whole encoder may be called ``embedder``. A box says so by the name
    ``vocab`` of an axis.
    """
    return "vocab" in leaf.axes or is_embedding(leaf) or is_head(leaf)


def is_embedding(leaf: Leaf) -> bool:
    """Returns whether a leaf is an embedding by the name of a module."""
    return any(_words(key) & _EMBEDDINGS for key in leaf.keys[-3:])


def is_head(leaf: Leaf) -> bool:
    """Returns whether a leaf is the head by the name of a module."""
    return any(_words(key) and _words(key) <= _HEADS for key in leaf.keys[-3:])


def _words(key: str) -> set[str]:
    return set(_tokens(key)) - _FILLERS - {"0"}


def is_unnamed(leaf: Leaf) -> bool:
    """Returns whether numbers are all that the key path of a leaf consists of."""
    return not any(_tokens(key) and not key.isdigit() for key in leaf.keys)


def is_of_layers(leaf: Leaf) -> bool:
    """Returns whether a module around a leaf has a name of layers."""
    return any(_LAYERS & {*_tokens(key)} for key in leaf.keys)


class InAttention(NamedTuple):
    """An attention kernel.

    Attributes:
        module: Names along the path to the attention of this kernel.
        kind: Kind of the kernel's output.
        fused: Number of kernels in the leaf.
        heads_first: Whether the axis of heads comes before the input axis, as in
            Gemma's einsums.
    """

    module: tuple[str, ...]
    kind: Kind
    fused: int = 1
    heads_first: bool = False


def in_attention(leaf: Leaf) -> InAttention | None:
    """Returns the attention kernel that a leaf may be by its name, or None."""
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
    """Returns whether a module is an attention, by its names and its kernels."""
    found = list(kinds)
    words = {token for key in module for token in _tokens(key)}
    named = any(w.startswith("att") or w.endswith("attention") for w in words)
    return named or "fused" in found or found.count("in") > 1


def stack_axes_by_name(leaf: Leaf) -> tuple[int, ...]:
    """Returns the axes of a leaf whose names are those of layers and experts."""
    layers = [k for k, name in enumerate(leaf.axes) if name in _LAYER_AXES]
    both = [k for k, n in enumerate(leaf.axes) if n in _LAYER_AXES | _STACK_AXES]
    # The experts are the output axis of a router.
    return tuple(both if len(leaf.shape) - len(both) > 1 else layers)


def head_axes_by_name(leaf: Leaf) -> tuple[int, ...]:
    """Returns the axes of a leaf whose names are those of heads and their width."""
    return tuple(k for k, name in enumerate(leaf.axes) if name in _HEAD_AXES)

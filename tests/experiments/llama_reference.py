"""A float64 NumPy LLaMA, one sequence at a time, and random weights to feed it.

Written from the papers, position by position: Touvron et al. 2023 (LLaMA), Zhang and
Sennrich 2019 (RMSNorm, eq. 4), Su et al. 2021 (rotary, eq. 13), Shazeer 2020 (SwiGLU,
eq. 6), Ainslie et al. 2023 (grouped queries).
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments.model.llama import init_params

SHARED_DATA = Path(__file__).parents[3] / "shared" / "data"
STORIES = SHARED_DATA / "stories260K"


def random_params(config, seed=0):
    """Norm scales near 1; kernels that keep their input's size, so nothing is flat."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        noise = rng.standard_normal(leaf.shape)
        if "norm" in jax.tree_util.keystr(path[-1:]):
            value = 1 + 0.3 * noise
        else:
            value = noise * leaf.shape[-2] ** -0.5
        return jnp.asarray(value, leaf.dtype)

    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    return jax.tree_util.tree_map_with_path(draw, shapes)


def forward(config, params, tokens):
    """Logits (T, V) of one sequence of T tokens."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    stream = [params["embedding"][token] for token in tokens]
    for i in range(config.num_layers):
        block = jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"])
        normed = [rms_norm(x, block["attention_norm"], config) for x in stream]
        mixed = attention(config, block["attention"], normed)
        stream = [x + y for x, y in zip(stream, mixed, strict=True)]
        normed = [rms_norm(x, block["mlp_norm"], config) for x in stream]
        stream = [
            x + swiglu(block["mlp"], y) for x, y in zip(stream, normed, strict=True)
        ]
    head = params["embedding"].T if config.tie_embeddings else params["head"]
    return np.stack([rms_norm(x, params["norm"], config) @ head for x in stream])


def mean_nll(config, params, tokens):
    """Mean over positions of -log p(next token), in nats."""
    logits = forward(config, params, tokens[:-1])
    largest = logits.max(axis=-1)
    log_sum = largest + np.log(np.exp(logits - largest[:, None]).sum(axis=-1))
    return np.mean(log_sum - logits[np.arange(len(logits)), tokens[1:]])


def rms_norm(x, scale, config):
    return x / np.sqrt(np.mean(x**2) + config.rms_norm_eps) * scale


def attention(config, kernels, inputs):
    width = config.hidden_size // config.num_heads
    queries = [x @ kernels["query"] for x in inputs]
    keys = [x @ kernels["key"] for x in inputs]
    values = [x @ kernels["value"] for x in inputs]
    outputs = []
    for t, query in enumerate(queries):
        heads = []
        for head in range(config.num_heads):
            # Query heads share a key head in consecutive groups.
            shared = head // (config.num_heads // config.num_kv_heads)
            own = slice(head * width, (head + 1) * width)
            kv = slice(shared * width, (shared + 1) * width)
            rotated = rotate(query[own], t, config.rope_theta)
            scores = np.array(
                [
                    rotated @ rotate(keys[s][kv], s, config.rope_theta) / np.sqrt(width)
                    for s in range(t + 1)
                ]
            )
            weights = np.exp(scores - scores.max())
            weights /= weights.sum()
            heads.append(sum(w * values[s][kv] for s, w in enumerate(weights)))
        outputs.append(np.concatenate(heads) @ kernels["output"])
    return outputs


def rotate(x, position, theta):
    """Turns the plane (i, i + h / 2) by position * theta^(-2 i / h), as complex."""
    half = x.size // 2
    plane = x[:half] + 1j * x[half:]
    plane = plane * np.exp(1j * position * theta ** (-2 * np.arange(half) / x.size))
    return np.concatenate([plane.real, plane.imag])


def swiglu(kernels, x):
    gate = x @ kernels["gate"]
    return (gate / (1 + np.exp(-gate)) * (x @ kernels["up"])) @ kernels["down"]

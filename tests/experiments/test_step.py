"""The step on a model that is one table: logits of the next token by token."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.distribution.mesh import make_mesh, whole
from experiments.distribution.placement import initial_state, replicate, shard_batch
from experiments.errors import UserError
from experiments.optim.build import build_optimizer
from experiments.optim.options import OptimizerOptions
from experiments.run.step import (
    make_eval_step,
    make_train_step,
    mean_loss,
    summed_token_loss,
)

pytestmark = pytest.mark.usefixtures("fast_compilation")
VOCABULARY = 5


def token_loss(params, batch):
    def next_token_logits(params, tokens):
        return params["embedding"][tokens]

    return summed_token_loss(next_token_logits, params, batch)


def random_batch(seed, batch_size=8, weights=1.0):
    draw = np.random.default_rng(seed)
    shape = (batch_size, 6)
    return {
        "inputs": draw.integers(0, VOCABULARY, shape, dtype=np.int32),
        "targets": draw.integers(0, VOCABULARY, shape, dtype=np.int32),
        "weights": np.full(shape, weights, np.float32),
    }


def random_params(seed=0):
    draw = np.random.default_rng(seed)
    return {"embedding": jnp.asarray(draw.normal(size=(VOCABULARY,) * 2), jnp.float32)}


def nats(params, batch):
    """-log softmax of each target, float64, (B, T)."""
    logits = np.asarray(params["embedding"], np.float64)[batch["inputs"]]
    log_sum = np.log(np.exp(logits).sum(-1))
    return log_sum - np.take_along_axis(logits, batch["targets"][..., None], -1)[..., 0]


def train_twice(mesh, learning_rate=0.1):
    tx = build_optimizer(OptimizerOptions(optimizer="adamw"), lambda _: learning_rate)
    step = make_train_step(token_loss, tx)
    params = replicate(random_params(), mesh)
    state = step.state_of(params, initial_state(tx, params, whole(mesh)))
    for seed in (1, 2):
        params, state, metrics = step(
            params, state, shard_batch(random_batch(seed), mesh)
        )
    return params, state, metrics


def test_validation_loss_is_the_mean_over_tokens_not_over_batches():
    params, mesh = random_params(), make_mesh(None, 8)
    full, padded = random_batch(1), random_batch(2)
    padded["weights"][1:] = 0
    padded["weights"][0, 2:] = 0

    eval_step = make_eval_step(token_loss, mesh)
    loss = mean_loss(eval_step(params, shard_batch(x, mesh)) for x in (full, padded))

    kept = np.concatenate([nats(params, full).ravel(), nats(params, padded)[0, :2]])
    assert loss == pytest.approx(kept.mean(), rel=1e-6)
    means = [nats(params, full).mean(), nats(params, padded)[0, :2].mean()]
    assert abs(loss - np.mean(means)) > 1e-2


def test_padded_tokens_give_no_gradient():
    mesh = make_mesh(None, 8)
    tx = optax.apply_if_finite(optax.sgd(1.0), 1)
    step = make_train_step(token_loss, tx)
    batch = random_batch(1)
    batch["weights"][:, 3:] = 0
    other = {name: array.copy() for name, array in batch.items()}
    other["targets"][:, 3:] = 0

    results = []
    for each in (batch, other):
        params = replicate(random_params(), mesh)
        state = step.init(params)
        results.append(step(params, state, shard_batch(each, mesh))[0])
    np.testing.assert_array_equal(*(result["embedding"] for result in results))


def test_eight_devices_train_like_one(monkeypatch):
    assert len(make_mesh(None, 8).devices.flat) == 8
    eight, _, metrics = train_twice(make_mesh(None, 8))
    assert len(eight["embedding"].sharding.device_set) == 8
    device = jax.devices()[:1]
    monkeypatch.setattr("experiments.distribution.mesh.all_devices", lambda: device)
    one, _, metrics_of_one = train_twice(make_mesh(None, 8))

    # Sums of float32 in another order.
    np.testing.assert_allclose(metrics["loss"], metrics_of_one["loss"], rtol=1e-5)
    np.testing.assert_allclose(eight["embedding"], one["embedding"], atol=1e-5)


@pytest.mark.parametrize("optimizer", ["adamw", "projfactor"])
def test_micro_batches_train_like_the_whole_batch(optimizer):
    mesh = make_mesh(None, 16, 2)
    options = OptimizerOptions(
        optimizer=optimizer, rank=1, granularity=1, update_proj_gap=2
    )
    found = {}
    for accumulate in (1, 2):
        tx = build_optimizer(options, lambda _: 0.1, accumulate=accumulate)
        step = make_train_step(token_loss, tx, accumulate)
        params = replicate(random_params(), mesh)
        params["blocks"] = {"unused": replicate(jnp.zeros((2, 4, 3)), mesh)}
        state = step.state_of(params, initial_state(tx, params, whole(mesh)))
        for seed in (1, 2, 3):
            batch = random_batch(seed, batch_size=16)
            # Micro-batches with unequal numbers of tokens.
            batch["weights"][::2, 1:] = 0
            params, state, metrics = step(params, state, shard_batch(batch, mesh))
        found[accumulate] = (params["embedding"], metrics)
    # Sums of float32 in another order, through Adam's division.
    np.testing.assert_allclose(found[1][0], found[2][0], atol=1e-5)
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(found[1][1][name], found[2][1][name], rtol=1e-5)


def test_a_non_finite_micro_batch_changes_nothing_and_is_counted():
    mesh = make_mesh(None, 16, 2)
    options = OptimizerOptions(optimizer="adamw")
    tx = build_optimizer(options, lambda _: 0.1, accumulate=2)
    step = make_train_step(token_loss, tx, 2)
    params = replicate(random_params(), mesh)
    state = step.state_of(params, initial_state(tx, params, whole(mesh)))
    broken = random_batch(1, batch_size=16)
    broken["weights"][0, 0] = np.inf
    before = jax.device_get(params)
    params, state, metrics = step(params, state, shard_batch(broken, mesh))
    assert (int(metrics["rejected"]), int(metrics["rejected_in_a_row"])) == (1, 1)
    np.testing.assert_array_equal(params["embedding"], before["embedding"])
    good = shard_batch(random_batch(2, batch_size=16), mesh)
    params, state, metrics = step(params, state, good)
    assert (int(metrics["rejected"]), int(metrics["rejected_in_a_row"])) == (1, 0)
    assert np.isfinite(params["embedding"]).all()
    assert not np.array_equal(params["embedding"], before["embedding"])


def test_a_non_finite_gradient_changes_nothing_and_is_counted():
    mesh = make_mesh(None, 8)
    tx = build_optimizer(OptimizerOptions(optimizer="adamw"), lambda _: 0.1)
    step = make_train_step(token_loss, tx)
    params = replicate(random_params(), mesh)
    state = step.state_of(params, initial_state(tx, params, whole(mesh)))
    broken = random_batch(1)
    broken["weights"][0, 0] = np.inf

    before = jax.device_get(params)
    counts = []
    for batch in (broken, broken, random_batch(2), broken):
        params, state, metrics = step(params, state, shard_batch(batch, mesh))
        counts.append((int(metrics["rejected"]), int(metrics["rejected_in_a_row"])))
        if len(counts) == 2:
            np.testing.assert_array_equal(params["embedding"], before["embedding"])
    assert counts == [(1, 1), (2, 2), (2, 0), (3, 1)]
    assert np.isfinite(params["embedding"]).all()
    assert not np.array_equal(params["embedding"], before["embedding"])


def test_a_batch_that_devices_cannot_share_is_refused():
    with pytest.raises(UserError, match=r"--batch-size 12 is not a multiple of the 8"):
        make_mesh(None, 12)
    with pytest.raises(UserError, match=r"devices, times --accum"):
        make_mesh(None, 24, 2)

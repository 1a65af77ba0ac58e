"""``train_step``: its programs, their order, its state, and what it refuses."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType

import lowrank_optax
from lowrank_optax import train_step
from lowrank_optax.training import renewals
from tests.suite import random_like

pytestmark = pytest.mark.usefixtures("fast_compilation")

SHAPES = {"up": (8, 20), "bias": (20,), "down": (20, 6)}
RANK = 2
# Sums in another order, float32.
ROUNDING = 1e-5


def loss_fn(params, batch):
    hidden = jnp.tanh(batch @ params["up"] + params["bias"])
    return jnp.mean(jnp.sin(hidden @ params["down"]) ** 2)


def batches(count, shape=(12, 8)):
    return [random_like({"x": shape}, seed)["x"] for seed in range(count)]


def low_rank(interval=4, **options):
    return optax.chain(
        lowrank_optax.scale_by_low_rank(
            optax.scale_by_adam(),
            RANK,
            refresh=lowrank_optax.every(interval, stagger=False),
            **options,
        ),
        optax.scale_by_learning_rate(1e-2),
    )


def trained(step, params, xs, state=None):
    """Returns parameters, state and metrics of all steps."""
    state = step.init(params) if state is None else state
    # Donated, and the tests use them again.
    params, found = jax.tree.map(jnp.copy, params), []
    for x in xs:
        params, state, metrics = step(params, state, x)
        found.append(metrics)
    return params, state, found


def assert_same(first, second):
    jax.tree.map(np.testing.assert_array_equal, first, second)


def assert_close(first, second, rtol=ROUNDING):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol),
        first,
        second,
    )


def ages(state):
    found = lowrank_optax.subspaces(state.optimizer).values()
    return [(int(slot.age), int(slot.refreshes)) for slot in found]


def test_any_optimizer_trains_as_by_hand():
    params, xs = random_like(SHAPES), batches(3)
    optimizer = optax.adamw(1e-2)
    found, _, metrics = trained(train_step(loss_fn, optimizer), params, xs)
    state = optimizer.init(params)
    for x, seen in zip(xs, metrics, strict=True):
        loss, grads = jax.value_and_grad(loss_fn)(params, x)
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(seen["loss"], loss, rtol=ROUNDING)
        np.testing.assert_allclose(
            seen["grad_norm"], optax.tree.norm(grads), rtol=ROUNDING
        )
    assert_close(found, params)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_step_runs_line_by_line_without_jit(micro_batches):
    """As one looks for a fault; what was compiled before goes on behind it."""
    params, xs = random_like(SHAPES), batches(6)

    def step():
        return train_step(loss_fn, low_rank(2), micro_batches=micro_batches)

    expected, _, metrics = trained(step(), params, xs)
    seen = []

    def watched(params, batch):
        seen.append(type(params["up"]))
        return loss_fn(params, batch)

    eager = train_step(watched, low_rank(2), micro_batches=micro_batches)
    with jax.disable_jit():
        found, state, losses = trained(eager, params, xs[:4])
    assert len(seen) >= 4 * micro_batches
    found, _, more = trained(eager, found, xs[4:], state)
    assert_close(found, expected, 1e-4)
    for one, other in zip(losses + more, metrics, strict=True):
        np.testing.assert_allclose(one["loss"], other["loss"], rtol=1e-4)


def test_full_gradients_train_as_by_hand():
    """With refresh="full" the updates are those of full gradients, renewals too."""
    params, xs = random_like(SHAPES), batches(10)
    optimizer = low_rank()
    expected, state = params, optimizer.init(params)
    update = jax.jit(optimizer.update)
    for x in xs:
        grads = jax.grad(loss_fn)(expected, x)
        updates, state = update(grads, state, expected)
        expected = optax.apply_updates(expected, updates)
    for options in ({"gradients": "full"}, {"refresh": "full"}):
        step = train_step(loss_fn, optimizer, **options)
        found, after, _ = trained(step, params, xs)
        # Small entries of Adam's second moment turn roundings into more.
        assert_close(found, expected, 1e-4)
        assert ages(after) == [
            (int(x.age), int(x.refreshes))
            for x in lowrank_optax.subspaces(state).values()
        ]


def test_sketches_renew_on_the_updates_on_which_full_gradients_would():
    params, xs = random_like(SHAPES), batches(11)
    seen = {}
    for refresh in ("sketch", "full"):
        step = train_step(loss_fn, low_rank(4), refresh=refresh)
        state, of_run = step.init(params), []
        own = jax.tree.map(jnp.copy, params)
        for x in xs:
            own, state, _ = step(own, state, x)
            of_run.append(ages(state)[0])
        seen[refresh] = of_run
        assert step.compilations == 2
    # The basis for an update is made behind the update before.
    assert [age for age, _ in seen["full"]] == [1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3]
    assert [age for age, _ in seen["sketch"]] == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2]
    assert [count for _, count in seen["sketch"]] == [1] * 4 + [2] * 4 + [3] * 3


def refreshes(state):
    return [int(slot.refreshes) for slot in lowrank_optax.subspaces(state).values()]


@pytest.mark.parametrize("interval", [2, 3, 5])
def test_staggered_bases_are_renewed_as_by_update_alone(interval):
    """Leaves whose second renewal comes one or two updates behind the first too."""
    params = random_like({f"w{i}": (8, 6) for i in range(5)})
    tx = lowrank_optax.scale_by_low_rank(
        optax.trace(0.5), RANK, refresh=lowrank_optax.every(interval)
    )

    def loss(params, x):
        return sum(jnp.mean((x @ w - 1) ** 2) for w in params.values())

    xs = batches(2 * interval + 3)
    own, state, update, states = params, tx.init(params), jax.jit(tx.update), []
    for x in xs:
        states.append((own, state))
        updates, state = update(jax.grad(loss)(own, x), state, own)
        own = optax.apply_updates(own, updates)
    expected = [refreshes(state) for _, state in [*states, (own, state)]]
    assert len({tuple(x) for x in np.transpose(expected)}) > 1, "nothing is staggered"
    # From the first step; and from a state that plain updates have made.
    for refresh, start in (("sketch", 0), ("full", 0), ("full", 1), ("full", 4)):
        step = train_step(loss, tx, refresh=refresh)
        own, state = jax.tree.map(jnp.copy, states[start])
        state = step.state_of(own, state)
        for number, x in enumerate(xs[start:], start + 1):
            own, state, _ = step(own, state, x)
            assert refreshes(state.optimizer) == expected[number], (refresh, start)


def test_a_sketch_of_a_gradient_of_low_rank_gives_its_basis():
    """Exact where the gradient has no more directions than the basis has columns."""
    x = jnp.ones((4, 8)) * jnp.arange(1.0, 5)[:, None]
    params = {"w": random_like({"w": (8, 6)})["w"]}
    step = train_step(lambda p, x: jnp.sum((x @ p["w"]) ** 2), low_rank())
    grads = jax.grad(lambda p: jnp.sum((x @ p["w"]) ** 2))(params)["w"]
    _, state, _ = trained(step, params, [x])
    basis = lowrank_optax.subspaces(state.optimizer)["['w']"].basis
    kept = grads @ basis @ basis.T
    assert jnp.linalg.norm(kept - grads) < ROUNDING * jnp.linalg.norm(grads)


@pytest.mark.parametrize("refresh", ["sketch", "full"])
def test_a_run_from_a_saved_state_is_the_same_run(refresh):
    params, xs = random_like(SHAPES), batches(12)
    rule = lowrank_optax.on_convergence(3, 5, 0.99, check_interval=1)
    optimizer = lowrank_optax.adarankgrad(
        1e-2, rank=RANK, refresh=rule, basis=lowrank_optax.range_finder()
    )
    step = train_step(loss_fn, optimizer, refresh=refresh)
    expected = trained(step, params, xs)
    for stop in (1, 5):
        own, state, _ = trained(step, params, xs[:stop])
        saved = jax.tree.map(np.asarray, (own, state))
        own, state = jax.tree.map(jnp.asarray, saved)
        again = train_step(loss_fn, optimizer, refresh=refresh)
        found = trained(again, own, xs[stop:], state)
        assert_same(found[:2], expected[:2])


def test_a_short_interval_is_renewed_at_every_step():
    """A basis that is due again before the host can know it, as LDAdam's."""
    params, xs = random_like(SHAPES), batches(6)
    for interval in (1, 2):
        step = train_step(loss_fn, low_rank(interval), refresh="full")
        _, state, _ = trained(step, params, xs)
        assert ages(state)[0][1] == 6 // interval


def test_micro_batches_are_the_whole_batch():
    params, xs = random_like(SHAPES), batches(9)
    found = {
        k: trained(train_step(loss_fn, low_rank(), micro_batches=k), params, xs)
        for k in (1, 3)
    }
    losses = {k: [float(m["loss"]) for m in x[2]] for k, x in found.items()}
    np.testing.assert_allclose(losses[3], losses[1], rtol=1e-4)
    norms = {k: [float(m["grad_norm"]) for m in x[2]] for k, x in found.items()}
    np.testing.assert_allclose(norms[3], norms[1], rtol=1e-4)
    # Sketches too are those of the whole batch: the bases span the same.
    one, three = (
        lowrank_optax.subspaces(found[k][1].optimizer)["['up']"].basis for k in (1, 3)
    )
    np.testing.assert_allclose(three @ three.T, one @ one.T, atol=1e-3)


def test_weights_of_micro_batches():
    """Padding counts nothing: the mean is by token."""

    def summed(params, batch):
        x, weights = batch
        values = jnp.sum(jnp.sin(x @ params["up"]) ** 2, -1)
        weight = jnp.sum(weights)
        return jnp.sum(values * weights) / jnp.maximum(weight, 1), weight

    params = {"up": random_like(SHAPES)["up"]}
    batch = batches(1)[0], (jnp.arange(12) % 3 > 0) * jnp.arange(12.0)
    step = train_step(
        summed,
        optax.sgd(1.0),
        has_aux=True,
        micro_batches=3,
        weight=lambda batch, weight: weight,
    )
    found, _, (metrics,) = trained(step, params, [batch])
    (loss, total), grads = jax.value_and_grad(summed, has_aux=True)(params, batch)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=ROUNDING)
    assert metrics["aux"].shape == (3,)
    assert metrics["aux"].sum() == total
    assert_close(found, jax.tree.map(jnp.subtract, params, grads))


def test_losses_in_bfloat16_are_added_up_in_float32():
    """256 + 1 is 256 in bfloat16, so that the mean of the four would be 64.0."""

    def loss(params, x):
        return (jnp.sum(x) + 0 * jnp.sum(params["up"])).astype(jnp.bfloat16)

    params = {"up": random_like(SHAPES)["up"]}
    step = train_step(loss, optax.sgd(0.0), micro_batches=4)
    *_, (metrics,) = trained(step, params, [jnp.array([256.0, 1.0, 1.0, 1.0])])
    assert metrics["loss"].dtype == jnp.float32
    assert float(metrics["loss"]) == 259 / 4


def test_keys_and_further_arguments():
    """A key reaches the function; each micro-batch has a key of its own."""

    def loss(params, batch, key, scale):
        noise = jax.random.normal(key)
        return scale * jnp.mean(batch @ params["up"]) + 0 * noise, noise

    params = {"up": random_like(SHAPES)["up"]}
    key = jax.random.key(3)
    for k in (1, 3):
        step = train_step(loss, optax.sgd(1.0), has_aux=True, micro_batches=k)
        metrics = step(
            jax.tree.map(jnp.copy, params), step.init(params), batches(1)[0], key, 2.0
        )[-1]
        expected = [jax.random.normal(jax.random.fold_in(key, i)) for i in range(3)]
        if k == 1:
            expected = jax.random.normal(key)
        np.testing.assert_array_equal(metrics["aux"], jnp.array(expected))


def test_each_of_several_keys_is_folded():
    def loss(params, batch, keys):
        noise = jnp.stack([jax.random.normal(key) for key in keys])
        return jnp.mean(batch @ params["up"]), noise

    params = {"up": random_like(SHAPES)["up"]}
    keys = jax.random.split(jax.random.key(3), 2)
    step = train_step(loss, optax.sgd(1.0), has_aux=True, micro_batches=3)
    metrics = step(params, step.init(params), batches(1)[0], keys)[-1]
    expected = [
        [jax.random.normal(jax.random.fold_in(key, i)) for key in keys]
        for i in range(3)
    ]
    np.testing.assert_array_equal(metrics["aux"], jnp.array(expected))


def test_a_seed_may_be_any_int():
    step = train_step(loss_fn, lowrank_optax.vlorp(0.1, rank=2, seed=2**31 + 5))
    params = random_like(SHAPES)
    found = step(params, step.init(params), batches(1)[0])[0]
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(found))


def test_a_batch_without_weight_changes_nothing():
    params = {"up": random_like(SHAPES)["up"]}
    step = train_step(
        lambda params, batch: jnp.mean((batch @ params["up"]) ** 2),
        optax.sgd(1.0),
        micro_batches=3,
        weight=lambda batch, aux: 0.0,
    )
    before = jax.tree.map(jnp.copy, params)
    found, _, metrics = step(params, step.init(params), batches(1)[0])
    assert (metrics["loss"], metrics["grad_norm"]) == (0, 0)
    jax.tree.map(np.testing.assert_array_equal, found, before)


def test_micro_batches_without_tokens_count_nothing():
    """The mean over none is not a number, in loss and gradients."""

    def mean(params, batch):
        x, weights = batch
        weight = jnp.sum(weights)
        return jnp.sum(weights * jnp.sum((x @ params["up"]) ** 2, -1)) / weight, weight

    params = {"up": random_like(SHAPES)["up"]}
    # Each third example is in a micro-batch of its own.
    batch = batches(1)[0], (jnp.arange(12) % 3 > 0) * 1.0
    step = train_step(
        mean,
        lowrank_optax.galore(0.1, 2),
        has_aux=True,
        micro_batches=3,
        weight=lambda batch, weight: weight,
    )
    found, _, (metrics,) = trained(step, params, [batch])
    expected = mean(params, batch)[0]
    np.testing.assert_allclose(metrics["loss"], expected, rtol=ROUNDING)
    assert np.all(np.isfinite(found["up"]))


def test_the_mode_of_a_module_is_that_of_the_step():
    """model.eval() between two steps turns dropout off, as in a new run."""

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.up = nnx.Linear(8, 20, rngs=rngs)
            self.dropout = nnx.Dropout(0.9, rngs=rngs)

        def __call__(self, x):
            return self.dropout(self.up(x))

    def loss(model, batch):
        return jnp.mean(model(batch) ** 2)

    model, x = Net(nnx.Rngs(0)), batches(1)[0]
    step = train_step(loss, optax.sgd(0.0))
    state = step.init(model)
    model, state, dropped = step(model, state, x)
    model.eval()
    model, state, whole = step(model, state, x)
    assert step.compilations == 2
    # One program fuses the mean otherwise than the operations one by one.
    np.testing.assert_allclose(whole["loss"], loss(model, x), rtol=1e-6)
    assert abs(dropped["loss"] - whole["loss"]) > 0.01
    model.eval()
    step(model, state, x)
    assert step.compilations == 2


def test_modules_of_nnx_are_trained_in_place():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.up = nnx.Linear(8, 20, rngs=rngs)
            self.norm = nnx.BatchNorm(20, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)
            self.down = nnx.Linear(20, 6, rngs=rngs)

        def __call__(self, x):
            return self.down(self.dropout(jnp.tanh(self.norm(self.up(x)))))

    def loss(model, batch):
        return jnp.mean(model(batch) ** 2)

    model = Net(nnx.Rngs(0))
    before = nnx.state(model, nnx.Param)["up"]["kernel"][...] + 0
    step = train_step(loss, low_rank(), micro_batches=2)
    state = step.init(model)
    seen = []
    for x in batches(4):
        same, state, metrics = step(model, state, x)
        assert same is model
        seen.append(float(metrics["loss"]))
    assert jnp.max(jnp.abs(model.up.kernel[...] - before)) > 0
    assert jnp.max(jnp.abs(model.norm.mean[...])) > 0  # statistics are kept
    assert int(model.dropout.rngs.count[...]) == 8  # one draw for each micro-batch
    assert np.all(np.isfinite(seen))
    assert len(step.bases) == 2


def test_what_a_call_adds_to_a_module_is_kept():
    """A variable that is not there before the first call; steps go on with it."""

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.up = nnx.Linear(8, 20, rngs=rngs)

        def __call__(self, x):
            hidden = self.up(x)
            self.mean = nnx.BatchStat(jnp.mean(hidden))
            return hidden

    def loss(model, batch):
        return jnp.mean(model(batch) ** 2)

    alone, *xs = Net(nnx.Rngs(0)), *batches(3)
    model = Net(nnx.Rngs(0))
    step = train_step(loss, optax.sgd(0.0))
    state = step.init(model)
    for x in xs:
        model, state, _ = step(model, state, x)
    alone(xs[-1])
    # One program fuses the mean otherwise than the operations one by one.
    np.testing.assert_allclose(model.mean[...], alone.mean[...], rtol=1e-5, atol=1e-7)

    step = train_step(loss, optax.sgd(0.0), micro_batches=2)
    new = Net(nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"loss_fn changes .*'mean'.* call the module"):
        step(new, step.init(new), xs[0])
    new(xs[0])
    _, _, metrics = step(new, step.init(new), xs[0])
    np.testing.assert_allclose(metrics["loss"], loss(alone, xs[0]), rtol=1e-6)


def test_leaves_of_other_methods_get_full_gradients():
    """A method that needs full gradients beside one that does not."""
    optimizer = optax.partition(
        {
            "a": lowrank_optax.low_rank_muon(1e-2, rank=RANK),
            "b": low_rank(2),
            "c": optax.adamw(1e-2),
        },
        {"up": "a", "down": "b", "bias": "c"},
    )
    params, xs = random_like(SHAPES), batches(6)
    step = train_step(loss_fn, optimizer)
    found, state, _ = trained(step, params, xs)
    slots = lowrank_optax.subspaces(state.optimizer)
    assert int(slots["['up']"].refreshes) == 1
    assert int(slots["['down']"].refreshes) == 3
    assert all(jnp.max(jnp.abs(found[x] - params[x])) > 1e-3 for x in params)


def test_no_step_waits_for_the_last_two(monkeypatch):
    """The host reads what the step before the last two has said, and nothing else."""
    read = []

    class Said:
        def __init__(self, number, array):
            self.number, self.array = number, array

        def __array__(self, dtype=None, copy=None):
            read.append((len(steps), self.number))
            return np.asarray(self.array)

    steps = []
    observe = renewals.Renewals.observe
    monkeypatch.setattr(
        renewals.Renewals,
        "observe",
        lambda self, due: observe(self, Said(len(steps), due)),
    )
    step = train_step(loss_fn, low_rank(3))
    params = random_like(SHAPES)
    state = step.init(params)
    with jax.transfer_guard_device_to_host("disallow"):
        for x in batches(9):
            params, state, _ = step(params, state, x)
            steps.append(x)
    assert read == [(number, number - 3) for number in range(3, 9)]


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize(
    "cut", [("fsdp", None), (None, "fsdp")], ids=["rows", "columns"]
)
def test_bases_are_renewed_from_sketches_on_an_explicit_mesh(cut, micro_batches):
    """As on an automatic one; svd takes no matrix that is cut explicitly."""

    def run(mode):
        mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(mode, mode))

        def loss(params, x):
            w = params["w"]
            if mode == AxisType.Explicit:
                w = jax.sharding.reshard(w, jax.P())
            return jnp.mean(jnp.sin(x @ w) ** 2)

        with jax.set_mesh(mesh):
            place = jax.NamedSharding(mesh, jax.P(*cut))
            params = jax.device_put(random_like({"w": (8, 20)}), place)
            rows = jax.NamedSharding(mesh, jax.P(("data", "fsdp")))
            xs = jax.device_put(batches(4, (16, 8)), rows)
            step = train_step(loss, low_rank(2), micro_batches=micro_batches)
            params, state, _ = trained(step, params, xs)
            assert params["w"].sharding.spec == place.spec
            assert {count for _, count in ages(state)} == {2}
        return np.asarray(params["w"])

    # Sums in another order, and Adam's roots of them.
    assert_close(run(AxisType.Explicit), run(AxisType.Auto), 1e-4)


def test_a_state_on_a_mesh_stays_there():
    mesh = jax.make_mesh((1,), ("data",))
    whole = jax.NamedSharding(mesh, jax.P())
    params = jax.device_put(random_like(SHAPES), whole)
    step = train_step(loss_fn, low_rank())
    state = jax.device_put(step.init(params), whole)
    params, state, _ = step(params, state, jax.device_put(batches(1)[0], whole))
    assert all(x.sharding == whole for x in jax.tree.leaves((params, state)))


def test_compiled_before_the_first_step():
    params, xs = random_like(SHAPES), batches(5)
    step = train_step(loss_fn, low_rank(2))
    state = step.init(params)
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (params, state, xs[0])
    )
    step.compile(*like)
    assert step.compilations == len(step.programs) == 2
    assert not step.will_compile(params, state, xs[0])
    assert step.will_compile(params, state, xs[0][:6])
    trained(step, params, xs)
    assert step.compilations == 2


def test_metrics_of_ones_own():
    step = train_step(
        loss_fn,
        low_rank(),
        metrics=lambda params, state: {
            "rank": lowrank_optax.subspaces(state)["['up']"].rank
        },
    )
    *_, (metrics,) = trained(step, random_like(SHAPES), batches(1))
    assert int(metrics["rank"]) == RANK


def test_new_shapes_compile_and_are_told(caplog):
    step = train_step(loss_fn, low_rank())
    params = random_like(SHAPES)
    # A training command run in this process before has made this logger silent.
    with caplog.at_level(logging.WARNING, logger="lowrank_optax"):
        params, state, _ = trained(step, params, batches(2))
        assert not caplog.records
        trained(step, params, batches(2, (6, 8)), state)
    assert [record.getMessage() for record in caplog.records] == [
        "compiling for new shapes (number 1): batch: float32[6, 8] after float32[12, 8]"
    ]


def test_new_shapes_may_be_refused():
    step = train_step(loss_fn, low_rank(), new_shapes="refuse")
    params, state, _ = trained(step, random_like(SHAPES), batches(2))
    with pytest.raises(ValueError, match=r"batch: .*\[6, 8\] after.*pad the batch"):
        step(params, state, batches(1, (6, 8))[0])
    # Nothing is lost: the next batch trains.
    step(params, state, batches(1)[0])


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ((jnp.float32(1), {"b": 1.0}), r"argument 1: float32\[\] after .*of a Python"),
        ((1.0, {"b": jnp.int8(1)}), r"argument 2\['b'\]: int8\[\] after float32\[\]"),
        ((1.0, {"c": 1.0}), "batch and arguments: another structure"),
    ],
)
def test_what_is_new_is_named(others, message):
    """A batch of the same shape is not to be padded."""

    def loss(params, x, factor, more):
        return factor * loss_fn(params, x) * sum(more.values())

    step = train_step(loss, low_rank(), new_shapes="refuse")
    params, x = random_like(SHAPES), batches(1)[0]
    state = step.init(params)
    for _ in range(2):
        params, state, _ = step(params, state, x, 1.0, {"b": 1.0})
    with pytest.raises(ValueError, match=f"{message}.*give all steps the same"):
        step(params, state, x, *others)


def test_a_refused_use_is_named_and_may_get_its_full_gradient():
    def loss(params, x):
        return jnp.mean((x @ jnp.tanh(params["up"])) ** 2 @ params["down"])

    params = random_like({"up": (8, 20), "down": (20, 6)})
    with pytest.raises(ValueError, match=r"\['up'\] is used.*full_gradients"):
        trained(train_step(loss, low_rank()), params, batches(1))
    step = train_step(loss, low_rank(2), full_gradients=("['up']",))
    _, state, _ = trained(step, params, batches(6))
    assert {count for _, count in ages(state)} == {3}


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: train_step(loss_fn, low_rank(), micro_batches=0), ValueError, "int"),
        (lambda: train_step(loss_fn, low_rank(), refresh="no"), ValueError, "'no'"),
        (lambda: train_step(loss_fn, low_rank(), oversample=-1), ValueError, ">= 0"),
        (
            lambda: train_step(loss_fn, lowrank_optax.accumulate(low_rank(), 3)),
            ValueError,
            "accumulates 3 micro-batches, and micro_batches is 1",
        ),
        (
            lambda: trained(
                train_step(lambda p, x: x @ p["up"], low_rank()),
                random_like(SHAPES),
                batches(1),
            ),
            TypeError,
            r"scalar, not shape \(12, 20\)",
        ),
        (
            lambda: trained(
                train_step(loss_fn, low_rank(), has_aux=True),
                random_like(SHAPES),
                batches(1),
            ),
            TypeError,
            "has_aux",
        ),
        (
            lambda: trained(
                train_step(loss_fn, low_rank(), micro_batches=5),
                random_like(SHAPES),
                batches(1),
            ),
            ValueError,
            "multiple of 5",
        ),
        (
            lambda: trained(
                train_step(loss_fn, low_rank(), metrics=lambda p, s: {"due": 1}),
                random_like(SHAPES),
                batches(1),
            ),
            ValueError,
            "metrics has due, which a step uses itself",
        ),
        (
            lambda: train_step(loss_fn, low_rank())(
                random_like(SHAPES),
                train_step(loss_fn, low_rank())
                .init(random_like(SHAPES))
                ._replace(due=jnp.zeros((3, 1), jnp.int8)),
                batches(1)[0],
            ),
            ValueError,
            "make it by init",
        ),
    ],
)
def test_bad_calls_are_refused(make, error, words):
    with pytest.raises(error, match=words):
        make()


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("name", ["galore", "adarankgrad", "ldadam"])
def test_injected_numbers_train_as_plain_ones(name, micro_batches):
    """optax.inject_hyperparams makes arrays of a trace of the numbers of the bases."""
    method = getattr(lowrank_optax, name)
    injected = optax.inject_hyperparams(method, static_args=("rank",))
    found = [
        trained(
            train_step(loss_fn, make(learning_rate=1e-2, rank=RANK), **options),
            random_like(SHAPES),
            batches(4),
        )[0]
        for options in ({"micro_batches": micro_batches},)
        for make in (injected, method)
    ]
    assert_close(*found, 1e-3)


def test_an_injected_learning_rate_is_that_of_the_state():
    injected = optax.inject_hyperparams(lowrank_optax.galore, static_args=("rank",))
    optimizer = injected(learning_rate=1e-2, rank=RANK, update_proj_gap=3)
    params, (x,) = random_like(SHAPES), batches(1)
    step = train_step(loss_fn, optimizer)
    state = step.init(params)
    state.optimizer.hyperparams["learning_rate"] = jnp.zeros([])
    found, state, _ = trained(step, params, [x] * 2, state)
    assert_same(found, params)
    accumulating = lowrank_optax.accumulate(optimizer, 2)
    state, gradients = accumulating.init(params), jax.grad(loss_fn)(params, x)
    # A second function is compiled anew.
    for _ in range(2):
        updates, state = jax.jit(lambda *args: accumulating.update(*args))(
            gradients, state, params
        )
    assert jnp.any(updates["up"] != 0)


def test_a_number_of_the_bases_that_depends_on_the_parameters_is_refused():
    def init(params):
        seed = jnp.int32(params["bias"][0])
        return lowrank_optax.galore(0.1, RANK, seed=seed).init(params)

    optimizer = optax.GradientTransformation(init, optax.identity().update)
    with pytest.raises(TypeError, match="depends on the parameters"):
        train_step(loss_fn, optimizer).init(random_like(SHAPES))


@pytest.mark.parametrize(("every", "at"), [(3, 1), (3, 2), (6, 5), (4, 3)])
def test_bases_come_where_updates_are_left_out(every, at):
    """A step that had to renew, and has no update, is tried again until it has one."""
    optimizer = optax.conditionally_mask(
        low_rank(20, basis=lowrank_optax.dct_columns()), lambda step: step % every == at
    )
    step = train_step(loss_fn, optimizer, gradients="full")
    _, state, _ = trained(step, random_like(SHAPES), batches(3 * every))
    assert {refreshes for _, refreshes in ages(state)} == {1}


def test_the_norm_of_half_precision_is_float32():
    params = {"up": random_like({"up": (8, 20)})["up"].astype(jnp.float16)}
    x = random_like({"x": (12, 8)})["x"]

    def loss(params, x):
        return 8000 * jnp.mean((x.astype(params["up"].dtype) @ params["up"]) ** 2)

    step = train_step(loss, optax.sgd(1e-6))
    _, _, (metrics,) = trained(step, params, [x])
    wide = {"up": params["up"].astype(jnp.float32)}
    expected = optax.tree.norm(jax.grad(loss)(wide, x))
    assert expected > 256  # its square is infinite in float16
    assert metrics["grad_norm"].dtype == jnp.float32
    np.testing.assert_allclose(metrics["grad_norm"], expected, rtol=1e-2)


def test_a_loss_of_python_is_a_number():
    step = train_step(lambda params, x: 0.0, low_rank())
    params = random_like(SHAPES)
    found, _, (metrics,) = trained(step, params, batches(1))
    assert metrics["loss"] == 0
    assert_same(found, params)


@pytest.mark.parametrize(
    "around",
    [
        lambda tx: optax.chain(optax.add_decayed_weights(0.1), tx),
        lambda tx: optax.MultiSteps(tx, 2),
        lambda tx: optax.apply_if_finite(tx, 3),
        lambda tx: optax.conditionally_mask(tx, lambda step: step % 2 == 0),
    ],
)
def test_what_takes_no_projected_gradients_is_explained(around):
    params, xs = random_like(SHAPES), batches(1)
    step = train_step(loss_fn, around(low_rank()))
    with pytest.raises(TypeError, match=r'train_step gives .*Give gradients="full"'):
        trained(step, params, xs)
    step = train_step(loss_fn, around(low_rank()), gradients="full")
    trained(step, params, xs)


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_the_optimizer_gets_the_loss(micro_batches):
    """The mean over the micro-batches, which are equally many examples here."""
    plateau = optax.contrib.reduce_on_plateau(patience=1)
    step = train_step(
        loss_fn, optax.chain(low_rank(), plateau), micro_batches=micro_batches
    )
    _, state, metrics = trained(step, random_like(SHAPES), batches(3))
    inner = getattr(state.optimizer, "inner_state", state.optimizer)
    best = min(float(seen["loss"]) for seen in metrics)
    np.testing.assert_allclose(inner[-1].best_value, best, rtol=ROUNDING)


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_a_state_made_of_gradients_keeps_its_arrays(micro_batches):
    optimizer = optax.chain(optax.zero_nans(), low_rank())
    step = train_step(loss_fn, optimizer, micro_batches=micro_batches)
    params, xs = random_like(SHAPES), batches(3)
    structure = jax.tree.structure(step.init(params))
    found, state, _ = trained(step, params, xs)
    assert jax.tree.structure(state) == structure
    assert step.compilations == 2
    plain = train_step(loss_fn, low_rank(), micro_batches=micro_batches)
    assert_same(found, trained(plain, params, xs)[0])


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_a_state_that_grows_at_its_first_update_may(micro_batches):
    monitor = optax.monitor({"norm": optax.tree.norm})
    optimizer = optax.chain(monitor, low_rank())
    step = train_step(loss_fn, optimizer, micro_batches=micro_batches)
    _, state, metrics = trained(step, random_like(SHAPES), batches(3))
    inner = getattr(state.optimizer, "inner_state", state.optimizer)
    (norm,) = jax.tree.leaves(inner[0].measurements)
    np.testing.assert_allclose(norm, metrics[-1]["grad_norm"], rtol=ROUNDING)


def test_an_optimizer_that_hands_on_a_part_of_the_parameters_is_refused():
    optimizer = optax.lookahead(low_rank(), 2, 0.5)
    params = optax.LookaheadParams.init_synced(random_like(SHAPES))
    for call in (
        lambda: lowrank_optax.projections(optimizer, params),
        lambda: train_step(loss_fn, optimizer).init(params),
        lambda: lowrank_optax.accumulate(optimizer, 2).init(params),
    ):
        with pytest.raises(
            ValueError, match=r"projects .*\['up'\].*as optax.lookahead"
        ):
            call()


@pytest.mark.parametrize(
    "method", [lowrank_optax.sumo, lowrank_optax.low_rank_muon, lowrank_optax.fira]
)
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_no_shape_is_promoted(method, micro_batches):
    shapes = {"stack": (3, 8, 20), "down": (20, 8), "bias": (8,)}

    def loss(params, x):
        for matrix in params["stack"]:
            x = jnp.tanh(x @ matrix) @ params["down"]
        return jnp.mean((x + params["bias"][None]) ** 2)

    with jax.numpy_rank_promotion("raise"):
        step = train_step(loss, method(1e-2, rank=4), micro_batches=micro_batches)
        _, _, metrics = trained(step, random_like(shapes), batches(2))
    assert all(np.isfinite(seen["loss"]) for seen in metrics)


@pytest.mark.parametrize(
    ("around", "micro_batches"),
    [
        (optax.chain, 1),
        (optax.chain, 2),
        (lowrank_optax.low_bit, 1),
        (lowrank_optax.low_bit, 2),
        (lambda inside: lowrank_optax.accumulate(inside, 2), 2),
    ],
)
def test_an_accumulation_inside_the_optimizer_is_refused(around, micro_batches):
    optimizer = around(lowrank_optax.accumulate(optax.sgd(0.1), 2))
    step = train_step(loss_fn, optimizer, micro_batches=micro_batches)
    with pytest.raises(ValueError, match="accumulate stands inside the optimizer"):
        step.init({"w": jnp.ones((64, 16))})


def test_an_optimizer_without_extra_arguments_is_refused():
    adversary = optax.chain(optax.contrib.normalize(), optax.sgd(0.05))
    sam = optax.contrib.sam(optax.sgd(0.1), adversary, sync_period=2)
    with pytest.raises(TypeError, match="takes no further arguments"):
        train_step(loss_fn, sam)
    plain = optax.GradientTransformation(sam.init, sam.update)
    params = {"w": jnp.ones((64, 16))}
    step = train_step(lambda params, x: jnp.mean((x @ params["w"]) ** 2), plain)
    state = step.init(params)
    for _ in range(2):
        params, state, metrics = step(params, state, jnp.ones((8, 64)))
    assert np.isfinite(metrics["loss"])


def test_an_optimizer_may_name_the_arguments_that_it_takes():
    seen = []

    def update(updates, state, params=None, *, value, refresh=True):
        seen.append((value.shape, refresh))
        return jax.tree.map(lambda g: -0.1 * g, updates), state

    named = optax.GradientTransformationExtraArgs(lambda params: (), update)
    step = train_step(lambda params, x: jnp.mean((x @ params["w"]) ** 2), named)
    params = {"w": jnp.ones((64, 16))}
    step(params, step.init(params), jnp.ones((8, 64)))
    assert seen[0][0] == ()

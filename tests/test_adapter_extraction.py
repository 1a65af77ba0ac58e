"""``extract_adapter``: nearest products of a rank, ranks by energy, what is left."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lowrank_optax
from lowrank_optax import extract_adapter
from tests import references

STACK, N, M = 3, 24, 16
# Singular values of the change of each layer; the last layer does not change.
SPECTRA = [0.5 ** np.arange(M), [1.0, 0.1] + [0.0] * (M - 2), [0.0] * M]


def _with_spectrum(rng, values):
    u, _ = np.linalg.qr(rng.standard_normal((N, M)))
    v, _ = np.linalg.qr(rng.standard_normal((M, M)))
    return (u * np.asarray(values)) @ v.T


def _model():
    """Returns parameters before and after, and the change of the stack."""
    rng = np.random.default_rng(0)
    change = np.stack([_with_spectrum(rng, values) for values in SPECTRA])
    before = {
        "embed": rng.standard_normal((40, N)),
        "layers": {
            "up": {"kernel": rng.standard_normal((STACK, N, M))},
            "still": {"kernel": rng.standard_normal((STACK, M, N))},
            "norm": {"scale": rng.standard_normal((STACK, N))},
        },
        "pooler": {"kernel": rng.standard_normal((N, N))},
    }
    before = jax.tree.map(lambda x: x.astype(np.float32), before)
    after = jax.tree.map(np.copy, before)
    after["layers"]["up"]["kernel"] += change
    after["pooler"]["kernel"] += 0.1 * rng.standard_normal((N, N))
    after["layers"]["norm"]["scale"] += 1
    after["embed"][3] = 0
    return before, after


BEFORE, AFTER = _model()
KERNEL, POOLER = "['layers']['up']['kernel']", "['pooler']['kernel']"


def _changes():
    """Returns the changes of the matrices, float64, by key path."""
    after, before = jax.tree.map(np.float64, (AFTER, BEFORE))
    up = after["layers"]["up"]["kernel"] - before["layers"]["up"]["kernel"]
    pooler = after["pooler"]["kernel"] - before["pooler"]["kernel"]
    return {KERNEL: up, POOLER: pooler[None]}


@pytest.mark.parametrize("rank", [1, 4, M])
def test_factors_are_the_nearest_of_their_rank(rank):
    adapter = extract_adapter(AFTER, BEFORE, rank)

    assert adapter.factors.keys() == {KERNEL, POOLER}
    for name, changes in _changes().items():
        down, up = adapter.factors[name]
        assert down.shape[-1] == up.shape[-2] == rank
        assert np.all(adapter.ranks[name] == rank)
        products = (down @ up).reshape(changes.shape)
        errors = np.atleast_1d(adapter.errors[name])
        for change, product, error in zip(changes, products, errors, strict=True):
            nearest, expected = references.nearest_of_rank(change, rank)
            # Float32 of a decomposition whose largest singular value is about 1.
            np.testing.assert_allclose(product, nearest, atol=5e-6)
            assert error == pytest.approx(expected, abs=2e-6)


def test_no_other_product_of_the_rank_is_nearer():
    adapter, rng = extract_adapter(AFTER, BEFORE, 4), np.random.default_rng(1)
    (change,), error = _changes()[POOLER], float(adapter.errors[POOLER])
    size = np.linalg.norm(change)
    down, up = (np.asarray(x, np.float64) for x in adapter.factors[POOLER])
    for scale in (1e-3, 1e-2, 1e-1, 1.0):
        other = down + scale * rng.standard_normal(down.shape)
        # The nearest product with these columns.
        nearest = other @ np.linalg.lstsq(other, change)[0]
        assert np.linalg.norm(change - nearest) / size >= error - 1e-9
    assert np.linalg.norm(change - down @ up) / size == pytest.approx(error, rel=1e-5)


def test_factors_are_balanced():
    down, up = extract_adapter(AFTER, BEFORE, 4).factors[POOLER]
    np.testing.assert_allclose(down.T @ down, up @ up.T, atol=1e-6)


def test_an_energy_gives_each_matrix_its_rank_and_pads_the_rest():
    adapter = extract_adapter(AFTER, BEFORE, energy=0.995)

    # 1 - 4^-k reaches 0.995 at 4; 1 / 1.01 does not.
    assert adapter.ranks[KERNEL].tolist() == [4, 2, 0]
    assert adapter.ranks[KERNEL].dtype == np.int32
    down, up = adapter.factors[KERNEL]
    assert (down.shape, up.shape) == ((STACK, N, 4), (STACK, 4, M))
    for padding in (down[1, :, 2:], up[1, 2:], down[2], up[2]):
        assert not padding.any()
    kept = 1 - adapter.errors[KERNEL] ** 2
    assert np.all(kept >= 0.995)
    assert adapter.errors[KERNEL][2] == 0


def test_all_the_energy_is_the_numerical_rank():
    rng = np.random.default_rng(2)
    before = {"w": np.zeros((N, M), np.float32)}
    after = {"w": _with_spectrum(rng, [1, 1e-2, 1e-4] + [0] * (M - 3))}
    after["w"] = after["w"].astype(np.float32)
    assert extract_adapter(after, before, energy=1.0).ranks["['w']"] == 3


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_tiny_and_huge_changes_have_their_errors(scale):
    (change,) = _changes()[POOLER]
    tree = {"w": np.float32(scale * change)}
    found = extract_adapter(tree, {"w": np.zeros((N, N), np.float32)}, 4)
    expected = references.nearest_of_rank(change, 4)[1]
    assert found.errors["['w']"] == pytest.approx(expected, abs=2e-6)


def test_what_has_no_factors_is_listed():
    adapter = extract_adapter(AFTER, BEFORE, 4)
    assert set(adapter.not_covered) == {"['embed']", "['layers']['norm']['scale']"}

    adapter = extract_adapter(AFTER, BEFORE, 4, patterns={"pooler": "frozen"})
    assert adapter.factors.keys() == {KERNEL}
    assert POOLER in adapter.not_covered


def test_an_empty_matrix_has_no_factors():
    empty = {"empty": jnp.zeros((0, 12))}
    adapter = extract_adapter({**AFTER, **empty}, {**BEFORE, **empty}, 4)
    assert adapter.factors.keys() == extract_adapter(AFTER, BEFORE, 4).factors.keys()
    assert adapter.merged({**BEFORE, **empty})["empty"].shape == (0, 12)


def test_merging_changes_the_matrices_alone():
    merged = extract_adapter(AFTER, BEFORE, M).merged(BEFORE)

    kernel = merged["layers"]["up"]["kernel"]
    np.testing.assert_allclose(kernel, AFTER["layers"]["up"]["kernel"], atol=1e-5)
    assert merged["embed"] is BEFORE["embed"]
    still = merged["layers"]["still"]["kernel"]
    assert still is BEFORE["layers"]["still"]["kernel"]


def test_what_did_not_change_has_an_empty_adapter():
    adapter = extract_adapter(BEFORE, BEFORE, 4)
    assert (adapter.factors, adapter.not_covered) == ({}, ())
    assert jax.tree.all(jax.tree.map(np.array_equal, adapter.merged(BEFORE), BEFORE))


def test_bfloat16_parameters_get_float32_factors_and_stay_bfloat16():
    before = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), BEFORE)
    after = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), AFTER)

    adapter = extract_adapter(after, before, M)

    assert adapter.factors[KERNEL].down.dtype == np.float32
    assert adapter.errors[KERNEL].max() < 1e-6
    merged = adapter.merged(before)["layers"]["up"]["kernel"]
    assert merged.dtype == jnp.bfloat16
    # Full rank is exact up to float32, which bfloat16 rounds to the same numbers,
    # except for ties and sums near zero.
    wanted = after["layers"]["up"]["kernel"]
    np.testing.assert_allclose(
        *(np.asarray(x, np.float32) for x in (merged, wanted)), rtol=2**-7, atol=1e-5
    )


def test_heads_are_one_side_of_an_attention_kernel():
    shapes = {"query": (24, 4, 5), "key": (24, 4, 5), "out": (4, 5, 24)}
    rng = np.random.default_rng(3)
    before = {k: np.zeros(v, np.float32) for k, v in shapes.items()}
    after = {k: rng.standard_normal(v).astype(np.float32) for k, v in shapes.items()}
    before, after = {"attention": before}, {"attention": after}

    adapter = extract_adapter(after, before, 20)

    down, up = adapter.factors["['attention']['query']"]
    assert (down.shape, up.shape) == ((24, 20), (20, 20))
    down, up = adapter.factors["['attention']['out']"]
    assert (down.shape, up.shape) == ((20, 20), (20, 24))
    for found, wanted in zip(
        *map(jax.tree.leaves, (adapter.merged(before), after)), strict=True
    ):
        np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_the_callers_axes_make_the_matrices():
    """A leaf (in, heads, out) that is two matrices by its names, and one when told."""
    rng = np.random.default_rng(3)
    before = {"w": rng.standard_normal((8, 3, 5)).astype(np.float32)}
    change = rng.standard_normal((8, 2)) @ rng.standard_normal((2, 15))
    after = {"w": before["w"] + change.reshape(8, 3, 5).astype(np.float32)}
    axes = {"w": lowrank_optax.LowRankDimensionNumbers((0,), (1, 2))}
    adapter = extract_adapter(after, before, 2, dimension_numbers=axes)
    factors = adapter.factors["['w']"]
    assert (factors.down.shape, factors.up.shape) == ((8, 2), (2, 15))
    # Float32's rounding of sums of two products.
    np.testing.assert_allclose(adapter.merged(before)["w"], after["w"], atol=1e-5)
    apart = extract_adapter(after, before, 2)
    assert apart.factors["['w']"].down.shape != (8, 2)


def test_an_nnx_state_stays_one():
    arrays = {"kernel": np.ones((N, M), np.float32), "bias": np.ones(M, np.float32)}
    before = nnx.State({"up": {k: nnx.Param(v) for k, v in arrays.items()}})
    after = jax.tree.map(lambda x: x + 1, before)

    adapter = extract_adapter(after, before, 1)

    assert adapter.factors.keys() == {"['up']['kernel']"}
    assert adapter.not_covered == ("['up']['bias']",)
    merged = adapter.merged(before)
    assert jax.tree.structure(merged) == jax.tree.structure(before)
    kernel = merged["up"]["kernel"].get_value()
    np.testing.assert_allclose(kernel, after["up"]["kernel"].get_value(), atol=1e-5)


@pytest.mark.skipif(
    jax.device_count() < 8,
    reason="needs 8 devices: XLA_FLAGS=--xla_force_host_platform_device_count=8",
)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_parameters_give_the_same_factors_and_stay_sharded(kind):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
    place = NamedSharding(mesh, P(None, "x"))
    names = ("layers", "up", "kernel")

    def sharded(tree):
        kernel = jax.device_put(tree["layers"]["up"]["kernel"], place)
        return {**tree, "layers": {**tree["layers"], "up": {"kernel": kernel}}}

    adapter = extract_adapter(sharded(AFTER), sharded(BEFORE), 4)

    expected = extract_adapter(AFTER, BEFORE, 4)
    for one, other in zip(
        adapter.factors[KERNEL], expected.factors[KERNEL], strict=True
    ):
        np.testing.assert_array_equal(one, other)
    found, alone = adapter.merged(sharded(BEFORE)), expected.merged(BEFORE)
    for name in names:
        found, alone = found[name], alone[name]
    assert found.sharding == place
    np.testing.assert_allclose(found, alone, atol=1e-6)


def test_merging_works_inside_jit():
    adapter = extract_adapter(AFTER, BEFORE, 4)
    found = jax.jit(adapter.merged)(BEFORE)["pooler"]["kernel"]
    np.testing.assert_allclose(
        found, adapter.merged(BEFORE)["pooler"]["kernel"], atol=1e-6
    )


def _other_shape():
    return {**AFTER, "pooler": {"kernel": np.zeros((N, M), np.float32)}}


def _not_finite():
    return {**AFTER, "pooler": {"kernel": np.full((N, N), np.nan, np.float32)}}


@pytest.mark.parametrize(
    ("tuned", "pretrained", "options", "error", "message"),
    [
        (AFTER, BEFORE, {}, ValueError, "give one of rank and energy"),
        (AFTER, BEFORE, {"rank": 2, "energy": 0.5}, ValueError, "give one of"),
        (AFTER, BEFORE, {"rank": 0}, ValueError, "rank must be an int >= 1, got 0"),
        (AFTER, BEFORE, {"rank": 2.0}, ValueError, "rank must be an int >= 1, got 2"),
        (AFTER, BEFORE, {"rank": True}, ValueError, "rank must be an int >= 1, got T"),
        (AFTER, BEFORE, {"energy": 0.0}, ValueError, r"inside \(0, 1\], got 0.0"),
        (AFTER, BEFORE, {"energy": 1.1}, ValueError, r"inside \(0, 1\], got 1.1"),
        (AFTER, BEFORE, {"energy": np.nan}, ValueError, "got nan"),
        (
            *(AFTER, BEFORE, {"rank": 17}, ValueError),
            r"\['layers'\]\['up'\]\['kernel'\]: rank 17 is above the shorter side of "
            r"\(24 x 16\)",
        ),
        (
            *({**AFTER, "more": np.ones(3)}, BEFORE, {"rank": 2}, ValueError),
            r"\['more'\] is missing in pretrained",
        ),
        (
            *(AFTER, {**BEFORE, "more": np.ones(3)}, {"rank": 2}, ValueError),
            r"\['more'\] is missing in tuned",
        ),
        (
            *(_other_shape(), BEFORE, {"rank": 2}, ValueError),
            r"\['pooler'\]\['kernel'\] has shape \(24, 16\) in tuned and \(24, 24\)",
        ),
        (
            *(_not_finite(), BEFORE, {"rank": 2}, ValueError),
            r"\['pooler'\]\['kernel'\]: the change is not finite",
        ),
        (
            *(AFTER, BEFORE, {"rank": 2, "patterns": {"heads": "frozen"}}),
            *(ValueError, "finds no leaf"),
        ),
        (
            *({**AFTER, "name": "x"}, {**BEFORE, "name": "x"}, {"rank": 2}),
            *(TypeError, r"\['name'\] is no array but str"),
        ),
    ],
)
def test_what_does_not_fit_is_refused(tuned, pretrained, options, error, message):
    with pytest.raises(error, match=message):
        extract_adapter(tuned, pretrained, **options)


def test_merging_into_another_model_is_refused():
    adapter = extract_adapter(AFTER, BEFORE, 2)
    with pytest.raises(ValueError, match=r"\['pooler'\].* is of shape \(24, 16\)"):
        adapter.merged(_other_shape())
    with pytest.raises(ValueError, match=r"\['pooler'\].* is missing"):
        adapter.merged({"layers": BEFORE["layers"]})

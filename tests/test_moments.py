"""Finding the moments inside an inner transformation's state, and their kinds."""

import jax
import jax.numpy as jnp
import optax
import pytest

import lowrank_optax
from lowrank_optax.binding.moments import locate_moments
from lowrank_optax.kinds import kinds_of

PARAMS = {"b": jnp.ones(5), "w": jnp.ones((6, 2))}
W, B = (jax.tree_util.DictKey("w"),), (jax.tree_util.DictKey("b"),)


def _kinds(inner, params=PARAMS, shapes=None, others=None, fields=None):
    """Returns owner -> {field path: kind} of an inner transformation's state."""
    state = inner.init(params)
    shapes = {W: (6, 2)} if shapes is None else shapes
    found = locate_moments(
        state, shapes, {B} if others is None else others, kinds_of(fields)
    )
    names = [jax.tree_util.keystr(p) for p, _ in jax.tree.leaves_with_path(state)]
    return {
        owner: {names[moment.index]: moment.kind for moment in moments}
        for owner, moments in found.items()
    }


@pytest.mark.parametrize(
    ("inner", "expected"),
    [
        (optax.scale_by_adam(), {".mu['w']": "first", ".nu['w']": "second"}),
        (optax.trace(0.9), {".trace['w']": "first"}),
        (optax.ema(0.9), {".ema['w']": "first"}),
        (optax.scale_by_lion(), {".mu['w']": "first"}),
        (optax.scale_by_rms(), {".nu['w']": "second"}),
        (optax.scale_by_rss(), {".sum_of_squares['w']": "second"}),
        (
            optax.scale_by_amsgrad(),
            {".mu['w']": "first", ".nu['w']": "second", ".nu_max['w']": "second"},
        ),
        (optax.contrib.scale_by_muon(), {".mu['w']": "first"}),
        (optax.identity(), {}),
        (
            optax.chain(optax.clip(1.0), optax.scale_by_adam(), optax.trace(0.9)),
            {
                "[1].mu['w']": "first",
                "[1].nu['w']": "second",
                "[2].trace['w']": "first",
            },
        ),
        (
            optax.inject_hyperparams(optax.adam)(1e-3),
            {
                ".inner_state[0].mu['w']": "first",
                ".inner_state[0].nu['w']": "second",
            },
        ),
    ],
)
def test_each_field_of_a_known_transformation_has_its_kind(inner, expected):
    assert _kinds(inner) == {W: expected}


def test_leaves_at_full_size_have_no_moments_to_rebase():
    assert _kinds(optax.scale_by_adam(), shapes={}, others={W, B}) == {}


def test_a_moment_belongs_to_the_parameter_with_the_longest_path():
    params = {"a": {"w": jnp.ones((3, 2))}, "w": jnp.ones((6, 2))}
    deep = (jax.tree_util.DictKey("a"), *W)
    found = _kinds(optax.trace(0.9), params, {W: (6, 2), deep: (3, 2)}, set())
    assert found == {W: {".trace['w']": "first"}, deep: {".trace['a']['w']": "first"}}


@pytest.mark.parametrize(
    ("params", "path"),
    [
        (jnp.ones((6, 2)), ()),
        ([jnp.ones(3), jnp.ones((6, 2))], (jax.tree_util.SequenceKey(1),)),
        ({"mu": jnp.ones((6, 2))}, (jax.tree_util.DictKey("mu"),)),
        ({"count": jnp.ones((6, 2))}, (jax.tree_util.DictKey("count"),)),
    ],
)
def test_parameters_may_be_any_tree_and_have_any_name(params, path):
    others = {p for p, _ in jax.tree.leaves_with_path(params)} - {path}
    inner = optax.chain(optax.scale_by_adam())
    kinds = _kinds(inner, params, {path: (6, 2)}, others)[path]
    assert sorted(kinds.values()) == ["first", "second"]


def test_a_field_of_ones_own_has_the_kind_that_was_given():
    state = {"velocity": {"w": jnp.ones((6, 2))}, "table": jnp.ones(7)}
    fields = {"velocity": "first", "table": "constant"}
    found = locate_moments(state, {W: (6, 2)}, set(), kinds_of(fields))
    assert [moment.kind for moment in found[W]] == ["first"]


def test_the_callers_kinds_win_over_the_known_ones():
    kinds = _kinds(optax.scale_by_adam(), fields={"mu": "constant"})
    assert kinds == {W: {".nu['w']": "second"}}


def _init(inner, params, **parts):
    return lowrank_optax.scale_by_low_rank(inner, rank=2, **parts).init(params)


def test_an_unknown_field_raises_in_init_and_says_how_to_give_it_a_rule():
    message = (
        r"inner state field 'v_row' at .*\['w'\] with shape .* has no re-basing rule; "
        r".*moments=\{'v_row': kind\}"
    )
    inner = optax.scale_by_factored_rms(min_dim_size_to_factor=1)
    with pytest.raises(ValueError, match=message):
        _init(inner, {"w": jnp.ones((6, 4))})


def test_an_array_that_belongs_to_no_parameter_raises():
    inner = optax.GradientTransformation(
        lambda params: {"buffer": jnp.zeros(3)}, lambda u, s, p=None: (u, s)
    )
    with pytest.raises(ValueError, match=r"field 'buffer' at \['buffer'\] with shape"):
        _init(inner, {"w": jnp.ones((6, 4))})
    # With a kind it passes; where nothing is projected nobody asks.
    _init(inner, {"w": jnp.ones((6, 4))}, moments={"buffer": "constant"})
    _init(inner, {"w": jnp.ones(6)})


def test_a_known_field_of_another_shape_raises():
    inner = optax.GradientTransformation(
        lambda params: {"mu": jax.tree.map(lambda x: jnp.zeros(len(x)), params)},
        lambda u, s, p=None: (u, s),
    )
    with pytest.raises(
        ValueError, match=r"\['w'\]: .* do not fit 'mu' of shape \(6,\)"
    ):
        _init(inner, {"w": jnp.ones((6, 4))})


def test_an_inner_transformation_that_needs_parameters_raises_and_says_where_it_goes():
    inner = optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(0.1))
    message = r"inner transformation .* needs parameters.*put weight decay .* outside"
    with pytest.raises(ValueError, match=message):
        _init(inner, {"w": jnp.ones((6, 4))})

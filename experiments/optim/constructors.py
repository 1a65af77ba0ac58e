"""How each method of the table is made from the flags' values.

Each is called as :class:`experiments.optim.methods.Method` says.
"""

import jax
import jax.numpy as jnp
import optax

import lowrank_optax
from experiments.optim.foam import scale_by_foam
from experiments.optim.stable_spam import scale_by_stable_spam
from experiments.optim.unstacked import unstacked


def adamw(learning_rate, *, seed, **adam):
    del seed
    return optax.adamw(learning_rate, **adam)


def _with_decay(transformation, learning_rate, weight_decay):
    return optax.chain(
        transformation,
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


def stable_spam(learning_rate, *, b1, b2, eps, reset_every, weight_decay, seed):
    del seed
    made = scale_by_stable_spam(b1, b2, eps, reset_every=reset_every)
    return _with_decay(made, learning_rate, weight_decay)


def foam(learning_rate, *, b1, b2, eps, fold_level, weight_decay, seed):
    del seed
    made = scale_by_foam(fold_level, b1, b2, eps)
    return _with_decay(made, learning_rate, weight_decay)


def scale(learning_rate, *, weight_decay, **others):
    """SCALE's hidden layers, at Muon's root mean square.

    The paper has a momentum for the head alone, which another optimizer trains here.
    """
    del others
    made = lowrank_optax.scale_by_neuron(
        0.0, rms=0.2, dimension_numbers=lowrank_optax.dimension_numbers_by_shape
    )
    return _with_decay(made, learning_rate, weight_decay)


def frugal(
    learning_rate,
    *,
    rank,
    update_proj_gap,
    residual,
    b1,
    b2,
    eps,
    weight_decay,
    seed,
):
    """FRUGAL in GaLore's subspace: Adam inside, signs of the gradient outside.

    In a new subspace the momentum starts at zero. The second moment starts at the means
    of its rows, because Adam's counter runs on. The ratio of the two learning rates is
    ``residual``.
    """
    made = lowrank_optax.scale_by_low_rank(
        optax.scale_by_adam(b1, b2, eps),
        rank,
        basis=lowrank_optax.exact_svd(),
        refresh=lowrank_optax.every(update_proj_gap, stagger=False),
        rebase="zero",
        residual=lowrank_optax.sign_residual(residual),
        seed=seed,
    )
    return _with_decay(made, learning_rate, weight_decay)


def of_factors(learning_rate, *, rank, **others):
    del rank
    return adamw(learning_rate, **others)


def relora(learning_rate, *, update_proj_gap, **others):
    """AdamW whose rate is warmed up again, over a tenth of the gap, at each restart."""
    warmup = max(1, update_proj_gap // 10)

    def rate(count):
        since = count % update_proj_gap
        share = jnp.minimum((since + 1) / warmup, 1)
        return learning_rate(count) * jnp.where(count < update_proj_gap, 1, share)

    return of_factors(rate, **others)


def basis_rule(name, power_iterations=0.5):
    """Returns the rule of --basis, by its name."""
    if name == "range_finder":
        return lowrank_optax.range_finder(power_iterations=power_iterations)
    rules = {"svd": lowrank_optax.exact_svd, "dct": lowrank_optax.dct_columns}
    return rules[name]()


def adarankgrad(
    learning_rate,
    *,
    rank,
    basis,
    threshold,
    min_rank,
    final_min_rank,
    min_rank_steps,
    rank_smoothing,
    min_refresh_interval,
    max_refresh_interval,
    power_iterations,
    residual,
    **options,
):
    if final_min_rank is not None:
        min_rank = optax.linear_schedule(min_rank, final_min_rank, min_rank_steps)
    if isinstance(rank, int):
        rank = lowrank_optax.energy_rank(rank, threshold, min_rank, rank_smoothing)
    return lowrank_optax.adarankgrad(
        learning_rate,
        rank=rank,
        refresh=lowrank_optax.on_convergence(
            min_refresh_interval, max_refresh_interval, (1 - threshold) ** 0.5
        ),
        basis=basis_rule(basis or "range_finder", power_iterations),
        residual=lowrank_optax.sign_residual(residual) if residual else None,
        **options,
    )


def galore(learning_rate, *, basis, **options):
    return lowrank_optax.galore(
        learning_rate, scale=1.0, basis=basis_rule(basis or "svd"), **options
    )


def optax_galore(
    learning_rate, *, rank, update_proj_gap, b1, b2, eps, weight_decay, seed
):
    del seed
    galore = optax.contrib.galore(
        learning_rate,
        rank=rank,
        update_proj_gap=update_proj_gap,
        base_optimizer=optax.scale_by_adam(b1, b2, eps),
        weight_decay=weight_decay,
    )
    return unstacked(galore)


def ldadam(learning_rate, **options):
    return lowrank_optax.ldadam(
        learning_rate, start=lowrank_optax.exact_svd(), **options
    )


def fira(learning_rate, **options):
    return lowrank_optax.fira(learning_rate, basis=lowrank_optax.exact_svd(), **options)


def apollo_mini(learning_rate, **options):
    return lowrank_optax.apollo(
        learning_rate, 1, scale=128**0.5, by_matrix=True, **options
    )


def vlorp(learning_rate, *, rank, granularity, update_proj_gap, b1, b2, eps, **options):
    return lowrank_optax.vlorp(
        learning_rate,
        rank,
        granularity,
        optax.scale_by_adam(b1, b2, eps),
        refresh=lowrank_optax.every(update_proj_gap),
        **options,
    )


def projfactor(learning_rate, *, rank, granularity, update_proj_gap, **options):
    return lowrank_optax.projfactor(
        learning_rate,
        rank,
        granularity,
        refresh=lowrank_optax.every(update_proj_gap),
        **options,
    )


def adafactor(learning_rate, *, weight_decay, **others):
    """Adafactor without relative step sizes, with decoupled weight decay."""
    del others
    return optax.chain(
        optax.scale_by_factored_rms(),
        optax.clip_by_block_rms(1.0),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


def muon(learning_rate, *, momentum, neuron_decay, weight_decay, **others):
    """Muon; NorMuon with a neuron_decay; without state at a momentum of 0."""
    del others
    numbers = optax.contrib.MuonDimensionNumbers(-2, -1)

    def made(rate, decay):
        return optax.contrib.muon(
            rate,
            beta=momentum,
            weight_decay=decay,
            # Each leaf is a matrix or a stack of matrices.
            muon_weight_dimension_numbers=lambda params: jax.tree.map(
                lambda leaf: numbers, params
            ),
            consistent_rms=0.2,
        )

    if momentum and neuron_decay is None:
        return made(learning_rate, weight_decay)
    parts = [made(1.0, 0.0) if momentum else _without_state(made(1.0, 0.0))]
    # Down already.
    parts.append(optax.scale(-1.0))
    if neuron_decay is not None:
        by_shape = lowrank_optax.dimension_numbers_by_shape
        parts.append(
            lowrank_optax.scale_by_neuron(neuron_decay, dimension_numbers=by_shape)
        )
    return optax.chain(
        *parts,
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


def _without_state(transformation):
    """Returns a transformation whose updates do not depend on its state, without it."""

    def update(updates, params):
        return transformation.update(updates, transformation.init(updates), params)[0]

    return optax.stateless(update)


def orthogonalized(make):
    """Returns the method of ``sumo`` or ``low_rank_muon``, with Muon's options."""

    def method(
        learning_rate,
        *,
        rank,
        momentum,
        update_proj_gap,
        basis,
        power_iterations,
        weight_decay,
        b1,
        b2,
        eps,
        **options,
    ):
        del b1, b2, eps
        return make(
            learning_rate,
            rank,
            momentum,
            weight_decay,
            refresh=lowrank_optax.every(update_proj_gap),
            basis=basis_rule(basis or "range_finder", power_iterations),
            **options,
        )

    return method

"""google-tunix: ``PeftTrainer`` on a small Qwen3 under a mesh; its checkpoints."""

from pathlib import Path

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from tunix.models.qwen3 import model as qwen3
from tunix.sft import checkpoint_manager, peft_trainer, utils

from tests.clients.protocol import (
    HEAD_DIM,
    HEADS,
    HIDDEN,
    INNER,
    VOCABULARY,
    WIDTH,
    Client,
    Trainer,
    batch,
    cross_entropy,
    matrices,
)

LAYERS, KEY_HEADS = 2, 2
CONFIG = qwen3.ModelConfig(
    num_layers=LAYERS,
    vocab_size=VOCABULARY,
    embed_dim=WIDTH,
    hidden_dim=HIDDEN,
    num_heads=HEADS,
    head_dim=HEAD_DIM,
    num_kv_heads=KEY_HEADS,
    rope_theta=10_000,
    norm_eps=1e-6,
)


def create(seed: int) -> nnx.Module:
    """Returns a model, sharded by the names of its axes as Tunix' guide does it."""
    model = qwen3.Qwen3(CONFIG, rngs=nnx.Rngs(seed))
    # Qwen3 expects weights to be loaded, and has zeros in their place.
    init = nnx.initializers.lecun_normal()
    key = jax.random.key(seed)
    for layer in model.layers:
        for dense in (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj):
            key, own = jax.random.split(key)
            dense.kernel[...] = init(own, dense.kernel.shape)
    state = nnx.state(model)
    specs = nnx.get_partition_spec(state)
    nnx.update(model, jax.lax.with_sharding_constraint(state, specs))
    return model


def model_input(example: peft_trainer.TrainingInput) -> dict:
    return {
        "input_tokens": example.input_tokens,
        "input_mask": example.input_mask,
        "positions": utils.build_positions_from_mask(example.input_mask),
        "attention_mask": utils.make_causal_attn_mask(example.input_mask),
    }


def loss_and_itself(model, input_tokens, input_mask, positions, attention_mask):
    logits, _ = model(input_tokens, positions, None, attention_mask)
    loss = cross_entropy(logits[:, :-1], input_tokens[:, 1:])
    return loss, loss


class WithLoss(peft_trainer.PeftTrainer):
    """Keeps the loss of the last step, as Tunix' own trainers keep their metrics."""

    def _post_process_train_step(self, aux):
        self.last_loss = aux


class TunixTrainer(Trainer):
    def __init__(self, model, optimizer, mesh, directory=None):
        self.optimizer, self.mesh = optimizer, mesh
        config = peft_trainer.TrainingConfig(
            eval_every_n_steps=1000,
            checkpoint_root_directory=directory,
            checkpointing_options=ocp.CheckpointManagerOptions(
                save_interval_steps=1000
            ),
        )
        with self.mesh:
            trainer = WithLoss(model, optimizer, config)
        trainer = trainer.with_gen_model_input_fn(model_input)
        self.trainer = trainer.with_loss_fn(loss_and_itself, has_aux=True)
        # Of several calls of train: else it closes itself after the first.
        self.trainer.is_managed_externally = True

    @property
    def params(self):
        return nnx.state(self.trainer.model, nnx.Param)

    @property
    def opt_state(self):
        return self.trainer.optimizer.opt_state

    def step(self, index):
        tokens, following = batch(index)
        tokens = np.concatenate([tokens, following[:, -1:]], axis=1)
        mask = np.ones(tokens.shape, bool)
        with self.mesh:
            self.trainer.train([peft_trainer.TrainingInput(tokens, mask)])
        return float(self.trainer.last_loss)

    def save(self, directory: Path):
        manager = checkpoint_manager.CheckpointManager(str(directory))
        trainer = self.trainer
        steps = trainer.train_steps
        manager.save(steps, trainer.model, trainer.optimizer, force=True)
        manager.close()

    def restore(self, directory: Path):
        """A new trainer finds the checkpoint by itself."""
        steps = self.trainer.train_steps
        self.__init__(self.trainer.model, self.optimizer, self.mesh, str(directory))
        assert self.trainer.train_steps > steps


EXPECTED = {
    "embedder/input_embedding": matrices(VOCABULARY, WIDTH),
    "final_norm/w": None,
    "lm_head/w": matrices(WIDTH, VOCABULARY),
    **{
        f"layers/{i}/{leaf}": seen
        for i in range(LAYERS)
        for leaf, seen in {
            "input_layernorm/w": None,
            "post_attention_layernorm/w": None,
            "attn/q_proj/w": matrices(WIDTH, INNER),
            "attn/k_proj/w": matrices(WIDTH, KEY_HEADS * HEAD_DIM),
            "attn/v_proj/w": matrices(WIDTH, KEY_HEADS * HEAD_DIM),
            "attn/o_proj/w": matrices(INNER, WIDTH),
            "attn/q_norm/w": None,
            "attn/k_norm/w": None,
            "mlp/gate_proj/kernel": matrices(WIDTH, HIDDEN),
            "mlp/up_proj/kernel": matrices(WIDTH, HIDDEN),
            "mlp/down_proj/kernel": matrices(HIDDEN, WIDTH),
        }.items()
    },
}


class Tunix(Client):
    expected = EXPECTED

    def trainer(self, optimizer: optax.GradientTransformation, mesh=None, seed=0):
        # Tunix shards its data over "fsdp": a mesh, of one device at least.
        mesh = mesh or jax.make_mesh(
            (1, 1),
            ("fsdp", "tp"),
            devices=jax.devices()[:1],
            axis_types=(jax.sharding.AxisType.Auto,) * 2,
        )
        with mesh:
            model = nnx.jit(create, static_argnums=0)(seed)
        return TunixTrainer(model, optimizer, mesh)

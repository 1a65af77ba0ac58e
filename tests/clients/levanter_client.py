"""Levanter: its ``Trainer`` on a small LLaMA; it finds its checkpoints by itself."""

import dataclasses
from pathlib import Path

import haliax as hax
import jax
import levanter.checkpoint
import levanter.tracker
import levanter.trainer
import numpy as np
import optax
from jax.sharding import AxisType, Mesh
from levanter.layers.attention import AttentionMask
from levanter.models.llama import LlamaConfig, LlamaLMHeadModel
from levanter.trainer_state import trainables_only

from tests.clients.protocol import (
    HEAD_DIM,
    HEADS,
    HIDDEN,
    INNER,
    LAYERS,
    VOCABULARY,
    WIDTH,
    Client,
    Trainer,
    batch,
    cross_entropy,
    matrices,
    stacked,
    under,
)

KEY_HEADS, LENGTH = 2, 16
CONFIG = LlamaConfig(
    seq_len=LENGTH,
    hidden_dim=WIDTH,
    intermediate_dim=HIDDEN,
    num_layers=LAYERS,
    num_heads=HEADS,
    head_dim=HEAD_DIM,
    num_kv_heads=KEY_HEADS,
    gradient_checkpointing=False,
)
Vocab = hax.Axis("vocab", VOCABULARY)


@dataclasses.dataclass
class OnMesh(levanter.trainer.TrainerConfig):
    """On a mesh of our own: Levanter's has all devices of the process."""

    devices: np.ndarray | None = None

    @property
    def device_mesh(self) -> Mesh:
        names = ("replica_dcn", "replica", "data", "model")
        devices = self.devices[None, None]
        return Mesh(devices, names, axis_types=(AxisType.Auto,) * 4)


def loss(model, tokens, *, key=None):
    """As Levanter's own, whose mean has a mask of floats that jax refuses."""
    logits = model(tokens, AttentionMask.causal(), key=key)
    logits = logits.rearrange(("batch", "position", "vocab")).array
    return hax.named(cross_entropy(logits[:, :-1], tokens.array[:, 1:]), ())


class LevanterTrainer(Trainer):
    def __init__(self, optimizer, devices, seed, load_from=None):
        self.arguments = optimizer, devices, seed
        config = OnMesh(
            id="run",
            tracker=levanter.tracker.NoopConfig(),
            devices=devices,
            train_batch_size=8,
            tensor_parallel_axes=["mlp", "kv_head", "heads", "vocab"],
            load_checkpoint_path=load_from,
            load_checkpoint=load_from is not None,
            log_jaxprs=False,
            log_xla_hlo=False,
            require_accelerator=False,
        )
        self.trainer = levanter.trainer.Trainer(
            config, optimizer, loss, add_default_hooks=False
        )
        key = jax.random.PRNGKey(seed)

        def model():
            return LlamaLMHeadModel.init(Vocab, CONFIG, key=key)

        with self.trainer:
            self.state = self.trainer.initial_state(key, model_init=model)

    @property
    def params(self):
        return trainables_only(self.state.model, True)

    @property
    def opt_state(self):
        return self.state.opt_state

    def step(self, index):
        tokens, _ = batch(index)
        Batch = hax.Axis("batch", len(tokens))
        tokens = hax.named(tokens, (Batch, CONFIG.Pos))
        with self.trainer:
            info = self.trainer.train_step(self.state, tokens)
        self.state = info.state
        return float(info.loss)

    def save(self, directory: Path):
        step = int(self.state.step)
        levanter.checkpoint.save_checkpoint(
            self.state.saveable_state, step, directory / f"step-{step}"
        )

    def restore(self, directory: Path):
        """A new trainer finds the checkpoint by itself."""
        self.__init__(*self.arguments, load_from=str(directory))


LAYER = {
    "input_layernorm/weight": None,
    "post_attention_layernorm/weight": None,
    "self_attn/q_proj/weight": matrices(WIDTH, INNER),
    "self_attn/k_proj/weight": matrices(WIDTH, KEY_HEADS * HEAD_DIM),
    "self_attn/v_proj/weight": matrices(WIDTH, KEY_HEADS * HEAD_DIM),
    "self_attn/o_proj/weight": matrices(INNER, WIDTH),
    "mlp/gate_proj/weight": matrices(WIDTH, HIDDEN),
    "mlp/up_proj/weight": matrices(WIDTH, HIDDEN),
    "mlp/down_proj/weight": matrices(HIDDEN, WIDTH),
}
EXPECTED = {
    "embeddings/token_embeddings/weight": matrices(VOCABULARY, WIDTH),
    **under("transformer/layers/stacked", stacked(LAYER, LAYERS)),
    "transformer/norm/weight": None,
    "lm_head/weight": matrices(WIDTH, VOCABULARY),
}


class Levanter(Client):
    expected = EXPECTED

    def trainer(self, optimizer: optax.GradientTransformation, mesh=None, seed=0):
        devices = np.array(jax.devices()[:1])[:, None] if mesh is None else mesh.devices
        return LevanterTrainer(optimizer, devices, seed)

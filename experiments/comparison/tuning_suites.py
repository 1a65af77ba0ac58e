"""The suites that fine-tune: methods, tasks and searches."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from experiments.comparison.examples import GLUE
from experiments.comparison.measures import LOSS, METRIC, Measure
from experiments.comparison.suite import Contender, Suite, Task
from experiments.comparison.trainers import TUNER
from experiments.optim.tuning import TUNING, TuningOptions


def _tuned(
    name: str,
    optimizer: str | None = None,
    rate: float = TuningOptions.learning_rate,
    **flags: Any,
) -> Contender:
    """Returns a method whose search starts at its defaults in fine-tuning."""
    optimizer = optimizer or name
    return Contender(
        name,
        {"optimizer": optimizer, **flags},
        TUNING[optimizer]["block_scale"],
        rate,
    )


def _suite(
    description: str,
    flags: Mapping[str, Any],
    contenders: tuple[Contender, ...],
    *,
    search: int = 1,
    measure: Measure = METRIC,
    data: str | None = GLUE,
    **others: Any,
) -> Suite:
    return Suite(
        description,
        flags,
        contenders,
        search=search,
        measure=measure,
        data=data,
        trainer=TUNER,
        **others,
    )


def _ranks(*ranks: int) -> tuple[Contender, ...]:
    return tuple(
        _tuned(f"{name} r={rank}", name, rank=rank)
        for name in ("galore", "adarankgrad")
        for rank in ranks
    )


# The new head alone is trained, at the rate of a linear classifier.
_FROZEN = dataclasses.replace(
    _tuned("frozen encoder", "adamw", 2e-3, frozen="embeddings|blocks|pooler"),
    trains_blocks=False,
)

_MINILM: dict[str, Any] = {
    "model": "minilm",
    "max_length": 128,
    "batch_size": 16,
    "steps": 300,
    "eval_every": 100,
}
_SMALL_TASKS = (
    Task("cola", {"task": "cola", "batch_size": 32}),
    Task("mrpc", {"task": "mrpc"}),
    Task("rte", {"task": "rte"}),
    Task("stsb", {"task": "stsb"}),
    Task("sst2", {"task": "sst2"}),
)
# Where AdaRankGrad's ablations are.
_ABLATED_TASKS = tuple(task for task in _SMALL_TASKS if task.name in ("mrpc", "rte"))

# At the same c r, the columns of moments for each row.
_GRAINS = tuple(
    _tuned(f"{name} c={c} r={r}", name, granularity=c, rank=r)
    for name in ("vlorp", "projfactor")
    for c, r in ((1, 32), (4, 8), (16, 2))
)
# The others at the rank of c = 1, and what orthogonalizes beside what does not.
_GRANULARITY = (
    _tuned("adamw"),
    _tuned("lora", rank=32),
    _tuned("galore", rank=32),
    *_GRAINS,
    _tuned("low_rank_muon", rank=32),
    _tuned("muon"),
)


def _ablation(description: str, variants: Mapping[str, Mapping[str, Any]]) -> Suite:
    """Returns variants of adarankgrad at rank 8, with nothing searched."""
    contenders = tuple(
        dataclasses.replace(
            _tuned(name, "adarankgrad", rank=8, **flags), like="adarankgrad r=8"
        )
        for name, flags in variants.items()
    )
    return _suite(description, _MINILM, contenders, tasks=_ABLATED_TASKS)


_FIXED_INTERVAL = {"min_refresh_interval": 100, "max_refresh_interval": 100}
# Without a limit on the time.
_ON_CONVERGENCE = {"min_refresh_interval": 50, "max_refresh_interval": 1_000}

# GaLore's batch, length, epochs, scale (4) and interval (500).
_GALORE: dict[str, Any] = {"max_length": 512, "batch_size": 16, "epochs": 30}


def _glue_task(name: str, rate: float = 1e-5, **flags: Any) -> Task:
    return Task(name, {"task": name, **flags}, rate)


def _llama(description: str, task: str, data: str | None) -> Suite:
    """Returns VLoRP's methods on a LLaMA of 7 billion parameters: c r = 256."""
    return _suite(
        f"{description}, VLoRP's budget c r = 256 and an interval of 25, bfloat16",
        {
            "task": task,
            "max_length": 512,
            "batch_size": 16,
            "epochs": 3,
            "compute_dtype": "bfloat16",
            "param_dtype": "bfloat16",
            "remat": True,
        },
        (
            _tuned("adamw", rate=1e-5),
            _tuned("lora", rank=256),
            _tuned("galore", rate=1e-5, rank=256),
            *(
                _tuned(f"{name} c={c} r={r}", name, 1e-5, granularity=c, rank=r)
                for name in ("vlorp", "projfactor")
                for c, r in ((1, 256), (16, 16), (64, 4))
            ),
        ),
        data=data,
        seeds=(0,),
        needs_model=True,
    )


TUNING_SUITES: dict[str, Suite] = {
    "glue-small": _suite(
        # --steps may change the length, so that it is not named here.
        "MiniLM on five tasks of GLUE, a budget for a CPU",
        _MINILM,
        (
            _tuned("adamw"),
            _tuned("lora"),
            *_ranks(4, 8),
            _tuned("vlorp"),
            _tuned("projfactor"),
            _tuned("low_rank_muon"),
            _tuned("sumo"),
            _FROZEN,
        ),
        search=4,
        tasks=_SMALL_TASKS,
    ),
    "glue-granularity": _suite(
        "granularity c at the same c r, MiniLM on MRPC",
        {**_MINILM, "task": "mrpc"},
        _GRANULARITY,
        search=4,
    ),
    "smollm2-gsm8k": _suite(
        "granularity c at the same c r, SmolLM2-135M on GSM8K; what is compared is the "
        "loss of the answers of 64 problems, in nats per token",
        {
            **{"model": "smollm2", "task": "gsm8k", "steps": 200, "batch_size": 8},
            **{"max_length": 256, "eval_every": 100, "validation_examples": 64},
            # Its problems are not solved by a model of this size: no time for that.
            **{"eval_examples": 1, "answer_tokens": 16},
        },
        _GRANULARITY,
        search=3,
        seeds=(0, 1),
        measure=LOSS,
        data="hub:openai/gsm8k:main",
    ),
    "tuning-adaptive": _ablation(
        "what adapts while MiniLM is tuned: rank, refresh, both or neither "
        "(AdaRankGrad's Tables 5 and 6)",
        {
            "rank and refresh": {"min_rank": 1, **_ON_CONVERGENCE},
            "rank only": {"min_rank": 1, **_FIXED_INTERVAL},
            "refresh only": {"min_rank": 8, **_ON_CONVERGENCE},
            "neither": {"min_rank": 8, **_FIXED_INTERVAL},
        },
    ),
    "tuning-threshold": _ablation(
        "the share of a gradient that the rank may lose while MiniLM is tuned "
        "(AdaRankGrad's Figure 5)",
        {
            f"threshold {threshold:g}": {"threshold": threshold, "min_rank": 1}
            for threshold in (0.5, 0.3, 0.2, 0.1, 0.03)
        },
    ),
    "geneformer-like": _suite(
        "sequences of integers by any BERT with token ids of its own: accuracy and "
        "macro-F1 (AdaRankGrad's Figure 6)",
        {"task": "tokens", "batch_size": 16, "epochs": 3},
        (_tuned("adamw"), _tuned("lora"), *_ranks(8), _FROZEN),
        search=4,
        data=None,
        needs_model=True,
    ),
    "roberta-glue": _suite(
        "GLUE with GaLore's published recipe, for the RoBERTa-base of --model",
        _GALORE,
        (
            _tuned("adamw"),
            *(_tuned(f"lora r={rank}", "lora", rank=rank) for rank in (4, 8)),
            *_ranks(4, 8),
        ),
        tasks=(
            _glue_task("cola", 3e-5, batch_size=32),
            _glue_task("stsb"),
            _glue_task("mrpc", 3e-5),
            _glue_task("rte"),
            _glue_task("sst2"),
            _glue_task("mnli"),
            _glue_task("qnli"),
            _glue_task("qqp"),
        ),
        needs_model=True,
    ),
    "llama2-7b-commonsense": _llama("Commonsense170k", "commonsense", None),
    "llama2-7b-gsm8k": _llama("GSM8K", "gsm8k", "hub:openai/gsm8k:main"),
    "llama2-7b-mmlu": _llama(
        "MMLU as prompts and completions in --data", "completion", None
    ),
}

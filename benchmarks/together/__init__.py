"""Pre-trains many runs of a method in one program: a search compiles once.

The runs of a method differ in their learning rates, their seed and their text. All
three are inputs of the compiled step, and the runs are an axis of it, so that a search
over rates takes one compilation and, on an accelerator, little more time than one run.
Each round trains the neighbours of the best point of :mod:`.search`, until the best
point lies inside its neighbours; then the other seeds and texts follow at its rates.

    python -m benchmarks.together.texts --suite cpu-small --seeds 3 --out texts.npz \
        c4=TRAIN,VALIDATION novels=TRAIN
    python -m benchmarks.together --suites cpu-small --texts texts.npz \
        --only muon normuon --out results.jsonl

``texts`` writes down the batches that the command would have trained on, so that the
machine with the accelerator needs neither data nor their pipeline. The first text is
searched on; on the others nothing is chosen. A line of the results has the entries of
a line of a comparison's results.jsonl, with ``suite`` and ``text``.

What is trained is what ``experiments.pretrain_llama`` trains: its model, batches in
their order, optimizer and validation. A basis that one run renews is computed in all,
and only that run takes it.
"""

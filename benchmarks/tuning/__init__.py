"""Runs the suites of ``experiments.compare`` that fine-tune, many runs in a process.

A run of the command takes a process, and compiles its steps anew, for a minute; on an
accelerator its steps then take seconds. Here the learning rates and the seed are
arguments of the step, so that the runs of a method on a task share one program. Worker
processes compile side by side, and train in turns. What is trained is what the command
trains: its data, its order, its model, its optimizer and its validations. Two things
differ. All batches of a task are padded to the longest bucket, which changes the
numbers that dropout draws; and the state is compacted once, at the end of a run.

    python -m benchmarks.tuning --suites glue-small glue-granularity \
        --data ../shared/data/glue ../shared/data/glue --out results.jsonl \
        --minutes 7 --workers 14

A line of the file is a line of a comparison's results.jsonl, with ``suite`` and
``part`` (the task of a suite that has several) beside it;
:mod:`benchmarks.tuning.tables` makes the comparison's tables of them. ``--known`` goes
on where earlier files end.
"""

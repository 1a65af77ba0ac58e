"""Times and bytes on one accelerator, in minutes: ``python -m benchmarks.accelerator``.

There are four stages, with a JSON file each:

a  the update alone, against optax's, with and without a renewal of all bases;
b  the whole training step of a LLaMA: tokens a second, and bytes beside the plan;
c  the update that renews all bases, by basis rule;
d  the step of a LLaMA of 7 billion parameters inside 24 GB.

Only jax, optax, flax and this repository are imported. Workers are processes that
measure. The process that starts the workers does not use the device.
"""

"""The remark on loaded weights that predict worse than a guess."""

import math
from pathlib import Path

from experiments.run.config import Config
from experiments.run.initial_loss import worse_than_guessing

LOADED = Config(initial_weights=Path("some/model"), tokenizer="bytes")


def test_loaded_weights_worse_than_a_guess_are_remarked_in_one_line():
    said = worse_than_guessing(LOADED, 32000, 25.9)
    assert said is not None
    assert "\n" not in said
    for part in ("some/model", "25.9", "32,000", "10.4", "--tokenizer bytes", "give"):
        assert part in said
    assert worse_than_guessing(LOADED, 32000, math.nan) is not None


def test_loaded_weights_that_predict_are_not_remarked_nor_are_random_ones():
    assert worse_than_guessing(LOADED, 32000, 10.3) is None
    assert worse_than_guessing(Config(), 257, 5.6) is None

"""Loss against tokens per parameter, and against width, from comparisons."""

from collections.abc import Iterable, Mapping

from matplotlib.figure import Figure

from benchmarks.suite_tables import rows
from docs.figures.style import BLUE, FAINT, GREEN, GREY, ORANGE, PURPLE, new
from experiments.comparison.rows import Row
from experiments.comparison.suites import SUITES
from experiments.model.shape import MODELS

# Bytes of AdamW's float32 moments, for each parameter.
_ADAMW = 8
# Method -> its name in the figure, and its colour.
_SHOWN = {
    "scale": ("SCALE", FAINT),
    "low_rank_muon dct r=16 8 bits": ("low_rank_muon, cosines, d/8", GREEN),
    "sumo dct r=104 8 bits": ("sumo, cosines, 13d/16", PURPLE),
    "low_rank_muon dct r=104 8 bits": ("low_rank_muon, cosines, 13d/16", BLUE),
    "muon": ("Muon", ORANGE),
    "normuon": ("NorMuon", "#b8860b"),
    "adarankgrad": ("adarankgrad, 3d/8", "#5aa9e6"),
    "optax_galore": ("optax.contrib.galore, d/4", "#c58f6a"),
}


def found(suites: Iterable[str]) -> dict[str, dict[str, Row]]:
    """Returns suite -> method -> row; the same share of the width is one method."""
    like = {c.name: c.like for suite in suites for c in SUITES[suite].contenders}

    def name(row: Row) -> str:
        other = like[row.method]
        return other if other in _SHOWN else row.method

    return {suite: {name(row): row for row in rows(suite)} for suite in suites}


def tokens_per_parameter(row: Row) -> float:
    """Returns the tokens that a run has trained on, for each parameter."""
    run = row.runs[0]
    return run["tokens"] / (run["adamw_state_bytes"] // _ADAMW)


def loss_against_tokens() -> Figure:
    """Difference to AdamW's loss, against tokens per parameter."""
    suites = found(("cpu-small", "cpu-long"))
    places = {x: tokens_per_parameter(suites[x]["adamw"]) for x in suites}
    figure = _differences(suites, places)
    (axes,) = figure.axes
    axes.set_xlabel("tokens per parameter")
    return figure


def loss_against_width() -> Figure:
    """Difference to AdamW's loss, against the width of the model."""
    suites = found(("cpu-small", "cpu-wide"))
    models = {suite: suites[suite]["adamw"].runs[0]["model"] for suite in suites}
    places = {suite: MODELS[model]["hidden_size"] for suite, model in models.items()}
    figure = _differences(suites, places)
    (axes,) = figure.axes
    axes.set_xlabel("width of the model")
    return figure


def _differences(
    suites: Mapping[str, Mapping[str, Row]], places: Mapping[str, float]
) -> Figure:
    """Draws each seed's difference to AdamW's mean, and lines through the means."""
    figure, axes = new(height=3.8)
    adamw = {suite: rows["adamw"].mean for suite, rows in suites.items()}
    for method, (name, color) in _SHOWN.items():
        line = []
        for suite, of_suite in suites.items():
            if method not in of_suite:
                continue
            row = of_suite[method]
            percent = [100 * (loss / adamw[suite] - 1) for loss in row.losses]
            axes.plot([places[suite]] * len(percent), percent, ".", color=color)
            line.append((places[suite], 100 * (row.mean / adamw[suite] - 1)))
        if len(line) > 1:
            axes.plot(*zip(*line, strict=True), color=color, label=name)
    axes.axhline(0, color=GREY, linestyle=":", label="AdamW")
    axes.set_xscale("log")
    ticks = list(places.values())
    axes.set_xticks(ticks, [f"{x:.2g}" for x in ticks])
    axes.minorticks_off()
    axes.set_ylabel("loss against AdamW's, %")
    axes.grid(axis="y")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


FIGURES = {
    "loss_against_tokens": loss_against_tokens,
    "loss_against_width": loss_against_width,
}

"""Lines over the steps of a run, for the pages: plain dictionaries in plotly's figure schema."""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

Row = Mapping[str, Any]  # a line of metrics.jsonl
Chart = dict[str, Any]  # "title", and plotly's "data" and "layout"

COLOURS = ("#3b82c4", "#d9772b", "#2f9e6e", "#9467c8", "#d1495b", "#1b9aaa", "#b38f1d", "#7f8894")  # on white and on black
MUTED = "#8a939c"
DASHES = ("solid", "dash", "dot", "dashdot")
MOST_POINTS = 2000  # of a line: a page does not grow without bound with the steps
CURVES = {
    "loss": "loss",
    "grad_norm": "gradient norm",
    "kl": "KL divergence from the reference policy",
    "entropy": "entropy (nats per token)",
    "completions/mean_length": "completion length (tokens)",
    "groups/effective": "share of effective groups",
    "learning_rate": "learning rate",
    "rounds/kept": "share of samples that pass",
    "selftrain/pool": "samples in the pool",
    "selftrain/kept": "share of samples that join the pool",
    "selftrain/nll": "loss on samples of the pool, without weights (nats)",
    "selftrain/ess": "effective sample size of the pool's weights (share)",
    "rounds/unweighted_loss": "loss without weights",
    "rounds/ess": "effective sample size of the weights (share)",
    "policy_age": "age of the sampling policy (steps)",
}
ONLY_IF_IT_CHANGES = ("learning_rate", "policy_age")


def series_of(metrics: Iterable[Row], key: str) -> tuple[list[int], list[float | None]]:
    """Steps and values of a metric, of the rows that have it; a value that could not be had is None, a gap in the line."""
    rows = [row for row in metrics if key in row]
    return [row["step"] for row in rows], [row[key] for row in rows]


def is_worth_drawing(metrics: Iterable[Row], key: str) -> bool:
    """Whether there are values, and of what seldom changes different ones."""
    values = series_of(metrics, key)[1]
    return len(set(values)) > 1 if key in ONLY_IF_IT_CHANGES else bool(values)


def curves(title: str, metrics: Sequence[Row], series: Mapping[str, str]) -> Chart:
    """Lines over steps, by label; one without a label stands alone."""
    data = []
    for i, (label, key) in enumerate(series.items()):
        drawn = line(*series_of(metrics, key), label, COLOURS[i % len(COLOURS)] if label else MUTED)
        drawn["line"]["dash"] = DASHES[i % len(DASHES)]  # equal weights lie on each other
        data.append(drawn)
    axes = {"xaxis": {"title": {"text": "step"}}, "yaxis": {"rangemode": "tozero" if all(series) else "normal"}}
    return {"title": title, "data": data, "layout": {"showlegend": all(series), **axes}}


def domain_figures(metrics: Sequence[Row], names: Sequence[str]) -> list[Chart]:
    """Weights of the domains of prompts, and every objective by domain."""
    weights, *means = "weight", *(f"mean/{name}" for name in names)
    domains = [key.split("/")[1] for key in metrics[0] if key.startswith("domains/") and key.endswith(f"/{means[0]}")]
    titles = {weights: "weights of domains"} | {mean: f"{name} by domain" for name, mean in zip(names, means, strict=True)}
    return [
        curves(title, metrics, {domain: f"domains/{domain}/{key}" for domain in domains})
        for key, title in titles.items()
        if domains and f"domains/{domains[0]}/{key}" in metrics[0]
    ]


def line(steps: Sequence[int], values: Sequence[float | None], label: str, colour: str) -> dict[str, Any]:
    """A line over steps; of more than `MOST_POINTS` some are left out, evenly."""
    every = max(1, math.ceil(len(steps) / MOST_POINTS))
    steps, values = steps[::-every][::-1], values[::-every][::-1]  # with the last
    return {
        "type": "scatter",
        "mode": "lines" if len(steps) > 1 else "markers",
        "x": list(steps),
        "y": list(values),
        "name": label,
        "line": {"color": colour, "width": 1.8},
        "marker": {"color": colour},
        "hovertemplate": "step %{x}: %{y:.4g}" + ("<extra></extra>" if not label else ""),
    }


def missing_figures(metrics: Sequence[Row], names: Sequence[str]) -> list[Chart]:
    """One line per objective, where any value is missing."""
    series = {name: f"objectives/{name}/missing" for name in names}
    any_missing = any(share for key in series.values() for share in series_of(metrics, key)[1])
    return [curves("share of missing values", metrics, series)] if any_missing else []


def scheme_figures(metrics: Sequence[Row], names: Sequence[str]) -> list[Chart]:
    """step_scale where it is not constant 1, and the scheme's own numbers: one line, or one per objective."""
    figures = []
    if any(value != 1 for value in series_of(metrics, "step_scale")[1]):
        figures.append(curves("step scale (multiplies the advantages)", metrics, {"": "step_scale"}))
    keys = dict.fromkeys(key for row in metrics for key in row if key.startswith("weighting/"))
    for quantity in dict.fromkeys(key.split("/")[1] for key in keys):
        per_objective = {name: f"weighting/{quantity}/{name}" for name in names if f"weighting/{quantity}/{name}" in keys}
        figures.append(curves(f"{quantity} (of the scheme)", metrics, per_objective or {"": f"weighting/{quantity}"}))
    return figures


def cosine_figures(metrics: Sequence[Row], names: Sequence[str]) -> list[Chart]:
    """Cosine of the angle between the gradients of every two objectives, where the scheme saw them; below 0 they conflict.

    cos_ij = gram_ij / sqrt(gram_ii gram_jj); a gap where one of the gradients is 0.
    """
    pairs = {f"{a}, {b}": (f"gram/{a}/{b}", f"gram/{a}/{a}", f"gram/{b}/{b}") for a, b in combinations(names, 2)}
    looked_at = [row for row in metrics if any(keys[0] in row for keys in pairs.values())]
    if not looked_at:
        return []
    rows = [
        {"step": row["step"], **{pair: _cosine(*map(row.get, keys)) for pair, keys in pairs.items()}} for row in looked_at
    ]
    chart = curves("cosine between the gradients of objectives", rows, {pair: pair for pair in pairs})
    chart["layout"]["yaxis"] = {"range": [-1.05, 1.05]}
    return [chart]


def _cosine(product: float | None, *squares: float | None) -> float | None:
    if product is None or not all(squares):
        return None
    return max(-1.0, min(1.0, product / math.sqrt(math.prod(squares))))

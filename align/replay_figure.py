"""The picture of a replay: real and replayed weights over steps."""

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from align.replay import Replay
from align.report_figures import COLOURS, MUTED, plain_axes


def draw_replay(path: Path, found: Replay, objectives: Sequence[str], real: str, replayed: str) -> None:
    """Weights, and the step scale where it is not 1 all the time: real lines solid, replayed ones dashed.

    Raises:
        ValueError: The name of the file has an ending that is no picture.
    """
    scaled = any(value not in (1.0, None) for series in (found.real, found.replayed) for value in series["step_scale"])
    figure = Figure(figsize=(8, 7 if scaled else 4.5), dpi=160, layout="constrained", facecolor="white")
    axes = figure.subplots(1 + scaled, 1, sharex=True, squeeze=False)[:, 0]
    for i, key in enumerate(key for key in found.real if key.startswith("weights/")):
        _draw(axes[0], found, key, COLOURS[i % len(COLOURS)], key.removeprefix("weights/"))
    axes[0].set_ylabel("weight")
    if scaled:
        _draw(axes[1], found, "step_scale", MUTED, "step scale")
        axes[1].set_ylabel("step scale")
    for one in axes:
        plain_axes(one)
    axes[-1].set_xlabel("step")
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].legend(loc="best", fontsize=10, framealpha=0.8, edgecolor="none")
    axes[0].set_title(f"solid: real ({real}); dashed: replayed ({replayed}) on the same observations", fontsize=11)
    try:
        figure.savefig(path)
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} cannot be written: {error}") from error


def _draw(axes: Axes, found: Replay, key: str, colour: str, label: str) -> None:
    marker = "o" if len(found.steps) == 1 else None
    for series, dash, name in ((found.real, "-", label), (found.replayed, "--", None)):
        values = [math.nan if value is None else value for value in series[key]]
        axes.plot(found.steps, values, dash, color=colour, label=name, marker=marker)

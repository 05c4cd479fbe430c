"""The model card of a chosen policy."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from align import __version__
from align.config import Config
from align.fronts.choose import Choice, Wish, sentences
from align.fronts.compute import Measured
from align.fronts.files import merged_from

RUN_KEYS = (
    "policy",
    "objectives",
    "weighting",
    "estimator",
    "combination",
    "selftrain",
    "rounds",
    "rollout",
    "learner",
    "trl",
)


def model_card(front: Mapping[str, Any], data: Measured, choice: Choice, wish: Wish, config: Config | None) -> str:
    """README.md of the exported folder.

    Args:
        front: Content of front.json.
        data: The policies it is about.
        choice: The one of them that is exported.
        wish: What it was chosen for.
        config: Of the run that made it; None where that is not known.
    """
    point = front["points"][choice.index]
    base = config.policy.model if config else ""
    head = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["paretune", "multi-objective"]}
    if base.count("/") == 1 and not base.startswith((".", "/", "~")):
        head = {"base_model": base} | head
    lines = [
        "---",
        yaml.safe_dump(head, sort_keys=False).strip(),
        "---",
        "",
        f"# {Path(point['id']).name}",
        "",
        f"Chosen by Paretune {__version__} from {len(front['points'])} policies, {wish.text()}.",
        "",
        "## Objectives and evaluation",
        "",
        *_evaluation(front, point, choice),
        "",
        "```",
        *sentences(choice, wish, data),
        "```",
        "",
        f"Sampled at temperature {front['config']['evaluation']['temperature']:g}, at most "
        f"{front['config']['rollout']['max_tokens']} tokens, seeds {', '.join(map(str, front['seeds']))}.",
        "",
        "## Training",
        "",
        *_training(point, base),
    ]
    if config is not None:
        whole = config.model_dump(mode="json", exclude_defaults=True, exclude={"rollout": {"engine"}})
        settings = {key: value for key, value in whole.items() if key in RUN_KEYS and value}
        lines += ["", "## Configuration", "", "```yaml", yaml.safe_dump(settings, sort_keys=False).strip(), "```"]
    return "\n".join(lines) + "\n"


def _evaluation(front: Mapping[str, Any], point: Mapping[str, Any], choice: Choice) -> list[str]:
    """A row per objective."""
    lines = [
        f"| objective | reward | better | bounds | weight | test [{front['level']:.0%}] | validation | missing |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for o in front["objectives"]:
        name, interval = o["name"], choice.values[o["name"]]
        weight = point["weights"].get(name)
        cells = [
            name,
            o["reward"],
            "larger" if o["direction"] == "maximize" else "smaller",
            f"{o['bounds'][0]:g} to {o['bounds'][1]:g}",
            "" if weight is None else f"{weight:.3f}",
            f"{interval.mean:.3f} [{interval.low:.3f}, {interval.high:.3f}]",
            f"{point['validation']['values'][name]:.3f}",
            f"{point['test']['missing'][name]:.1%}",
        ]
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return lines


def _training(point: Mapping[str, Any], base: str) -> list[str]:
    facts = {
        "scheme and weights": point["method"],
        "trained from": base,
        "step": point["step"],
        "seed": point["seed"],
        "training samples": point["samples"],
        "tokens": point["tokens"],
        "seconds": None if point["seconds"] is None else round(point["seconds"]),
    }
    if point.get("parents"):
        del facts["scheme and weights"]
        facts = {"merged by": point["method"], "from": merged_from(point)} | facts
    return [f"* {name}: {value}" for name, value in facts.items() if value not in (None, "")]

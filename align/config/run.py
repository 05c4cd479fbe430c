"""A run, complete and free of contradictions, and what a resumed one may change."""

import hashlib
import json
from typing import Any, get_args

from pydantic import model_validator

from align.config.base import as_section
from align.config.rounds import rounds_defaults
from align.config.rules import contradictions
from align.config.sections import Keys
from align.config.weighting import schemes


class Config(Keys):
    """A run, complete."""

    @model_validator(mode="before")
    @classmethod
    def _combination_of_scheme(cls, data: Any) -> Any:
        """Where `combination` is left out, the scheme chooses it; rounds choose what they have no use for."""
        data = rounds_defaults(data) if isinstance(data, dict) else data
        weighting = data.get("weighting") if isinstance(data, dict) else None
        weighting = as_section(weighting)
        kind = weighting.get("type") if isinstance(weighting, dict) else getattr(weighting, "type", None)
        made_for = [scheme.combination for scheme in schemes() if kind in get_args(scheme.model_fields["type"].annotation)]
        return {"combination": made_for[0]} | data if made_for else data

    @model_validator(mode="before")
    @classmethod
    def _correction_of_estimator(cls, data: Any) -> Any:
        """Where `rollout.correction` is left out, `dpg` has none: the sampler's probabilities are in its weights."""
        estimator = as_section(data.get("estimator")) if isinstance(data, dict) else None
        kind = estimator.get("type") if isinstance(estimator, dict) else getattr(estimator, "type", None)
        rollout = data.get("rollout", {}) if kind == "dpg" else None
        return data | {"rollout": {"correction": "none"} | rollout} if isinstance(rollout, dict) else data

    @model_validator(mode="after")
    def _keys_agree(self) -> "Config":
        problems = contradictions(self)
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def fingerprint(self) -> str:
        """Hash of everything that a resumed run may not change: all but the run folder and what `settled` leaves out.

        Defaults do not count, so that an option of a later version leaves it as it is.
        """
        text = json.dumps(self.settled(exclude_defaults=True), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def settled(self, exclude_defaults: bool = False) -> dict[str, Any]:
        """What is settled when a run starts; its length, calls of rewards, missing values, and vLLM servers may change."""
        data = self.model_dump(mode="json", exclude={"output", "steps", "scoring"}, exclude_defaults=exclude_defaults)
        data["objectives"] = {name: o | {"missing": None, "calls": None} for name, o in data["objectives"].items()}
        if self.rounds is not None:
            data["rounds"]["count"] = None
        if self.rollout.engine.type == "vllm":  # where servers run, and how many, is no part of what is learned
            data["rollout"]["engine"] = {"type": "vllm"}
        return data

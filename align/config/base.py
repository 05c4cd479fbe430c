"""What every section of the configuration is made of."""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from enum import StrEnum
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator

Name = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
Weights = dict[Name, FiniteFloat]


class Section(BaseModel):
    """Base of every section: immutable, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
    elsewhere: ClassVar[Mapping[str, str]] = {}  # keys that one may look for here, and where they are

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, data: Any) -> Any:
        unknown = [key for key in data if key not in cls.model_fields] if isinstance(data, dict) else []
        if unknown:
            problems = [cls.elsewhere.get(key) or unknown_name("key", key, cls.model_fields) for key in unknown]
            raise ValueError("\n".join(problems))
        return data


class Signal(StrEnum):
    """What a step may look at besides the rewards of the batch; the loop pays only for what is asked."""

    VALIDATION = "validation"  # (M, K) held-out vectors so far, oldest first, in [0, 1], larger is better, NaN without value
    ADVANTAGES = "advantages"  # (P, G) what the weights still in force make of the batch
    GRAM = "gram"  # (K, K) inner products of the objectives' policy gradients
    KL = "kl"  # (P, G) log-ratio to the reference policy, summed over a sample's tokens, nats
    DOMAINS = "domains"  # (P,) place of each prompt's domain among the names of them; where there are several
    DOMAIN_GRAM = "domain_gram"  # (J, J) inner products of the domains' mean policy gradients
    LOG_PROBS = "log_probs"  # (3, P, G) of the samples under policy, sampler and reference, nats; for `estimator: dpg`


class Weighting(Section):
    """Base of the options of every weighting scheme."""

    combination: ClassVar[str] = "sum_then_normalize"  # what its weights are made for

    weights: Weights = {}
    """Share of each objective; equal ones when left out. 0 only watches an objective."""

    @property
    def needs(self) -> frozenset[Signal]:
        """What the scheme looks at besides rewards."""
        return frozenset()


def unknown_name(what: str, name: str, known: Iterable[str]) -> str:
    """Sentence about a name that does not exist, with the nearest one that does."""
    near = get_close_matches(str(name), list(known), 1)
    hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(known)}"
    return f"unknown {what} {name!r}; {hint}"


def as_section(value: Any) -> Any:
    """Lets `estimator: grpo` stand for `estimator: {type: grpo}`."""
    return {"type": value} if isinstance(value, str) else value

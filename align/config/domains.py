"""Keys of the weights of prompt domains: how much the prompts of each source count, beside how often they are sampled."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, PositiveFloat

from align.config.base import Name, Section, as_section
from align.config.weighting import ProbeConfig

Positive = Annotated[PositiveFloat, Field(allow_inf_nan=False)]


class Domains(Section):
    """What all kinds of weights of domains have in common."""

    weights: dict[Name, Positive] = {}
    """Of every domain, in proportion; equal ones when left out. Where weights follow training they start from these."""


class FixedDomains(Domains):
    """The same weights from the first step to the last."""

    type: Literal["fixed"]


class FollowingDomains(Domains):
    """What weights have in common that follow training, by exponentiated updates."""

    rate: Positive = 0.1
    """Growth of a log-weight per unit of the domain's score and batch."""
    smoothing: float = Field(0.01, gt=0, le=1)
    """Part of the way to equal weights that every update goes; no weight falls below this over the number of domains."""


class ExcessDomains(FollowingDomains):
    """Domains gain weight as long as they are below what they could reach (after DoReMi)."""

    type: Literal["excess"]
    reference: dict[Name, Annotated[float, Field(ge=0, le=1)]] | Literal["best"] = "best"
    """What each could reach, as its weighted reward: objectives scaled to [0, 1], in the proportions of
    `weighting.weights`. `best`: the best that its own moving average has been so far."""
    average: float = Field(0.9, ge=0, lt=1)
    """Part of the moving average of a domain's reward that a batch keeps."""


class AlignmentDomains(FollowingDomains):
    """Domains gain weight whose gradient agrees with the mean gradient of all, or of some (after DoGE)."""

    type: Literal["alignment"]
    target: list[Name] = []
    """Domains to do well on; all when left out."""
    cosine: bool = False
    """Take cosines in the place of inner products, so that the length of a gradient does not count."""
    self_term: bool = True
    """Count the inner product of a gradient with itself where a domain is in the target."""
    probe: ProbeConfig = ProbeConfig()
    """How gradients are had; where the scheme measures gradients too, `weighting.probe` says so for both."""


AnyDomains = FixedDomains | ExcessDomains | AlignmentDomains
DomainsConfig = Annotated[
    AnyDomains, Field(discriminator="type"), BeforeValidator(as_section, json_schema_input_type=str | AnyDomains)
]

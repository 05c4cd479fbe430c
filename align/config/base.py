"""What every section of the configuration is made of."""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator

Name = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
Weights = dict[Name, FiniteFloat]


class Section(BaseModel):
    """Base of every section: immutable, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, data: Any) -> Any:
        unknown = [key for key in data if key not in cls.model_fields] if isinstance(data, dict) else []
        if unknown:
            raise ValueError("\n".join(unknown_name("key", key, cls.model_fields) for key in unknown))
        return data


def unknown_name(what: str, name: str, known: Iterable[str]) -> str:
    """Sentence about a name that does not exist, with the nearest one that does."""
    near = get_close_matches(str(name), list(known), 1)
    hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(known)}"
    return f"unknown {what} {name!r}; {hint}"


def as_section(value: Any) -> Any:
    """Lets `estimator: grpo` stand for `estimator: {type: grpo}`."""
    return {"type": value} if isinstance(value, str) else value

"""From a YAML file and dotted overrides to a checked `Config`; every problem in one message."""

import json
import re
from collections.abc import Collection, Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, get_args

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, TypeAdapter, ValidationError
from yaml import YAMLError

from align.config import Config, ObjectiveConfig, Served
from align.trl_options import may_be_set, option_types

Model = TypeVar("Model", bound=BaseModel)


class ConfigError(ValueError):
    """A configuration that cannot be run; the message names every key at fault."""


def load_config(path: str, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file and apply overrides.

    Args:
        path: The file.
        overrides: Dotted assignments such as `--weighting.type=fixed` or `trl.learning_rate=1e-5`; values are YAML, and a
            table takes the place of the old one.

    Raises:
        ConfigError: The file is missing or no YAML, an override has no `=`, or the result is not a valid config.
    """
    return parse_config(_read(path, overrides), path)


def load_objectives(path: str, overrides: Sequence[str] = ()) -> dict[str, ObjectiveConfig]:
    """The objectives of a file, which need not have anything else. Raises ConfigError as `load_config` does."""
    data = _read(path, overrides)
    objectives = {"objectives": data["objectives"]} if isinstance(data, dict) and "objectives" in data else {}
    return _parse(Served, objectives, path).objectives


def load_trial(path: str, overrides: Sequence[str] = ()) -> Config | Served:
    """A whole configuration, or of a file without prompts what `Served` has. Raises ConfigError as `load_config` does."""
    data = _read(path, overrides)
    if not isinstance(data, dict) or "prompts" in data:
        return parse_config(data, path)
    return _parse(Served, {name: data[name] for name in Served.model_fields if name in data}, path)


def _read(path: str, overrides: Sequence[str]) -> Any:
    if not Path(path).is_file():
        raise ConfigError(f"no configuration at {path!r}: give the path of a YAML file, for example configs/quickstart.yaml")
    for override in overrides:
        if "=" not in override:
            raise ConfigError(f"cannot read the override {override!r}: write --section.key=value")
    try:
        loaded = _read_resolved(path) if path.endswith(".json") else OmegaConf.load(path)
        for i, override in enumerate(overrides):
            _apply(loaded, override.removeprefix("--"), [earlier.removeprefix("--") for earlier in overrides[:i]])
        return OmegaConf.to_container(loaded, resolve=True)
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError, ValueError, TypeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error


def _read_resolved(path: str) -> Any:
    """A `config.json` of a run: everything in it is meant literally."""

    def escape(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: escape(item) for key, item in value.items()}
        if isinstance(value, list):
            return [escape(item) for item in value]
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value

    return OmegaConf.create(escape(json.loads(Path(path).read_text(encoding="utf-8"))))


def _apply(loaded: Any, override: str, earlier: Sequence[str]) -> None:
    """Set one key, after earlier overrides; a table given whole takes the place of the old one."""
    key = override.partition("=")[0]
    value = OmegaConf.select(OmegaConf.from_dotlist([override]), key)
    for length in range(1, key.count(".") + 1):  # below `estimator: grpo`, which stands for `estimator: {type: grpo}`
        table = key.rsplit(".", length)[0]
        if isinstance(short := OmegaConf.select(loaded, table), str) and _kinds(Config, table.split(".")):
            OmegaConf.update(loaded, table, {"type": short}, merge=False)
    if key.endswith(".type"):
        table = key.removesuffix(".type")
        asked_for = {other.partition("=")[0].removeprefix(f"{table}.") for other in earlier if other.startswith(f"{table}.")}
        _switch_type(loaded, table, value, {name.partition(".")[0] for name in asked_for})
    OmegaConf.update(loaded, key, value, merge=False, force_add=True)


def _switch_type(loaded: Any, table: str, kind: Any, asked_for: Collection[str]) -> None:
    """Before `table.type=kind`: keep of the table only keys asked for, and those that mean the same to the new kind.

    These are the ones that a base class of both kinds declares; a name that each declares by itself may mean two things.
    """
    current = OmegaConf.select(loaded, table)
    if isinstance(current, DictConfig) and current.get("type") != kind:
        kinds = {get_args(m.model_fields["type"].annotation)[0]: m for m in _kinds(Config, table.split("."))}
        if kind in kinds and current.get("type") in kinds:
            shared = set(kinds[kind].__mro__) & set(kinds[current.type].__mro__)
            kept = {key for base in shared for key in vars(base).get("__annotations__", {})}
            for key in [key for key in current if key not in kept | {"type", *asked_for}]:
                del current[key]


def _kinds(annotation: Any, path: Sequence[str]) -> list[type[BaseModel]]:
    """Models with a `type` that an annotation allows at a dotted path below it."""
    if not isinstance(annotation, type):
        return [kind for option in get_args(annotation) for kind in _kinds(option, path)]
    if not issubclass(annotation, BaseModel):
        return []
    if path:
        field = annotation.model_fields.get(path[0])
        return _kinds(field.annotation, path[1:]) if field else []
    return [annotation] if "type" in annotation.model_fields else []


def parse_config(data: Any, source: str) -> Config:
    """Check already parsed data. Raises ConfigError with one line per problem; `source` names the file in it."""
    return _parse(Config, data, source)


def _parse(kind: type[Model], data: Any, source: str) -> Model:
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        lines = _merged(line for e in error.errors() for line in _explain(e, data))
        raise ConfigError(f"{source} is not a valid configuration:\n" + "\n".join(f"  {line}" for line in lines)) from error


def _merged(lines: Iterable[str]) -> list[str]:
    """One line where several kinds of value would have been right."""
    reasons: dict[str, list[str]] = {}
    for line in lines:
        head, separator, reason = line.partition(" is not valid: ")
        reasons.setdefault(head + separator, []).append(reason)
    return [head + ", or ".join(dict.fromkeys(ways)) for head, ways in reasons.items()]


def _explain(error: Any, data: Any) -> list[str]:
    """Lines for the user about one error of pydantic's."""
    key = _key(error["loc"], data, keep_last=error["type"] == "missing")
    message = error["msg"].removeprefix("Value error, ")
    match error["type"]:
        case "value_error":  # our own rules: they say what to do, and name the key where it is a deeper one
            lines = [line + _who_has_it(key, line) for line in message.split("\n")]
            return [line if not key or line.startswith(f"{key}.") else f"{key}: {line}" for line in lines]
        case "missing":
            return [f"{key} is missing{_other_spelling(error['loc'], data)}"]
        case "union_tag_not_found":
            return [f"{key}.type is missing: say which kind this is"]
        case "union_tag_invalid":
            return [f"{key}.type: {error['ctx']['tag']!r} does not exist; one of {error['ctx']['expected_tags']}"]
        case "model_type" | "model_attributes_type":
            return [f"{key}: {error['input']!r} is not valid: it is a table; write {{key: value, ...}}"]
    return [f"{key}: {error['input']!r} is not valid: {message[0].lower()}{message[1:]}"]


def _who_has_it(key: str, line: str) -> str:
    """Which other type of a section has a key that this one does not know."""
    unknown = re.match(r"unknown key '(\w+)'", line)
    kinds = [kind for kind in _kinds(Config, key.split(".")) if unknown and unknown[1] in kind.model_fields]
    names = " or ".join(get_args(kind.model_fields["type"].annotation)[0] for kind in kinds)
    return f" ({unknown[1]!r} belongs to type {names})" if unknown and names else ""


def _other_spelling(location: tuple, data: Any) -> str:
    """A key of a misspelt objective makes an objective without a reward: name the one that was meant."""
    if location[0] != "objectives" or location[-1] != "reward":
        return ""
    near = get_close_matches(location[1], [name for name in data["objectives"] if name != location[1]], 1)
    return f"; did you mean objectives.{near[0]}?" if near else ""


def _key(location: tuple, data: Any, keep_last: bool) -> str:
    """Dotted key of an error, without the union tags that pydantic puts between keys."""
    parts = []
    for i, part in enumerate(location):
        tag = part not in data if isinstance(data, dict) else not isinstance(data, list)
        if tag and not (keep_last and i + 1 == len(location)):
            continue
        parts.append(f"[{part}]" if isinstance(part, int) else f".{part}")
        known = part in data if isinstance(data, dict) else isinstance(data, list)
        data = data[part] if known else None
    return "".join(parts).removeprefix(".")


def json_schema() -> dict[str, Any]:
    """JSON schema of the configuration, with every option of the `trl:` table that can be set here."""
    schema = Config.model_json_schema()
    options = {n: TypeAdapter(t).json_schema() for n, t in option_types().items() if may_be_set(n)}
    schema["properties"]["trl"] |= {"properties": options, "additionalProperties": False}
    return schema

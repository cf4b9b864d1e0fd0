"""The configuration of a run: one YAML file, one Python object, one JSON schema.

Every field has a default, is checked before any model is loaded, and is stored in full in `run.json`. `undertow run ioi
--dry-run` prints the resolved object.
"""

from __future__ import annotations

import hashlib
import json
from importlib import resources
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, field_validator, model_validator

from undertow.errors import UndertowError


class Section(BaseModel):
    """A section that refuses unknown fields."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelConfig(Section):
    """The language model."""

    name: str = Field(default="smollm2", description="packaged name, local folder, GGUF file, or Hugging Face hub id")
    revision: str | None = Field(default=None, description="hub revision")
    device: str = Field(default="cpu", description="torch device, or auto to spread the layers over all devices")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(default="float32", description="type of the weights")
    prepend_bos: bool | None = Field(
        default=None, description="put a BOS before every text where the tokenizer adds none; default: as the SAE says"
    )
    layers_path: str | None = Field(default=None, description="dotted name of the decoder blocks, for unusual architectures")


class SAEConfig(Section):
    """The sparse autoencoder."""

    name: str | None = Field(
        default=None, description="packaged name, local folder, or hub id/folder; default: the packaged one"
    )
    revision: str | None = Field(default=None, description="hub revision")
    site: str | None = Field(default=None, description="residual-stream address; default: the one in the SAE's own config")
    centre_input: bool | None = Field(
        default=None, description="it reads mean-centred residuals (TransformerLens weights); default: as its config says"
    )
    input_scale: float | None = Field(
        default=None, gt=0, description="factor on the stream before encoding, for SAEs whose config leaves it open"
    )
    accept_pairing: bool = Field(
        default=False, description="go on although the SAE explains more variance when used in another way"
    )

    def options(self) -> dict[str, Any]:
        """What `saes.load.read_sae` takes beside the name."""
        return {key: getattr(self, key) for key in ("revision", "site", "centre_input", "input_scale")}


class FeatureConfig(Section):
    """Which features are defended."""

    method: Literal["attribution", "given"] = "attribution"
    count: PositiveInt = Field(default=20, description="how many features attribution picks")
    positions: Literal["all", "last"] = Field(default="all", description="positions over which attribution is summed")
    indices: tuple[int, ...] = Field(default=(), description="the features, for method 'given'")
    neuronpedia: str | None = Field(default=None, description="model/source that the indices were given for")

    @model_validator(mode="after")
    def _indices_belong_to_given(self) -> FeatureConfig:
        if bool(self.indices) != (self.method == "given"):
            raise ValueError("indices and method 'given' go together")
        return self


class ClampConfig(Section):
    """The clamp under test."""

    rule: Literal["set", "set_if_active", "scale", "zero", "floor", "cap"] = "zero"
    value: float | tuple[float, ...] = Field(default=0.0, description="one number or one per feature, in the SAE's units")
    keep_error: bool = Field(default=True, description="keep the SAE's reconstruction error in the stream")
    positions: Literal["all", "last", "prompt", "generated"] = "all"
    skip_special: bool = Field(default=True, description="leave special tokens alone")


class AttackConfig(Section):
    """The attacker."""

    arms: tuple[str, ...] = Field(default=("none", "encoder", "encoder+decoder", "published"), min_length=1)
    order: Literal["clamp-then-delta", "delta-then-clamp"] = "clamp-then-delta"
    offsets: tuple[int, ...] = Field(default=(-1,), min_length=1, description="positions that carry delta; -1 is the last")
    budgets: tuple[float, ...] = Field(default=(0.01, 0.02, 0.05, 0.1, 0.2), min_length=1)
    budget_unit: Literal["relative", "absolute"] = Field(default="relative", description="relative to ||h_def|| or absolute")
    steps: PositiveInt = Field(default=40, description="steps of the projected solver for each budget")
    published_steps: PositiveInt = 100
    published_learning_rate: float = Field(default=0.1, gt=0)

    @field_validator("budgets")
    @classmethod
    def _ascending(cls, budgets: tuple[float, ...]) -> tuple[float, ...]:
        for budget in budgets:
            if not budget > 0 or budget == float("inf"):
                raise ValueError(f"a budget must be a positive number, not {budget}; delta = 0 is always measured")
        # Six significant digits, which is also how a budget is written in keys.
        return tuple(sorted({float(f"{budget:g}") for budget in budgets}))

    @field_validator("arms")
    @classmethod
    def _each_once(cls, arms: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(arms))

    @field_validator("offsets")
    @classmethod
    def _in_prompt(cls, offsets: tuple[int, ...]) -> tuple[int, ...]:
        if any(offset >= 0 for offset in offsets):
            raise ValueError("offsets count back from the end of the prompt and must be negative")
        return tuple(sorted(set(offsets)))


class AuditConfig(Section):
    """How results are judged."""

    min_flips: PositiveInt = Field(default=10, description="below this the verdict is 'too few flips'")
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    resamples: PositiveInt = Field(default=2000, description="bootstrap resamples")
    batch_size: PositiveInt = Field(default=128, description="samples attacked together")


Data = TypeVar("Data", bound=Section)


class RunConfig(Section, Generic[Data]):
    """A whole run; `data` is the section that the task defines."""

    task: str
    preset: str | None = Field(default=None, description="the preset this came from")
    model: ModelConfig = ModelConfig()
    sae: SAEConfig = SAEConfig()
    features: FeatureConfig = FeatureConfig()
    clamp: ClampConfig = ClampConfig()
    attack: AttackConfig = AttackConfig()
    data: Data
    audit: AuditConfig = AuditConfig()
    seed: int = Field(default=0, ge=0, lt=2**32)
    threads: PositiveInt | None = Field(default=None, description="CPU threads; default: one for each core")

    def digest(self) -> str:
        """Eight hex digits that name this configuration; the same for every machine."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()[:8]


def resolve(
    task: str,
    data: type[Data],
    *,
    preset: str | None = None,
    file: Path | None = None,
    overrides: dict[str, Any] | None = None,
) -> RunConfig[Data]:
    """Build a configuration: defaults, then the preset, then the file, then the overrides.

    Args:
        task: name of the task.
        data: the task's own section.
        preset: name of a packaged preset of that task.
        file: YAML file of the user.
        overrides: nested dictionary of single fields, as given on the command line.

    Raises:
        UndertowError: an unknown preset, an unreadable file, or a field that is unknown or out of range.
    """
    merged: dict[str, Any] = {"data": {}}
    if preset:
        _merge(merged, {**_preset(task, preset), "preset": preset})
    if file:
        _merge(merged, _read_yaml(file))
    _merge(merged, overrides or {})
    if merged.setdefault("task", task) != task:
        raise UndertowError(f"the configuration is for task {merged['task']!r}, not {task!r}.", "Run that task.")
    return validated(RunConfig[data], merged)


Checked = TypeVar("Checked", bound=Section)


def validated(section: type[Checked], values: dict[str, Any]) -> Checked:
    """A section of the configuration from plain values.

    Raises:
        UndertowError: a field is unknown or out of range; the first such field is named.
    """
    try:
        return section.model_validate(values)
    except ValidationError as error:
        raise UndertowError(*_first_complaint(error)) from error


def presets(task: str) -> list[str]:
    """Names of the packaged presets of a task."""
    folder = resources.files("undertow") / "data" / "presets"
    return sorted(entry.name[len(task) + 1 : -5] for entry in folder.iterdir() if entry.name.startswith(f"{task}-"))


def _preset(task: str, name: str) -> dict[str, Any]:
    if name not in presets(task):
        raise UndertowError(f"task {task} has no preset {name!r}.", f"Choose from: {', '.join(presets(task))}.")
    text = (resources.files("undertow") / "data" / "presets" / f"{task}-{name}.yaml").read_text()
    return yaml.safe_load(text)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UndertowError(f"{path} cannot be read as YAML: {error}.", "Pass a file like --dry-run prints.") from error
    if not isinstance(found, dict):
        raise UndertowError(f"{path} holds no mapping.", "Pass a file like --dry-run prints.")
    return found


def _merge(into: dict[str, Any], new: dict[str, Any]) -> None:
    for key, value in new.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def _first_complaint(error: ValidationError) -> tuple[str, str]:
    first = error.errors()[0]
    field = ".".join(map(str, first["loc"])) or "configuration"
    message = first["msg"].removeprefix("Value error, ")
    value = "" if isinstance(first["input"], dict) else f" (found {first['input']!r})"
    return f"{field}: {message}{value}.", "See `undertow run --help` and `--dry-run`."

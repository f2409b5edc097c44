"""`ModelCard`: what is known of a model's weights, JSON beside the safetensors."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from dataclasses import dataclass, field
from typing import Any

from eqr_kernels.config import EqRConfig
from eqr_kernels.noise import RNG_LAYOUT

SCHEMA_VERSION = 2
UNCALIBRATED: dict[str, Any] = {"tol": None, "tol_fast": None, "tol_missing": ""}
"""The tolerances of a card that has none."""


@dataclass(frozen=True)
class ModelCard:
    """What is known of a model's weights; JSON beside the safetensors. A dataclass, like the `EqRConfig` inside it.

    Attributes:
        config: the operator that the weights belong to.
        schema_version: of the card itself.
        data: what it was trained on.
        task: name of the task that it was trained on, as `eqr --task` takes it; "" where the config's sizes tell.
        task_object: where that task's object was, as in "package.module:OBJECT"; "" where its name is enough. It is
            told to whoever uses the model, and never imported unasked.
        steps: training steps.
        accuracies: measured accuracies, free-form JSON.
        tol: residual tolerance for `tol="auto"`: the loosest at which at least 99 % of the puzzles that met it in
            calibration were right, and that cost no answer; None where `eqr calibrate` has not found one.
        tol_fast: for `tol="fast"`: the loosest that cost no answer in calibration; None when not calibrated.
        tol_missing: why a calibrated model has no `tol`, or no tolerance at all.
        tol_by_precision: for a precision that rounds more than floats do ("int8"), its own "tol", "tol_fast" and
            "tol_missing"; the fields above are those of fp32 and bf16.
        noise_scale: recommended for inference; None for the config's.
        window: differences of logits that a trajectory's score is the mean of.
        rng_layout: layout of the random numbers under which tol and accuracies were measured.
        licence, commit, notes: of the weights, of the code that trained them, anything else.
        sha256: of the safetensors file, so that weights and card can't be mixed up; `save_checkpoint` fills it in.
        extra: keys that this version does not know, kept as they came.

    Raises:
        TypeError, ValueError: a field has the wrong type, is out of range or belongs to another version.
    """

    config: EqRConfig
    schema_version: int = SCHEMA_VERSION
    data: str | dict[str, Any] = ""
    task: str = ""
    task_object: str = ""
    steps: int | None = None
    accuracies: dict[str, Any] = field(default_factory=dict)
    tol: float | None = None
    tol_fast: float | None = None
    tol_missing: str = ""
    tol_by_precision: dict[str, dict[str, Any]] = field(default_factory=dict)
    noise_scale: float | None = None
    window: int = 3
    rng_layout: int = RNG_LAYOUT
    licence: str = ""
    commit: str = ""
    notes: str = ""
    sha256: str = ""
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        kinds: dict[type | tuple[type, ...], tuple[str, ...]] = {
            EqRConfig: ("config",),
            (str, dict): ("data",),
            dict: ("accuracies", "tol_by_precision", "extra"),
            int: ("schema_version", "window", "rng_layout"),
            (int, type(None)): ("steps",),
            (int, float, type(None)): ("tol", "tol_fast", "noise_scale"),
            str: ("task", "task_object", "tol_missing", "licence", "commit", "notes", "sha256"),
        }
        for kind, names in kinds.items():
            for name in names:
                value = getattr(self, name)
                if isinstance(value, bool) or not isinstance(value, kind):
                    allowed = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
                    raise TypeError(f"card field {name!r} must be {allowed}, got {value!r} ({type(value).__name__})")
        if self.schema_version != SCHEMA_VERSION:
            raise ValueError(
                f"card field 'schema_version' is {self.schema_version}, this version reads 1 and {SCHEMA_VERSION}; "
                "upgrade eqr_kernels"
            )
        if self.rng_layout != RNG_LAYOUT:
            raise ValueError(
                f"card field 'rng_layout' is {self.rng_layout}, this version draws its random numbers by layout "
                f"{RNG_LAYOUT}, so tol and accuracies do not hold for it; install an eqr_kernels with that layout, or "
                "load the weights without the card and run `eqr calibrate` again"
            )
        for name, low in (("window", 1), ("steps", 0), ("tol", 0), ("tol_fast", 0), ("noise_scale", 0)):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= low):
                raise ValueError(f"card field {name!r} must be finite and at least {low}, got {value}")
        if self.tol is not None and self.tol_fast is not None and self.tol > self.tol_fast:
            raise ValueError(
                f"card field 'tol_fast' must be at least tol, which costs no answer either, got {self.tol_fast} and "
                f"{self.tol}; run `eqr calibrate --write` again"
            )
        if self.tol is not None and self.tol_missing:
            raise ValueError(f"card field 'tol_missing' must be empty where there is a tol, got {self.tol_missing!r}")
        for name, own in self.tol_by_precision.items():
            if not isinstance(own, dict) or not set(own) <= set(UNCALIBRATED):
                raise ValueError(
                    f"card field 'tol_by_precision' must hold {', '.join(UNCALIBRATED)} of each precision, got {own!r} "
                    f"of {name!r}; run `eqr calibrate --precision {name} --write` again"
                )
            self.in_precision(name)
        clash = sorted(set(self.extra) & ({f.name for f in dataclasses.fields(self)} - {"extra"}))
        if clash:
            raise ValueError(f"card field 'extra' must not repeat the card's own fields, got {', '.join(clash)}")
        try:
            json.dumps([self.data, self.accuracies, self.extra], allow_nan=False)
        except (TypeError, ValueError) as error:
            raise type(error)(
                f"card fields 'data', 'accuracies', 'extra' must be finite JSON values: {error}"
            ) from error

    @property
    def inference_noise_scale(self) -> float:
        """The noise that the tolerances and accuracies are of: `noise_scale`, else the config's."""
        return self.config.noise_scale if self.noise_scale is None else self.noise_scale

    def in_precision(self, name: str) -> ModelCard:
        """The card with the tolerances of a precision, by its name as for `solve`."""
        if name not in self.tol_by_precision:
            return self
        return dataclasses.replace(self, tol_by_precision={}, **{**UNCALIBRATED, **self.tol_by_precision[name]})

    def to_json(self) -> str:
        """The card as JSON; `extra` keys stand beside the others."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "extra"}
        return json.dumps({**fields, "config": self.config.to_dict(), **self.extra}, indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, name: str | os.PathLike[str] = "card") -> ModelCard:
        """A card from JSON; `name` (the file) begins every message.

        In schema 1 `tol` was the loosest that cost no answer, however many settled puzzles were wrong: it is read as
        `tol_fast`.

        Raises:
            TypeError, ValueError: not JSON, a field missing, of the wrong type, out of range or of another version.
        """
        remedy = "write it anew with save_pretrained, or delete it to load the weights with the config in their header"
        try:
            values = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{name}: not a JSON file ({error}); {remedy}") from error
        if not isinstance(values, dict) or not isinstance(values.get("config"), dict):
            raise ValueError(f"{name}: not a model card, a JSON object with the EqRConfig fields in 'config'; {remedy}")
        if values.get("schema_version", 1) == 1:
            values = _from_schema_1(values)
        known = {f.name for f in dataclasses.fields(cls)} - {"extra"}
        try:
            fields: dict[str, Any] = {key: value for key, value in values.items() if key in known}
            fields["config"] = EqRConfig.from_dict(values["config"])
            return cls(**fields, extra={key: value for key, value in values.items() if key not in known})
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from error


def _from_schema_1(values: dict[str, Any]) -> dict[str, Any]:
    tol = values.get("tol")
    missing = "" if tol is None else "its card was written when a tolerance promised only that no answer is lost"
    return {**values, "schema_version": SCHEMA_VERSION, "tol": None, "tol_fast": tol, "tol_missing": missing}

"""Continues runs of older versions: a setting that the run did not have keeps the value which that version used.

Without this, a run of an older version would be refused because of a new default.
"""

from __future__ import annotations

from typing import Any, cast

from pipeline.config.identity import read_settings
from pipeline.config.tree import Config, EncoderSettings
from pipeline.run import Run
from pipeline.storage import objects
from pipeline.storage.settings import Section

_SECTIONS = ("fit", "plan")
"""Sections whose defaults have changed."""

_DEPENDENT = {"transformation": ("loss", "epochs"), "steps": ("epochs",)}
"""If the config gives the first setting, values of the run for the others are dropped."""


def as_started(config: Config) -> Config:
    """The config, in which settings that an older run did not have get the values of that run.

    Settings that the config gives itself stay. Without an existing run, the config stays as it is.

    Raises:
        DataError: `run.json` is damaged or of another format.
    """
    run = Run(config.run)
    if not objects.exists(run.settings):
        return config
    started = cast(dict[str, Any], read_settings(run)["config"])
    encoders = {
        name: _with_exif(encoder, (started.get("encoders") or {}).get(name))
        for name, encoder in (("old", config.encoders.old), ("new", config.encoders.new))
        if encoder is not None
    }
    changes: dict[str, object] = {"encoders": config.encoders.model_copy(update=encoders)}
    if "steps" not in (started.get("fit") or {}):  # a run of version 0.1
        for name in _SECTIONS:
            changes[name] = _with_started(getattr(config, name), started.get(name) or {})
    if "allow_outside" not in config.model_fields_set:
        changes["allow_outside"] = started["allow_outside"]
    return config.model_copy(update=changes)


def _with_started(section: Section, started: dict[str, Any]) -> Section:
    """A section with the run's value of each setting that the config does not give."""
    given = {name: getattr(section, name) for name in section.model_fields_set}
    known = {name: value for name, value in started.items() if name in type(section).model_fields}
    for name in _DEPENDENT:
        if name in given:  # another kind of fit has its own defaults
            known = {key: value for key, value in known.items() if key not in _DEPENDENT[name]}
    return type(section).model_validate(known | given)


def _with_exif(encoder: EncoderSettings, started: dict[str, Any] | None) -> EncoderSettings:
    """The encoder with the run's `preprocess.exif`, if the config does not give it."""
    if started is None or "exif" in encoder.preprocess.model_fields_set:
        return encoder
    preprocess = encoder.preprocess.model_copy(update={"exif": started["preprocess"]["exif"]})
    return encoder.model_copy(update={"preprocess": preprocess})

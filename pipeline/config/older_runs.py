"""A config whose run is there already: settings that runs did not have at first keep the values of that run.

Between the config file and every command. Without it a run of an earlier version would be refused for a default that
it never had. It does not judge whether the config may continue the run: `run.check_resumable` does.
"""

from __future__ import annotations

from typing import Any, cast

from pipeline.config.identity import read_settings
from pipeline.config.tree import Config, EncoderSettings
from pipeline.run import Run
from pipeline.storage import objects
from pipeline.storage.settings import Section

_SECTIONS = ("fit", "plan")
"""Whose defaults are others than they were."""

_DEPENDENT = {"transformation": ("loss", "epochs"), "steps": ("epochs",)}
"""Settings that mean nothing beside a value of these that the run was not started with."""


def as_started(config: Config) -> Config:
    """The config with the values that its run was started with, for settings that runs did not have at first.

    A setting that the config gives itself stays, and so does a config whose run is not there yet.

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
    """A section with the run's own value of each setting that the config does not give."""
    given = {name: getattr(section, name) for name in section.model_fields_set}
    known = {name: value for name, value in started.items() if name in type(section).model_fields}
    for name in _DEPENDENT:
        if name in given:  # another kind of fit: its own defaults count
            known = {key: value for key, value in known.items() if key not in _DEPENDENT[name]}
    return type(section).model_validate(known | given)


def _with_exif(encoder: EncoderSettings, started: dict[str, Any] | None) -> EncoderSettings:
    """The encoder with `preprocess.exif` as the run has it, if the config does not say it."""
    if started is None or "exif" in encoder.preprocess.model_fields_set:
        return encoder
    preprocess = encoder.preprocess.model_copy(update={"exif": started["preprocess"]["exif"]})
    return encoder.model_copy(update={"preprocess": preprocess})

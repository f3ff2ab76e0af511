"""A config whose run is there already: settings that runs did not have at first keep the values of that run.

Between the config file and every command. Without it a run of an earlier version would be refused for a default that
it never had. It does not judge whether the config may continue the run: `run.check_resumable` does.
"""

from __future__ import annotations

from typing import Any, cast

from pipeline import storage
from pipeline.config import Config, Encoder, Fit
from pipeline.run import Run, read_settings

_WAVES_AT_FIRST = 20  # the default of `plan.waves` before `auto`


def as_started(config: Config) -> Config:
    """The config with the values that its run was started with, for settings that runs did not have at first.

    A setting that the config gives itself stays, and so does a config whose run is not there yet.

    Raises:
        DataError: `run.json` is damaged or of another format.
    """
    run = Run(config.run)
    if not storage.exists(run.settings):
        return config
    started = cast(dict[str, Any], read_settings(run)["config"])
    encoders = {
        name: _with_exif(encoder, (started.get("encoders") or {}).get(name))
        for name, encoder in (("old", config.encoders.old), ("new", config.encoders.new))
        if encoder is not None
    }
    changes: dict[str, object] = {"encoders": config.encoders.model_copy(update=encoders)}
    fit = started.get("fit")
    if fit is not None and "steps" not in fit:
        changes["fit"] = _by_epochs(config.fit, fit)
    if "allow_outside" not in config.model_fields_set:
        changes["allow_outside"] = started["allow_outside"]
    if "waves" not in config.plan.model_fields_set and (started.get("plan") or {}).get("waves") == _WAVES_AT_FIRST:
        changes["plan"] = config.plan.model_copy(update={"waves": _WAVES_AT_FIRST})
    return config.model_copy(update=changes)


def _by_epochs(fit: Fit, started: dict[str, Any]) -> Fit:
    """`fit` with the kind and the epochs of a run from before there were others, if the config does not say them."""
    given = fit.model_fields_set
    update = {} if "transformation" in given else {"transformation": started["transformation"]}
    update |= {} if given & {"steps", "epochs", "transformation"} else {"epochs": started["epochs"]}
    return fit.model_copy(update=update)


def _with_exif(encoder: Encoder, started: dict[str, Any] | None) -> Encoder:
    """The encoder with `preprocess.exif` as the run has it, if the config does not say it."""
    if started is None or "exif" in encoder.preprocess.model_fields_set:
        return encoder
    preprocess = encoder.preprocess.model_copy(update={"exif": started["preprocess"]["exif"]})
    return encoder.model_copy(update={"preprocess": preprocess})

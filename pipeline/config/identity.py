"""Whether a config may continue a run: the settings and input fingerprints that the run was started with.

`run.json` is written once, at the start: the resolved config and the fingerprints of its inputs. A later start with
another config is refused, with the names of the differences. Two groups may change: settings that only say how the work
is done (RUNTIME), and the settings of a stage (STAGES) until that stage has an outcome.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from dataclasses import dataclass
from typing import Any, cast

from pipeline.config import user_functions
from pipeline.config.method import FitSettings, PlanSettings
from pipeline.config.tree import Config, EncoderSettings
from pipeline.errors import DataError, IncompatibleRun
from pipeline.run import Run
from pipeline.storage import documents, interface, objects

# Settings that change how, where or how fast the work is done, but not its outcome. This includes input paths: inputs
# are compared by fingerprint, so a run may continue with a copy of the data.
RUNTIME = {
    "run",
    "data_root",
    "allow_outside",
    "device",
    "backfill",
    "fetch",
    "select",
    "evaluate",
    "probe",
    "gate",
    "publish",
    "telemetry",
    "storage",
    "fit.num_workers",
    "fit.max_failures",
    "fit.classifier.path",
    "index.nprobe",
    "encoders.old.export",
    "encoders.old.torchvision.state_dict",
    "encoders.new.export",
    "encoders.new.torchvision.state_dict",
    "gallery.manifest",
    "pairs.manifest",
}
_CONTENT = "content of "
_EPOCHS, _STEPS = "fit.epochs", "fit.steps"
_BOUND = "plan.group_bound"  # of version 0.1: it chose a `group_boost` that no setting names
_RESTORE = (
    "restore the file from a copy of the run; or, if your config is the run's own, move the file out of the run: "
    "`fastfill backfill` writes it again"
)
Identity = dict[str, object]
"""Settings and fingerprints by full name, without RUNTIME."""


@dataclass(frozen=True, slots=True)
class Stage:
    """A step whose own settings are fixed once it has an outcome."""

    settings: str  # the file with the settings of the stage's outcome
    outcome: str  # a file that exists once the stage is done
    keys: tuple[str, ...]  # its settings and fingerprints: these keys and all keys below them

    def of(self, identity: Identity) -> Identity:
        """The keys of this stage."""
        return {key: value for key, value in identity.items() if any(_is_below(key, name) for name in self.keys)}


# A stage creates its settings file with a conditional put before its first published file, and never replaces it. So of
# two drivers with different settings exactly one continues, and the files of the stage fit its settings file. (If
# run.json were replaced instead, a driver that had read the old one would keep writing.) Before that, a stage keeps its
# attempts apart by a digest of its settings.
STAGES = {
    "fit": Stage("transformation/settings.json", "transformation/transformation.json", ("fit", "content of fit")),
    "plan": Stage(
        "plan/settings.json",
        "plan/plan.json",
        (
            *("plan.policy", "plan.traffic", "plan.group_boost", "plan.waves"),
            *("index.shards", "content of plan.policy"),
        ),
    ),
    "index": Stage("index/settings.json", f"index/commits/{0:020d}.json", ("index.factory", "index.train_vectors")),
}


def start(config: Config, fingerprints: dict[str, str]) -> Run:
    """Create `run.json`, or check that this config may continue the existing run.

    Raises:
        IncompatibleRun: the run was started with another config, other weights or another gallery.
    """
    run = Run(config.run)
    settings = _settings(config, fingerprints)
    try:  # no attempt id: equal bytes are the same run
        objects.put_if_absent(run.settings, documents.encode(settings))
    except interface.AlreadyExists:
        check_resumable(config, fingerprints)
    return run


def check_resumable(config: Config, fingerprints: dict[str, str], *, all_inputs: bool = True) -> None:
    """Refuse a config that differs from that of the existing run under its URI.

    Args:
        config: the user's config.
        fingerprints: fingerprints of its inputs.
        all_inputs: False to compare only the inputs in `fingerprints`, for commands that only read.

    Raises:
        IncompatibleRun: with one line per difference.
    """
    run = Run(config.run)
    if not objects.exists(run.settings):
        return
    started, now = _identity(read_settings(run)), _identity(_settings(config, fingerprints))
    for stage in STAGES.values():
        made_with = _made_with(run, stage)
        if made_with is None:  # no outcome yet, or one of a version without settings per stage
            made_with = stage.of(started if objects.exists(run.path(stage.outcome)) else now)
        started = {key: value for key, value in started.items() if key not in stage.of(started)} | made_with
    if not all_inputs:
        started = {key: value for key, value in started.items() if key in now or not key.startswith(_CONTENT)}
    _refuse(started, now, run.settings)


_FIT_AT_FIRST: dict[str, object] = {
    "transformation": "fastfill",
    "calibrate": False,
}  # of runs that are older than these settings


def _as_of_now(tree: dict[str, Any]) -> None:
    """Bring the config of an older run to the present keys, with the values that the older version used."""
    tree.pop("relearn", None)
    if isinstance(tree.get("plan"), dict):
        tree["plan"].pop("group_bound", None)
    tree.setdefault("allow_outside", True)
    for name, at_first in (("fit", _FIT_AT_FIRST), ("pairs", {"from_gallery": "auto"})):
        if isinstance(tree.get(name), dict):
            tree[name] = at_first | tree[name]
    encoders = tree.get("encoders")
    for encoder in encoders.values() if isinstance(encoders, dict) else ():
        if isinstance(encoder, dict) and isinstance(encoder.get("preprocess"), dict):
            encoder["preprocess"].setdefault("exif", "ignore")


def stage_settings(config: Config, name: str) -> Identity:
    """The settings and fingerprints that may change until the stage has an outcome."""
    prints = _classifier_fingerprint(config.fit) if name == "fit" else _policy_fingerprint(config.plan)
    return STAGES[name].of(_identity(_settings(config, prints)))


def settings_digest(settings: Identity) -> str:
    """A short digest, which names the folder of a stage's attempts before its settings are fixed."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def fix_settings(run: Run, name: str, settings: Identity) -> None:
    """Fix the settings of a stage, before its first file is written; the first driver wins.

    Raises:
        IncompatibleRun: another driver has fixed other settings.
    """
    try:
        objects.put_if_absent(run.path(STAGES[name].settings), documents.encode(settings))
    except interface.AlreadyExists:
        check_settings_of(run, name, settings)


def check_settings_of(run: Run, name: str, settings: Identity) -> None:
    """Refuse settings that differ from those that are fixed for the stage, if any are.

    Raises:
        IncompatibleRun: with one line per difference.
    """
    made_with = _made_with(run, STAGES[name])
    if made_with is not None:
        _refuse(made_with, settings, run.path(STAGES[name].settings))


def read_stage_settings(run: Run, name: str) -> Identity | None:
    """The fixed settings of a stage; None if there are none yet.

    Raises:
        DataError: the file is damaged or of another format.
    """
    return _made_with(run, STAGES[name])


def free_uri(uri: str) -> str:
    """The first of `uri`, `uri-2`, `uri-3`, ... under which there is no run."""
    numbered = itertools.chain([uri], (f"{uri}-{number}" for number in itertools.count(2)))
    return next(item for item in numbered if not objects.exists(Run(item).settings))


def read_settings(run: Run) -> dict[str, object]:
    """The content of `run.json`.

    Raises:
        DataError: there is no run, or the file is damaged or of another format.
    """
    try:
        settings = documents.decode(objects.read_bytes(run.settings), run.settings, _RESTORE)
    except FileNotFoundError:
        raise DataError(
            "there is no run here", where=run.uri, remedy="start one with `fastfill backfill --config ...`"
        ) from None
    missing = [key for key in ("config", "fingerprints") if not isinstance(settings.get(key), dict)]
    if missing:
        found = f"without {' and '.join(missing)}"
        raise DataError("not the settings of a run", found=found, where=run.settings, remedy=_RESTORE)
    _as_of_now(cast(dict[str, Any], settings["config"]))
    return settings


def weight_fingerprints(config: Config) -> dict[str, str]:
    """The sha256 of each file of the encoders and the classifier, and of the source of each `module:function`.

    Raises:
        DataError: a file is missing.
    """
    found: dict[str, str] = {}
    for name, encoder in (("old", config.encoders.old), ("new", config.encoders.new)):
        found |= {} if encoder is None else encoder_fingerprint(f"encoders.{name}", encoder)
    return found | _classifier_fingerprint(config.fit) | _policy_fingerprint(config.plan)


def encoder_fingerprint(key: str, encoder: EncoderSettings) -> dict[str, str]:
    """The fingerprint of an encoder, under its key in the config; empty if its source cannot be found.

    Raises:
        DataError: its file is missing.
    """
    if encoder.function is not None:
        return _function_fingerprint(key, encoder.function)
    path = encoder.export or (encoder.torchvision.state_dict if encoder.torchvision else "")
    return {key: _digest(path, key)}


def _settings(config: Config, fingerprints: dict[str, str]) -> dict[str, object]:
    return {
        "config": config.model_dump(mode="json"),
        "fingerprints": fingerprints,
    }


def _classifier_fingerprint(fit: FitSettings) -> dict[str, str]:
    if fit.classifier is None:
        return {}
    return {"fit.classifier": _digest(fit.classifier.path, "fit.classifier.path")}


def _policy_fingerprint(plan: PlanSettings) -> dict[str, str]:
    return _function_fingerprint("plan.policy", plan.policy) if ":" in plan.policy else {}


def _function_fingerprint(key: str, function: str) -> dict[str, str]:
    found = user_functions.fingerprint(function)
    return {} if found is None else {key: found}


def _digest(path: str, key: str) -> str:
    try:
        return objects.sha256(path)
    except OSError as error:
        raise DataError("an input file cannot be read", found=error.strerror, where=f"{key}: {path}") from error


def _made_with(run: Run, stage: Stage) -> Identity | None:
    found = objects.read_versioned(run.path(stage.settings))
    if found is None:
        return None
    made_with = documents.decode(found[0], run.path(stage.settings), _RESTORE)
    if "fit.lr" in made_with:
        made_with = {f"fit.{name}": value for name, value in _FIT_AT_FIRST.items()} | made_with
    return {key: value for key, value in made_with.items() if not _is_gone(key, value)}


def _is_gone(key: str, value: object) -> bool:
    """Whether it is a setting of version 0.1 without effect now; `read_plan` refuses runs that `relearn` changed."""
    return _is_below(key, "relearn") or (key == _BOUND and value is None)


def _refuse(started: Identity, now: Identity, where: str) -> None:
    changes = _changes(started, now)
    if changes:
        raise IncompatibleRun(
            "this run was started with other inputs or settings:\n" + "\n".join(f"  - {line}" for line in changes),
            where=where,
            remedy="restore the settings, or start another run beside it with `fastfill backfill --new-run`",
        )


def _identity(settings: dict[str, object]) -> Identity:
    flat = {key: value for key, value in _flatten(settings["config"], "") if not _is_runtime(key)}
    if flat.get(_EPOCHS) is not None:  # then steps have no effect, and older runs do not have them
        flat.pop(_STEPS, None)
    return flat | {f"{_CONTENT}{key}": value for key, value in _flatten(settings["fingerprints"], "")}


def _is_runtime(key: str) -> bool:
    return any(_is_below(key, name) for name in RUNTIME)


def _is_below(key: str, name: str) -> bool:
    return key == name or key.startswith(f"{name}.")


def _flatten(value: object, prefix: str) -> list[tuple[str, object]]:
    if not isinstance(value, dict):
        return [(prefix, value)]
    return [pair for key, item in value.items() for pair in _flatten(item, f"{prefix}.{key}" if prefix else key)]


def _changes(started: Identity, now: Identity) -> list[str]:
    keys = [key for key in started | now if started.get(key) != now.get(key)]
    keys = [key for key in keys if key != _STEPS or _EPOCHS not in keys]  # only one side has them
    others = {_BOUND: "which only fastfill 0.1 supports"}
    return [f"{key}: the run has {started.get(key)!r}, {others.get(key, f'you gave {now.get(key)!r}')}" for key in keys]

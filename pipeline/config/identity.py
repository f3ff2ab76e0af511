"""Whether a config may continue a run: the settings and the fingerprints of the inputs that it was started with.

`run.json` is written once, when the run starts, and holds the resolved config and the fingerprints of
its inputs. A later start with another config is refused with the names of what differs; settings that
only say how the work is done (RUNTIME) may change at any time, and those that only one stage uses (STAGES)
until that stage has made something: a fit that diverged, or a policy that failed, can be mended.
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

# Settings that decide how, where or how fast, and not what comes out. Input paths are here as well:
# what lies there is compared by its fingerprint, so that a copy of the data continues the run.
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
_BOUND = "plan.group_bound"  # of version 0.1: the order was made with a `group_boost` that no setting says
_RESTORE = (
    "restore the file from a copy of the run; if your config is the one that the run was made with, you can also move "
    "the file out of the run: `fastfill backfill` writes it again"
)
Identity = dict[str, object]
"""Settings and fingerprints by their full name, without RUNTIME."""


@dataclass(frozen=True, slots=True)
class Stage:
    """A step whose own settings are fixed when it has something to keep.

    Attributes:
        settings: the file that says what the stage's outcome was made with.
        outcome: a file that is there once the stage is done.
        keys: its settings and fingerprints: these, and what is below them.
    """

    settings: str
    outcome: str
    keys: tuple[str, ...]

    def of(self, identity: Identity) -> Identity:
        """The stage's share."""
        return {key: value for key, value in identity.items() if any(_is_below(key, name) for name in self.keys)}


# A stage's settings file is created with a conditional put just before its first file that others will read, and
# never replaced. So of two drivers with different settings exactly one goes on, on S3 as on a disk, and what is
# there was made with what the file says. Replacing run.json instead would leave the other driver, which has read
# the old one, writing into the same places. What a stage tries before that lies apart by a digest of its settings.
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
    """Create `run.json`, or check that this config may continue the run that is there.

    Raises:
        IncompatibleRun: the run was started with another config, other weights or another gallery.
    """
    run = Run(config.run)
    settings = _settings(config, fingerprints)
    try:  # equal bytes are the same run, whoever starts it: no attempt id
        objects.put_if_absent(run.settings, documents.encode(settings))
    except interface.AlreadyExists:
        check_resumable(config, fingerprints)
    return run


def check_resumable(config: Config, fingerprints: dict[str, str], *, all_inputs: bool = True) -> None:
    """Refuse a config that would not continue the run under its URI; a run that is not there is no refusal.

    Args:
        config: what the user gave.
        fingerprints: of its inputs.
        all_inputs: False for a command that only reads: an input whose fingerprint is not given is not compared.

    Raises:
        IncompatibleRun: with one line per setting or input that differs.
    """
    run = Run(config.run)
    if not objects.exists(run.settings):
        return
    started, now = _identity(read_settings(run)), _identity(_settings(config, fingerprints))
    for stage in STAGES.values():
        made_with = _made_with(run, stage)
        if made_with is None:  # nothing is there yet; or it was made before stages had settings of their own
            made_with = stage.of(started if objects.exists(run.path(stage.outcome)) else now)
        started = {key: value for key, value in started.items() if key not in stage.of(started)} | made_with
    if not all_inputs:
        started = {key: value for key, value in started.items() if key in now or not key.startswith(_CONTENT)}
    _refuse(started, now, run.settings)


_FIT_AT_FIRST: dict[str, object] = {"transformation": "fastfill", "calibrate": False}  # before there were settings


def _as_of_now(tree: dict[str, Any]) -> None:
    """Add to a run's config what runs did not have at first, as the program did it then; drop what is gone."""
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
    """What decides the outcome of a stage, apart from what is fixed when the run starts."""
    prints = _classifier_fingerprint(config.fit) if name == "fit" else _policy_fingerprint(config.plan)
    return STAGES[name].of(_identity(_settings(config, prints)))


def settings_digest(settings: Identity) -> str:
    """A short digest: names where a stage keeps what it tries before its settings are fixed."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def fix_settings(run: Run, name: str, settings: Identity) -> None:
    """Say what a stage's outcome is made with, before its first file is written; the first to say so is obeyed.

    Raises:
        IncompatibleRun: another driver has begun to write it with other settings.
    """
    try:
        objects.put_if_absent(run.path(STAGES[name].settings), documents.encode(settings))
    except interface.AlreadyExists:
        check_settings_of(run, name, settings)


def check_settings_of(run: Run, name: str, settings: Identity) -> None:
    """Refuse what another driver has made meanwhile with other settings.

    Raises:
        IncompatibleRun: with one line per setting that differs.
    """
    made_with = _made_with(run, STAGES[name])
    if made_with is not None:
        _refuse(made_with, settings, run.path(STAGES[name].settings))


def read_stage_settings(run: Run, name: str) -> Identity | None:
    """What the outcome of a stage was made with; None if nobody has said so yet.

    Raises:
        DataError: the file is damaged or of another format.
    """
    return _made_with(run, STAGES[name])


def free_uri(uri: str) -> str:
    """The first of `uri-2`, `uri-3`, ... under which there is no run yet; `uri` itself where it is free."""
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
    """What the encoders, the classifier and a policy of the user's own contain: a sha256 of each file.

    Of a `module:function` it is the module's source file, where that can be found.

    Raises:
        DataError: one of them is missing.
    """
    found: dict[str, str] = {}
    for name, encoder in (("old", config.encoders.old), ("new", config.encoders.new)):
        found |= {} if encoder is None else encoder_fingerprint(f"encoders.{name}", encoder)
    return found | _classifier_fingerprint(config.fit) | _policy_fingerprint(config.plan)


def encoder_fingerprint(key: str, encoder: EncoderSettings) -> dict[str, str]:
    """What one encoder contains, under its name in the config; nothing where that cannot be told.

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
    """Whether it is a setting of version 0.1 that has no effect now; `read_plan` refuses what `relearn` has changed."""
    return _is_below(key, "relearn") or (key == _BOUND and value is None)


def _refuse(started: Identity, now: Identity, where: str) -> None:
    changes = _changes(started, now)
    if changes:
        raise IncompatibleRun(
            "this run was started with other inputs or settings:\n" + "\n".join(f"  - {line}" for line in changes),
            where=where,
            remedy="put the settings back, or start beside it with `fastfill backfill --new-run`",
        )


def _identity(settings: dict[str, object]) -> Identity:
    flat = {key: value for key, value in _flatten(settings["config"], "") if not _is_runtime(key)}
    if flat.get(_EPOCHS) is not None:  # then the steps do not count; runs did not have them at first
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
    keys = [key for key in keys if key != _STEPS or _EPOCHS not in keys]  # they are there on one side alone
    others = {_BOUND: "which only fastfill 0.1 has"}
    return [f"{key}: the run has {started.get(key)!r}, {others.get(key, f'you gave {now.get(key)!r}')}" for key in keys]

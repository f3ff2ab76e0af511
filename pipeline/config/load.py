"""Reads the config: one YAML file and `--set a.b=value` overrides, validated, with absolute paths.

Relative input paths start at `data_root`; `data_root` and `run` start at the working directory. Paths may be `s3://`.
"""

from __future__ import annotations

import difflib
import os
import stat

import yaml
from pydantic import BaseModel, ValidationError

from pipeline.config.method import ClassifierSettings
from pipeline.config.tree import AnyManifest, Config, EncoderSettings, EncodersSettings
from pipeline.errors import ConfigError
from pipeline.storage import objects

_SHOWN = 20  # problems of a config
_MOST_BYTES = 2**20  # of a config file


def load_config(path: str, overrides: tuple[str, ...] = ()) -> Config:
    """Read, override, validate and resolve a config file.

    Args:
        path: the YAML file.
        overrides: `a.b=value` items; the value is read as YAML.

    Raises:
        ConfigError: the file is missing or not YAML, a key is unknown, or a value is out of range.
    """
    try:
        data = objects.read_bytes(path) if "://" in path else _read_local(path)
    except OSError as error:
        raise ConfigError("cannot read the config file", found=error.strerror, where=path) from error
    tree = _parse(data, "the config file is not valid YAML", path)
    if not isinstance(tree, dict):
        raise ConfigError(
            "the config file is not a mapping", expected="keys and values", found=type(tree).__name__, where=path
        )
    for item in overrides:
        _override(tree, item)
    return resolve(validate(tree, where=path))


def _read_local(path: str) -> bytes:
    """A config file, or a shell's `<(...)`; a pipe without a writer is empty and does not block."""
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        mode = os.fstat(file.fileno()).st_mode
        if stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
            raise ConfigError("the config file is a device", expected="a YAML file", where=path)
        os.set_blocking(file.fileno(), True)
        data = file.read(_MOST_BYTES + 1)
    if len(data) > _MOST_BYTES:
        raise ConfigError("the config file is too large", expected=f"at most {_MOST_BYTES:,} bytes", where=path)
    return data


def validate(tree: dict[str, object], where: str) -> Config:
    """Validate a raw tree. The error lists every problem with its key, and unknown keys with the nearest name.

    Raises:
        ConfigError: with one line per problem.
    """
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        found = error.errors(include_input=False)
        problems = [_explain(item["loc"], item["type"], item["msg"]) for item in found[:_SHOWN]]
        problems += [f"and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else []
        raise ConfigError(
            f"{len(found)} problem(s) in the config:\n" + "\n".join(f"  - {line}" for line in problems),
            where=where,
            remedy="fix the keys above; docs/configuration.md describes every key",
        ) from error


def resolve(config: Config) -> Config:
    """The same config with `run` and every input path absolute."""
    root = _absolute(config.data_root, os.getcwd())

    def rooted(path: str) -> str:
        return _absolute(path, root)

    def encoder(item: EncoderSettings | None) -> EncoderSettings | None:
        if item is None or item.function is not None:
            return item
        if item.export is not None:
            return item.model_copy(update={"export": rooted(item.export)})
        assert item.torchvision is not None
        vision = item.torchvision.model_copy(update={"state_dict": rooted(item.torchvision.state_dict)})
        return item.model_copy(update={"torchvision": vision})

    def files(given: str | tuple[str, ...]) -> tuple[str, ...]:
        return tuple(rooted(path) for path in ((given,) if isinstance(given, str) else given))

    def manifest(item: AnyManifest) -> AnyManifest:
        return item.model_copy(update={"manifest": files(item.manifest)})

    pairs, probe = config.pairs, config.probe
    if pairs.manifest is not None:
        pairs = pairs.model_copy(update={"manifest": files(pairs.manifest)})
    if probe.manifest is not None:
        probe = probe.model_copy(update={"manifest": files(probe.manifest)})
    fit = config.fit
    if fit.classifier is not None:
        fit = fit.model_copy(update={"classifier": ClassifierSettings(path=rooted(fit.classifier.path))})
    encoders = EncodersSettings.model_construct(old=encoder(config.encoders.old), new=encoder(config.encoders.new))
    return config.model_copy(
        update={
            "run": _absolute(config.run, os.getcwd()),
            "data_root": root,
            "encoders": encoders,
            "gallery": manifest(config.gallery),
            "pairs": pairs,
            "probe": probe,
            "fit": fit,
        }
    )


def _absolute(path: str, root: str) -> str:
    if "://" in path or path.startswith("/"):
        return path.rstrip("/") or "/"
    if "://" in root:
        return f"{root.rstrip('/')}/{path}"
    return os.path.abspath(os.path.join(root, os.path.expanduser(path)))


def _override(tree: dict[str, object], item: str) -> None:
    key, equals, text = item.partition("=")
    if not equals or not key:
        raise ConfigError("--set takes key=value", expected="a.b=value", found=item)
    node: dict[str, object] = tree
    *parents, last = key.split(".")
    for depth, name in enumerate(parents):
        child = node.setdefault(name, {})
        if child is None:
            child = node[name] = {}
        if not isinstance(child, dict):
            below, parent = key.split(".")[depth + 1], ".".join(parents[: depth + 1])
            raise ConfigError(
                f"--set {key}: `{parent}` is a value, not a section, so it has no key `{below}`",
                found=child,
                where=item,
            )
        node[name] = child = dict(child)  # a copy, because a YAML alias (*name) is one object under several keys
        node = child
    node[last] = _parse(text, "the value of --set is not valid YAML", key)


def _parse(text: bytes | str, summary: str, where: str) -> object:
    """YAML as an object. PyYAML raises all of these for texts that look like dates, numbers or tagged values."""
    try:
        return yaml.safe_load(text)
    except RecursionError as error:
        raise ConfigError(summary, found="too many levels", where=where) from error
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, ArithmeticError) as error:
        raise ConfigError(summary, found=error, where=where) from error


def _explain(location: tuple[int | str, ...], kind: str, message: str) -> str:
    where = ".".join(str(part) for part in location)
    if kind == "missing":
        return f"{where}: required, but not given"
    if kind != "extra_forbidden":
        return f"{where}: {message.removeprefix('Value error, ')}" if where else message
    names = _names_beside(location)
    near = difflib.get_close_matches(str(location[-1]), names, n=1, cutoff=0.6)
    hint = f"did you mean {near[0]!r}?" if near else f"valid here: {', '.join(names)}"
    return f"{where}: unknown key; {hint}"


def _names_beside(location: tuple[int | str, ...]) -> list[str]:
    """The valid names of the section in which `location` lies."""
    model: type[BaseModel] = Config
    for part in location[:-1]:
        field = model.model_fields.get(str(part))
        candidates = [field.annotation, *getattr(field.annotation, "__args__", ())] if field else []
        sections = [item for item in candidates if isinstance(item, type) and issubclass(item, BaseModel)]
        model = sections[0] if sections else model
    return list(model.model_fields)

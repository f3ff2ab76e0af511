"""Read a command's config, and open the run that it names."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from pipeline.errors import ConfigError
from pipeline.storage.uris import holds_user

if TYPE_CHECKING:
    from pipeline.config.tree import Config
    from pipeline.run import Run


def load(config_path: str, overrides: tuple[str, ...], *, new_run: bool = False) -> Config:
    """The config with its overrides (of `--set`); object storage is configured with its `storage` section.

    With `new_run`, the run gets the first free name RUN-2, RUN-3, ...
    """
    from pipeline.config.identity import free_uri
    from pipeline.config.load import load_config
    from pipeline.config.older_runs import as_started
    from pipeline.storage import objects

    config = load_config(config_path, overrides)
    objects.configure(config.storage)
    if new_run:
        config = config.model_copy(update={"run": free_uri(config.run)})
    return as_started(config)


def absolute(place: str) -> str:
    """A URI unchanged, or a path made absolute from the working directory.

    Raises:
        ConfigError: the URI holds a user or password, which would be shown in messages and files.
    """
    if holds_user(place):
        raise ConfigError(
            "a URL must not hold a user or password",
            where=place.rpartition("@")[2],
            remedy="pass credentials in the environment, such as AWS_PROFILE",
        )
    return place.rstrip("/") if "://" in place else os.path.abspath(place)


def open_run_of(config: Config, *, to_embed: bool = False) -> Run:
    """The existing run of this config; with `to_embed`, the new encoder's file is checked too.

    Raises:
        DataError: there is no run, or the encoder's file is missing.
        IncompatibleRun: the run was started with other settings or other weights.
    """
    from pipeline.config.identity import check_resumable, encoder_fingerprint, read_settings
    from pipeline.run import Run

    run = Run(config.run)
    read_settings(run)  # raises if there is no run
    fingerprints = encoder_fingerprint("encoders.new", config.encoders.new) if to_embed else {}
    check_resumable(config, fingerprints, all_inputs=False)
    return run

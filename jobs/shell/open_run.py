"""Read a command's config and find the run that it names."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from pipeline.errors import ConfigError
from pipeline.storage.uris import holds_user

if TYPE_CHECKING:
    from pipeline.config.tree import Config
    from pipeline.run import Run


def load(config_path: str, overrides: tuple[str, ...], *, new_run: bool = False) -> Config:
    """The config, with the overrides; object storage is used by its settings from now on.

    Args:
        config_path: the YAML file.
        overrides: of `--set`.
        new_run: take the first free place beside the run that is there.
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
    """A file or folder as the user means it: a URI as it is, a path from where the command was given.

    Raises:
        ConfigError: the URI holds a user or password, which messages and files would show.
    """
    if holds_user(place):
        raise ConfigError(
            "a URL must not hold a user or password",
            where=place.rpartition("@")[2],
            remedy="give credentials through the environment, such as AWS_PROFILE",
        )
    return place.rstrip("/") if "://" in place else os.path.abspath(place)


def open_run_of(config: Config, *, to_embed: bool = False) -> Run:
    """The run that is there, of which this config must be the config; the manifests are not read for that.

    Args:
        config: what the user gave.
        to_embed: compare the new encoder's file as well, for its embeddings are to be searched with.

    Raises:
        DataError: there is no run, or the encoder's file is missing.
        IncompatibleRun: it was started with other settings, or with other weights.
    """
    from pipeline.config.identity import check_resumable, encoder_fingerprint, read_settings
    from pipeline.run import Run

    run = Run(config.run)
    read_settings(run)  # a run that is not there is an error
    fingerprints = encoder_fingerprint("encoders.new", config.encoders.new) if to_embed else {}
    check_resumable(config, fingerprints, all_inputs=False)
    return run

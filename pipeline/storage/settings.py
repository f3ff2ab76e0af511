"""The config sections of storage, and the base class of all sections."""

from __future__ import annotations

import os
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, field_validator

from pipeline.storage import uris

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=1, le=2**53)]  # exact in JSON and in floating point, and far below int64


class Section(BaseModel):
    """Base of every section: immutable. Unknown keys, infinite numbers, NUL and URLs with a password are errors.

    The string under a field is its description, which docs/configuration.md shows.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    @field_validator("*")
    @classmethod
    def _usable_texts(cls, value: object) -> object:
        texts = [text for text in (value if isinstance(value, tuple) else (value,)) if isinstance(text, str)]
        if any("\0" in text for text in texts):
            raise ValueError("a text must not hold NUL characters")
        if any(map(uris.holds_user, texts)):
            raise ValueError(
                "a URL must not hold a user or password, because the config is stored with the run; give credentials "
                "through the environment or the machine's role"
            )
        return value


class FetchSettings(Section):
    """How images are read. May change between two starts of a run."""

    concurrency: Count = 32
    """Requests in flight per load task."""
    max_gap_bytes: Annotated[int, Field(ge=0)] = 128 * 2**10
    """Neighbouring images of a container are read in one request if at most this many bytes lie between them."""
    max_request_bytes: Count = 8 * 2**20
    """Most bytes of such a joint request."""
    requests_per_second: Annotated[float, Field(gt=0)] = 5000.0
    """Most requests per second to one prefix (bucket and first folder) by one process; each load task is a process."""
    timeout_seconds: Annotated[float, Field(gt=0)] = 60.0
    """Longest duration of one request, including its body."""


class StorageSettings(Section):
    """Access to object storage. Credentials come from the environment or the machine's role, never from the config."""

    endpoint_url: str | None = None
    """Address of an S3 store other than AWS; none: the one that the environment names."""
    region: str | None = None
    """Region of the bucket; none: the one that the environment names."""
    connections: Count = 64
    """Connections that each process keeps open."""
    connect_timeout_seconds: Annotated[float, Field(gt=0)] = 10.0
    """Longest wait for a connection."""
    read_timeout_seconds: Annotated[float, Field(gt=0)] = 30.0
    """Longest wait for the answer to a request."""
    retry_seconds: Annotated[float, Field(ge=0)] = 300.0
    """A failing request is repeated for this long."""
    max_pause_seconds: Annotated[float, Field(gt=0)] = 10.0
    """Longest pause between two attempts."""

    @property
    def endpoint(self) -> str | None:
        """The endpoint of the config, or that of the environment; None for AWS itself."""
        return self.endpoint_url or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")

"""Settings of storage, and what every section of the config is made of.

Below the rest of the config, which `storage` must not know.
"""

from __future__ import annotations

import os
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, field_validator

from pipeline.storage import uris

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=1, le=2**53)]  # exact in JSON and in floating point, and far below int64


class Section(BaseModel):
    """Base of every section: immutable, with finite numbers.

    Unknown keys, texts with NUL, and URLs with a user or password are errors.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _usable_texts(cls, value: object) -> object:
        texts = [text for text in (value if isinstance(value, tuple) else (value,)) if isinstance(text, str)]
        if any("\0" in text for text in texts):
            raise ValueError("a text must not hold NUL characters")
        if any(map(uris.holds_user, texts)):
            raise ValueError(
                "a URL must not hold a user or password, because the config is stored with the run: credentials come "
                "from the environment or the machine's role"
            )
        return value


class FetchSettings(Section):
    """How images are read; free to change between two starts of a run.

    A load task has `concurrency` requests in flight. Of a container (tar, or any file with `offset` and
    `length`) neighbouring images come in one request where the gap between them is at most `max_gap_bytes`,
    up to `max_request_bytes`; so a container that is wanted nearly whole is read in few large requests.
    A gap pays while its bytes cost less than a request: 128 KiB is about a millisecond of one connection.

    `requests_per_second` is per prefix (bucket and first folder) and per process, and each load task that
    runs at the same time is a process: S3 gives a prefix about 5,500 GET/s, to all that read it together. A
    store that answers 503 is left alone for a moment whatever the rate is. A request may take
    `timeout_seconds`, its body included; `storage.retry_seconds` says for how long it is repeated.
    """

    concurrency: Count = 32
    max_gap_bytes: Annotated[int, Field(ge=0)] = 128 * 2**10
    max_request_bytes: Count = 8 * 2**20
    requests_per_second: Annotated[float, Field(gt=0)] = 5000.0
    timeout_seconds: Annotated[float, Field(gt=0)] = 60.0


class StorageSettings(Section):
    """How object storage is talked to; credentials come from the environment or the machine's role.

    A failing request is repeated for `retry_seconds`, with pauses that grow up to `max_pause_seconds`.
    """

    endpoint_url: str | None = None
    region: str | None = None
    connections: Count = 64
    connect_timeout_seconds: Annotated[float, Field(gt=0)] = 10.0
    read_timeout_seconds: Annotated[float, Field(gt=0)] = 30.0
    retry_seconds: Annotated[float, Field(ge=0)] = 300.0
    max_pause_seconds: Annotated[float, Field(gt=0)] = 10.0

    @property
    def endpoint(self) -> str | None:
        """As configured, else as the environment has it for the AWS tools; None for AWS itself."""
        return self.endpoint_url or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")

"""Credentials in URIs, which are refused because run.json and reports store URIs."""

from __future__ import annotations

import re

USER = r"(?i)^[a-z][a-z0-9+.-]*://[^/?#]*@"


def holds_user(uri: str) -> bool:
    """Whether a URI has a user or a password before its host: `https://USER:SECRET@host`."""
    return re.match(USER, uri) is not None

"""The database servers that tests run on, by their URLs in the environment."""

from __future__ import annotations

import os
from typing import Any

import pytest

SERVERS = {"postgres": "MOEOPT_TEST_POSTGRES_URL", "mysql": "MOEOPT_TEST_MYSQL_URL"}


def servers() -> list[Any]:
    """A parameter for each server's URL; one that is not set is skipped, with the reason."""
    params = []
    for name, variable in SERVERS.items():
        url = os.environ.get(variable)
        skip = pytest.mark.skip(reason=f"{variable} is not set")
        params.append(pytest.param(url, id=name, marks=[] if url else [skip]))
    return params

"""The database servers that tests run on, by their URLs in the environment."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import product
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


def diagonal(*values: Sequence[Any]) -> list[Any]:
    """Parameters for `database` and for others: all combinations on SQLite, and on each server so many as it takes that
    each value of each parameter is among them."""
    params = [pytest.param("sqlite", *row, id="-".join(["sqlite", *map(str, row)])) for row in product(*values)]
    for shift, server in enumerate(servers()):
        for i in range(max(map(len, values))):
            row = [choices[(i + shift * place) % len(choices)] for place, choices in enumerate(values)]
            name = "-".join([str(server.id), *map(str, row)])
            params.append(pytest.param(*server.values, *row, id=name, marks=server.marks))
    return params

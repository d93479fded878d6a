"""Storage URLs and database errors as text for the user, without passwords."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from moeopt.errors import StorageError


@contextmanager
def readable_errors(storage: Any) -> Iterator[None]:
    """Turn a database's exceptions into one StorageError that names the storage without its password."""
    import sqlite3

    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (SQLAlchemyError, sqlite3.Error, StorageInternalError, ImportError, OSError) as error:
        text = reason(error)
        if isinstance(error, ImportError):
            text += "; install the database's driver, such as psycopg or pymysql"
        raise StorageError(f"cannot use the storage {hidden(storage)}: {text}") from None
    except RuntimeError as error:
        if type(error) is not RuntimeError:
            raise
        raise StorageError(f"cannot use the storage {hidden(storage)}: {scrub(str(error))}") from None


def reason(error: BaseException) -> str:
    """What a database said, one line."""
    from optuna.exceptions import StorageInternalError

    cause = error.__cause__ if isinstance(error, StorageInternalError) else error
    lines = str(getattr(cause, "orig", None) or cause or error).strip().splitlines()
    return scrub(lines[0]) if lines else type(error).__name__


def hidden(storage: Any) -> str:
    """A storage URL without its password, to print."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    if not isinstance(storage, str):
        return type(storage).__name__
    try:
        return scrub(make_url(storage).render_as_string(hide_password=True))
    except (ArgumentError, ValueError):
        return scrub(storage)


def scrub(text: str) -> str:
    """A text without the passwords of URLs in it."""
    text = re.sub(r"(://[^:/@\s]*):\S*@", r"\1:***@", text)
    return re.sub(r"(?i)\b(\w*passw(?:or)?d|pwd)=[^&\s]+", r"\1=***", text)

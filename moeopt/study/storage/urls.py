"""Storage URLs and database errors as text for the user, without passwords."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus, unquote_plus

from moeopt.errors import StorageError
from moeopt.showing import line

SHOWN = (
    "host", "port", "dbname", "user", "charset", "sslmode", "ssl", "timeout", "connect_timeout", "read_timeout",
    "write_timeout", "application_name", "mode", "cache", "uri", "unix_socket", "target_session_attrs",
)  # fmt: skip
"""Query parameters of a URL whose values are shown; any other may be a password, a token or a key."""
HIDDEN = "***"
SHORTEST = 4
"""Characters of a password that is looked for in a database's own words; a shorter one is part of too many of them."""
_NAMES = r"\w*(?:passw(?:or)?d|passphrase|pwd|secret|token)"
_PATTERNS = (
    (re.compile(r"(://[^:/@\s]*):\S*@"), rf"\1:{HIDDEN}@"),
    (
        re.compile(rf"(?i)(['\"]?\b{_NAMES}['\"]?\s*[=:]\s*)(?!(?:YES|NO)\))('[^']*'|\"[^\"]*\"|[^&\s;,]+)"),
        rf"\1{HIDDEN}",
    ),
)


@contextmanager
def readable_errors(storage: Any) -> Iterator[None]:
    """Turn a database's exceptions into one StorageError that names the storage without its password."""
    import sqlite3

    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (SQLAlchemyError, sqlite3.Error, StorageInternalError, ImportError, OSError) as error:
        text = reason(error, storage)
        if isinstance(error, ImportError):
            text += "; " + driver_wanted(storage)
        raise StorageError(f"cannot use the storage {hidden(storage)}: {text}") from None
    except RuntimeError as error:
        if type(error) is not RuntimeError:
            raise
        raise StorageError(
            f"cannot use the storage {hidden(storage)}: {line(scrub(str(error), storage), 500)}"
        ) from None


def driver_wanted(storage: Any) -> str:
    """What to install for a storage whose driver is missing: one of moeopt's groups, where it holds that driver."""
    text = str(storage)
    groups = [group for group, driver in (("postgres", "+psycopg:"), ("mysql", "+pymysql:")) if driver in text]
    if groups:
        return f"pip install 'moeopt[{groups[0]}]'"
    return (
        "install the database's driver, or name one in the URL that comes with moeopt: postgresql+psycopg:// of "
        "pip install 'moeopt[postgres]', mysql+pymysql:// of pip install 'moeopt[mysql]'"
    )


def reason(error: BaseException, storage: Any = None) -> str:
    """What a database said, one line; nothing of it that the storage's URL says to be secret."""
    from optuna.exceptions import StorageInternalError

    cause = error.__cause__ if isinstance(error, StorageInternalError) else error
    lines = str(getattr(cause, "orig", None) or cause or error).strip().splitlines()
    return line(scrub(lines[0], storage), 500) if lines else type(error).__name__


def hidden(storage: Any) -> str:
    """A storage URL without its password, to print; of a text that is no URL, nothing that could be one."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    if not isinstance(storage, str):
        return type(storage).__name__
    try:
        url = make_url(storage)
    except (ArgumentError, ValueError):
        scheme, slashes, _ = storage.partition("://")
        if slashes:
            return f"{line(scheme)}://{HIDDEN}"
        return HIDDEN if "@" in storage or "=" in storage else line(storage, 2000)
    query = {key: value if key.lower() in SHOWN else HIDDEN for key, value in url.query.items()}
    text = url.set(query=query).render_as_string(hide_password=True)
    return line(scrub(text.replace(quote_plus(HIDDEN), HIDDEN)), 2000)


def anywhere(url: str) -> str:
    """A storage URL that means the same in every folder: an SQLite file has its whole path."""
    from sqlalchemy.engine import make_url

    parsed = make_url(url)
    file = parsed.database or ":memory:"
    if parsed.get_backend_name() != "sqlite" or file.startswith((":memory:", "file:", "/")):
        return url
    return parsed.set(database=str(Path(file).absolute())).render_as_string(hide_password=False)


def scrub(text: str, storage: Any = None) -> str:
    """A text without the passwords of URLs and of connection strings in it, nor those of a storage's URL."""
    for secret in sorted(_secrets(storage), key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    for pattern, shown in _PATTERNS:
        text = pattern.sub(shown, text)
    return text


def _secrets(storage: Any) -> set[str]:
    """What a URL keeps secret, as it stands there and decoded and encoded; whole, and of it what a parser may cut."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    text = storage if isinstance(storage, str) else getattr(storage, "url", None)
    if not isinstance(text, str):
        return set()
    secrets = set()
    between = re.search(r"://[^/@:]*:(.*)@", text)
    if between:
        secrets |= {between[1], *re.split(r"[@:/?#]", between[1])}
    try:
        url = make_url(text)
        values = [value for key, value in url.query.items() if key.lower() not in SHOWN]
        secrets |= {str(url.password or ""), *(each for v in values for each in ([v] if isinstance(v, str) else v))}
    except (ArgumentError, ValueError):
        pass
    forms = {
        form
        for secret in secrets
        for form in (secret, unquote_plus(secret), quote(secret, safe=""), quote_plus(secret))
    }
    return {form for form in forms if len(form) >= SHORTEST}

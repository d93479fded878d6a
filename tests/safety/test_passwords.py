"""A storage's password shows nowhere: not in errors, logs, tables, hints, JSON or files, however it is written."""

from __future__ import annotations

import io
import logging
import os
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

import hostile
import optuna
import pytest
from databases import servers
from sqlalchemy.engine import make_url

import moeopt
from moeopt.cli import arguments, main
from moeopt.errors import MoeoptError
from moeopt.study.storage import hidden
from moeopt.study.storage.urls import scrub

PASSWORDS = ["Canary7secret", "Canary7:at@slash/per%cent", "Canary7 two&words=#?", "Canary7'\"`$\\"]
FORMS = [
    "postgresql+psycopg://u:{q}@127.0.0.1:1/x",
    "postgresql+psycopg://u:{raw}@127.0.0.1:1/x",
    "postgresql+psycopg://u@127.0.0.1:1/x?password={q}",
    "postgresql+psycopg://u@127.0.0.1:1/x?PASSWORD={q}&sslmode=disable",
    "postgresql+psycopg://127.0.0.1:1/x?sslpassword={q}",
    "postgresql+psycopg://u@127.0.0.1:1/x?options=-c%20a.password%3D{q}",
    "mysql+pymysql://u:{q}@127.0.0.1:1/x",
    "mysql+pymysql://u@127.0.0.1:1/x?passwd={q}",
    "mysql+pymysql://u@127.0.0.1:1/x?token={q}",
    "mysql+pymysql://u:{q}@127.0.0.1:port/x",
    "nonsense://u:{q}@127.0.0.1/x",
    "postgresql://u:{q}",
    "u:{q}@127.0.0.1/x",
    "postgresql:u:{q}@h/x",
    "sqlite:////nowhere/x.db?password={q}",
]


def leaks(text: str, password: str) -> bool:
    parts = {password, quote(password, safe=""), quote_plus(password), "anary7"}
    return any(part in text for part in parts)


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """Everything that is logged, at the most talkative."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    names = ["", "optuna", "moeopt", "sqlalchemy", "sqlalchemy.engine", "sqlalchemy.pool", "psycopg"]
    before = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).addHandler(handler)
        logging.getLogger(name).setLevel(logging.DEBUG)
    optuna.logging.enable_propagation()
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.DEBUG)
    yield stream
    optuna.logging.set_verbosity(verbosity)
    optuna.logging.disable_propagation()
    for name in names:
        logging.getLogger(name).removeHandler(handler)
        logging.getLogger(name).setLevel(before[name])


@pytest.mark.slow
@pytest.mark.parametrize("password", PASSWORDS)
@pytest.mark.parametrize("form", FORMS)
def test_a_url_is_shown_without_its_password(
    form: str, password: str, capsys: pytest.CaptureFixture[str], log: io.StringIO, tmp_path: Path
) -> None:
    url = form.format(q=quote_plus(password), raw=password)
    assert not leaks(hidden(url), password)
    words = ["search", "./m", "--storage", url, f"--storage={url}"]
    assert not leaks(arguments.command_again(words, url), password)
    with pytest.raises(MoeoptError) as error:
        moeopt.load_study("s", url)
    shown = "".join(traceback.format_exception(error.value))
    assert not leaks(shown.split("\n\n")[-1] if "\n\n" in shown else shown, password)
    assert not leaks(str(error.value), password)
    for arguments_ in (("show",), ("plan", "--study", "s"), ("worker", "--study", "s")):
        assert main([*arguments_, "--storage", url]) == 2
    out = capsys.readouterr()
    assert not leaks(out.out + out.err + log.getvalue(), password)


@pytest.mark.parametrize(
    "text",
    [
        'connection failed: "host=h user=u password=Canary7 dbname=x"',
        "invalid dsn: password='two Canary7 words' host=h",
        'got {"user": "u", "password": "Canary7"}',
        "connect(host='h', password='Canary7', passwd=\"Canary7\")",
        "cannot parse postgresql://u:p@ss:Canary7@h/x",
        "DRIVER={x};UID=u;PWD=Canary7;",
        "sslpassword: Canary7, ssl_key_password=Canary7",
    ],
)
def test_what_a_database_says_is_scrubbed(text: str) -> None:
    assert not leaks(scrub(text), "Canary7")


def test_the_words_of_a_database_lose_the_password_of_its_url() -> None:
    url = "postgresql://u:Canary7%40x@h/x?sslkeypass=Canary7key"
    for text in ("bad word Canary7@x here", "bad word Canary7%40x here", "Canary7key"):
        assert not leaks(scrub(text, url), "Canary7")


WRONG: dict[str, Callable[[Any, str], Any]] = {
    "user": lambda url, password: url.set(username="nobody_here", password=password),
    "database": lambda url, password: url.set(password=password, database="no_such_database"),
    "port": lambda url, password: url.set(password=password, port=1),
    "host": lambda url, password: url.set(password=password, host="host.invalid"),
    "option": lambda url, password: url.set(password=password).update_query_dict({"no_such_option": password}),
    "query": lambda url, password: url.set(username="nobody_here").update_query_dict({"password": password}),
}


@pytest.mark.parametrize("url", servers())
@pytest.mark.parametrize("what", WRONG)
def test_a_server_that_refuses(what: str, url: str, capsys: pytest.CaptureFixture[str], log: io.StringIO) -> None:
    for password in PASSWORDS[:2]:
        wrong = WRONG[what](make_url(url), password).render_as_string(hide_password=False)
        code = main(["show", "--storage", wrong])
        assert code == 2 or what in ("query", "user")  # a server may trust everyone
        out = capsys.readouterr()
        assert "Traceback" not in out.err
        assert not leaks(out.out + out.err + log.getvalue(), password)


@pytest.mark.slow
@pytest.mark.parametrize("url", [pytest.param(None, id="sqlite"), *servers()])
def test_a_study_keeps_no_password(
    url: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str], log: io.StringIO
) -> None:
    """A password that the server takes, as it trusts this user: in the study, what is shown of it, and its files."""
    password, name = PASSWORDS[1], f"safety-{os.getpid()}"
    url = url or f"sqlite:///{tmp_path}/x.db"
    parsed = make_url(url)
    if url.startswith("postgresql"):
        parsed = parsed.set(password=password)
    else:  # whose servers refuse a password where there is none: it is one that nobody asks for
        key = "ssl_key_password" if url.startswith("mysql") else "password"
        parsed = parsed.update_query_dict({key: password})
    full = parsed.render_as_string(hide_password=False)
    study = hostile.honest(full, name=name)
    try:
        for words in (("show",), ("show", name), ("show", name, "--json"), ("plan", "--study", name)):
            assert main([*words, "--storage", full]) == 0
        main(["show", "no such study", "--storage", full])
        out = capsys.readouterr()
        everything = [out.out, out.err, log.getvalue(), repr(study), repr(study._storage), str(vars(study))]
        everything += [str(study.user_attrs), str(study._storage.get_study_system_attrs(study._study_id))]
        everything += [str(trial.system_attrs) + str(trial.user_attrs) for trial in study.trials]
        for text in everything:
            assert not leaks(text, password)
    finally:
        optuna.delete_study(study_name=name, storage=url)


def test_that_a_password_was_given_is_no_password() -> None:
    text = "Access denied for user 'a'@'b' (using password: YES)"
    assert scrub(text) == text
    assert scrub("(password: YESTERDAY)") == "(password: ***"

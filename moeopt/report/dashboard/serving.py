"""optuna-dashboard as a server of this process, for this machine alone unless it is told otherwise."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterable
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from moeopt.errors import FigureError, StudyError
from moeopt.report.dashboard.refreshing import Refresher

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

LOOK_EVERY = 5.0
"""Seconds between two looks at the storage."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")
READS = ("GET", "HEAD", "OPTIONS")
UNFRAMED = (("Content-Security-Policy", "frame-ancestors 'none'"), ("X-Frame-Options", "DENY"))

App = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Server6(_Server):
    import socket

    address_family = socket.AF_INET6


class _Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *arguments: Any) -> None:
        """No line for every request."""


def server(storage: BaseStorage, host: str = "127.0.0.1", port: int = 8080) -> WSGIServer:
    """The dashboard's server, bound and ready for `serve_forever`; port 0 takes any that is free.

    Raises:
        FigureError: when optuna-dashboard is not installed.
        StudyError: when the port is taken or the host is none of this machine.
    """
    try:
        import optuna_dashboard
    except ImportError:
        raise FigureError("the dashboard needs optuna-dashboard: pip install 'moeopt[dashboard]'") from None
    app: App = _guarded(optuna_dashboard.wsgi(storage), host in LOOPBACK)
    kind = _Server6 if ":" in host else _Server
    try:
        return make_server(host, port, app, server_class=kind, handler_class=_Quiet)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise StudyError(f"port {port} of {host} is taken; choose another with --port") from None
        raise StudyError(f"cannot listen on {host}:{port}: {error.strerror or error}") from None


def refresh_in_background(refresher: Refresher, stop: threading.Event) -> threading.Thread:
    """A running thread that refreshes until `stop` is set."""

    def watch() -> None:
        while True:
            try:
                refresher.refresh()
            except Exception as error:  # the database is away: it may come back
                refresher.say("", error)
            if stop.wait(LOOK_EVERY):
                return

    thread = threading.Thread(target=watch, name="moeopt-dashboard-refresh", daemon=True)
    thread.start()
    return thread


def _guarded(app: App, loopback: bool) -> App:
    """Refuses what a browser was tricked into by another site, and lets no site show the dashboard inside its own.

    On loopback, requests under another host's name (DNS rebinding); anywhere, writes that a page of another origin
    sends. A client that is no browser names no origin.
    """

    def guarded(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        def start(status: str, headers: list[tuple[str, str]], *more: Any) -> Any:
            return start_response(status, [*headers, *UNFRAMED], *more)

        named = str(environ.get("HTTP_HOST", "")).lower()
        name = named[1:].split("]")[0] if named.startswith("[") else named.rsplit(":", 1)[0]
        origin = environ.get("HTTP_ORIGIN")
        reason = ""
        if loopback and name not in LOOPBACK:
            reason = "This dashboard answers to localhost only; see moeopt dashboard --host."
        elif environ.get("REQUEST_METHOD") not in READS and origin is not None and _place(origin) != _place(named):
            reason = "This dashboard takes changes from its own pages only."
        if not reason:
            return app(environ, start)
        start("403 Forbidden", [("Content-Type", "text/plain; charset=utf-8")])
        return [f"{reason}\n".encode()]

    return guarded


def _place(origin: str) -> str:
    """Host and port of an origin, or of a Host header, where a port that goes without saying is left out."""
    scheme, _, place = origin.lower().rpartition("://")
    return place.removesuffix(":443" if scheme == "https" else ":80")

"""optuna-dashboard as a server of this process, for this machine alone unless it is told otherwise."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterable
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from moeopt.dashboard.refreshing import Refresher
from moeopt.errors import FigureError, StudyError

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

LOOK_EVERY = 5.0
"""Seconds between two looks at the storage."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")

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
    app: App = optuna_dashboard.wsgi(storage)
    if host in LOOPBACK:
        app = _for_this_machine(app)
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


def _for_this_machine(app: App) -> App:
    """Refuses requests that a browser was tricked into sending here under another host's name (DNS rebinding)."""

    def guarded(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        named = str(environ.get("HTTP_HOST", ""))
        name = named[1:].split("]")[0] if named.startswith("[") else named.rsplit(":", 1)[0]
        if name in LOOPBACK:
            return app(environ, start_response)
        start_response("403 Forbidden", [("Content-Type", "text/plain; charset=utf-8")])
        return [b"This dashboard answers to localhost only; see moeopt dashboard --host.\n"]

    return guarded

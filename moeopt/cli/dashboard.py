"""`moeopt dashboard`: arguments are checked and handed to `moeopt.report.dashboard`."""

from __future__ import annotations

import threading
from typing import Annotated

import typer

from moeopt.cli.options import DEFAULT_STORAGE, STORAGE_VARIABLE

EXAMPLES = (
    "[bold]Examples[/bold]\n\n"
    "moeopt dashboard sqlite:///moeopt.db\n\n"
    "moeopt dashboard postgresql+psycopg://user@host/name --port 8081\n\n"
    "moeopt dashboard sqlite:///moeopt.db --once"
)


def dashboard(
    storage: Annotated[
        str,
        typer.Argument(metavar="[STORAGE]", envvar=STORAGE_VARIABLE, help="Where studies are kept: an SQLAlchemy URL."),
    ] = DEFAULT_STORAGE,
    host: Annotated[
        str, typer.Option(metavar="HOST", help="Address to listen on; the default is this machine alone.")
    ] = ("127.0.0.1"),
    port: Annotated[int, typer.Option(metavar="N", min=0, max=65535, help="Port; 0: any that is free.")] = 8080,
    refresh: Annotated[
        bool, typer.Option("--refresh/--no-refresh", help="Whether notes and figures are written while studies run.")
    ] = True,
    once: Annotated[
        bool, typer.Option("--once", help="Write notes and figures of all studies, and serve nothing.")
    ] = False,
) -> None:
    """Serve optuna-dashboard for a storage, with each study's note and figures kept current."""
    from moeopt.report.terminal import consoles
    from moeopt.study.storage import anywhere, hidden, open_storage, readable_errors

    out, err = consoles()
    opened = open_storage(storage, create=False)

    import optuna

    from moeopt.report.dashboard import Refresher, refresh_in_background, server
    from moeopt.report.dashboard.serving import LOOPBACK

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    cached = optuna.storages.get_storage(opened)
    refresher = Refresher(cached, hidden(anywhere(storage)), report=lambda line: err.say(line, style="yellow"))
    if once:
        with readable_errors(storage):
            names = refresher.refresh()
        out.say(f"notes and figures of {len(names)} studies written to {hidden(storage)}")
        return
    listening = server(cached, host, port)
    stop = threading.Event()
    try:
        if host not in LOOPBACK:
            err.say(
                f"No password is asked for: whoever reaches {host}:{listening.server_port} can delete all studies.",
                style="yellow",
            )
        shown = f"[{host}]" if ":" in host else host
        out.say(
            f"{hidden(storage)} at http://{shown}:{listening.server_port}/dashboard (Ctrl-C ends it)",
        )  # fmt: skip
        if refresh:
            refresh_in_background(refresher, stop)
        listening.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        stop.set()
        listening.server_close()

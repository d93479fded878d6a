"""Packages that import what they offer when it is first used."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from importlib import import_module
from typing import Any


def lazily(package: str, homes: Mapping[str, str], rooms: Collection[str] = ()) -> Callable[[str], Any]:
    """A package's `__getattr__`: `homes` tells the module that each public name is in.

    Modules of the package itself stand there by their last name. `rooms` are those that are public themselves.
    """

    def attribute(name: str) -> Any:
        if name in homes:
            home = homes[name]
            return getattr(import_module(home if "." in home else f"{package}.{home}"), name)
        if name in rooms:
            return import_module(f"{package}.{name}")
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return attribute


def homes(**modules: str) -> dict[str, str]:
    """For `lazily`, the module of each name, of the names in each module.

    >>> homes(record="Candidate Selection", run="select")
    {'Candidate': 'record', 'Selection': 'record', 'select': 'run'}
    """
    return {name: module for module, names in modules.items() for name in names.split()}

"""`moeopt env`: what a report of a bug should say of the installation."""

from __future__ import annotations

import os
import platform
import re
from importlib import metadata

from moeopt import __version__

EXAMPLES = "[bold]Example[/bold]\n\nmoeopt env"


def env() -> None:
    """Show the versions of moeopt, Python and the packages it uses, the platform and its accelerators.

    Made for reports of bugs: nothing of it names a user, a path or a host.
    """
    from moeopt.report.terminal import consoles

    console = consoles()[0]
    console.say(f"moeopt {__version__}")
    console.say(f"Python {platform.python_version()} ({platform.python_implementation()})")
    console.say(f"platform {platform.system()} {platform.release()}, {platform.machine()}, {os.cpu_count()} CPUs")
    for accelerator in accelerators():
        console.say(accelerator)
    for name in packages():
        console.say(f"{name} {installed(name) or '(not installed)'}")


def packages() -> list[str]:
    """The packages that moeopt asks for, then those of its optional groups, but of those that only developers need."""
    try:
        stated = metadata.requires("moeopt") or []
    except metadata.PackageNotFoundError:  # run from its sources, on a path
        stated = ["torch", "transformers", "optuna"]
    optional = [line for line in stated if "extra ==" in line and not re.search("extra == ['\"](dev|docs)", line)]
    lines = [line for line in stated if "extra ==" not in line] + optional
    return list(dict.fromkeys(re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in lines))


def installed(name: str) -> str | None:
    """The version of a package, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def accelerators() -> list[str]:
    """A line for each accelerator that torch can use, or one that there is none."""
    try:
        import torch
    except (ImportError, OSError) as error:  # a broken installation is what a report is often about
        return [f"torch cannot be imported: {error}"]
    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_properties(n) for n in range(torch.cuda.device_count())]
        platform_of_torch = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
        return [f"GPU {d.name}, {d.total_memory / 2**30:.0f} GiB, {platform_of_torch}" for d in devices]
    return ["GPU Apple MPS"] if torch.backends.mps.is_available() else ["no GPU that torch can use"]

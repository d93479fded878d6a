"""EEP on the model that moeopt ships: prune 8 experts to 4 for one skill, then merge.

    python studies/demo.py [--small]

RESULT
"""

from __future__ import annotations

import argparse

from rich.console import Console

from moeopt.demo.run import run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a run of seconds that shows the plumbing, not a result")
    parser.add_argument("--out", default="demo-out", help="folder for the study and the exported model")
    small = parser.parse_args().small
    out = parser.parse_args().out
    if small:
        run(out, trials=8, examples={"search": 8, "test": 16}, console=Console())
    else:
        run(out, console=Console())


if __name__ == "__main__":
    main()

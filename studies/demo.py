"""EEP on the model that moeopt ships: prune 8 experts to 4 for one skill, then merge.

    python studies/demo.py [--small]

Skill `caesar`, 160 trials, seed 0, under two minutes on one core; loss and accuracy on 250 held-out questions: full
model 0.0223 and 100%, 20 random prunings 1.21 +- 0.66 and 72 +- 18%, best pruning of the search 0.0325 and 100% with
53% of the parameters (against the full model +0.0102 [+0.0081, +0.0124], a little worse), best merged solution 0.0329
(against the pruning +0.0004 [-0.0020, +0.0027], no clear difference). `demo.svg` is the table.
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

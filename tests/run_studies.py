"""Run every script in studies/ at small size, in a temporary folder.

python tests/run_studies.py
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STUDIES = Path(__file__).parent.parent / "studies"


def main() -> int:
    scripts = sorted(STUDIES.rglob("[!_]*.py"))
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        for script in scripts:
            started = time.perf_counter()
            done = subprocess.run(
                [sys.executable, str(script), "--small"],
                cwd=folder,
                env=environment,
                capture_output=True,
                text=True,
                check=False,
            )
            print(f"{script.name}: exit {done.returncode}, {time.perf_counter() - started:.0f} s", flush=True)
            if done.returncode:
                print(done.stdout, done.stderr, sep="\n")
                return 1
    print(f"{len(scripts)} passed, 0 failed")
    return 0 if scripts else 1


if __name__ == "__main__":
    sys.exit(main())

"""Run every script in studies/ at small size, in a temporary folder.

python tests/run_studies.py
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

from warm import warm

STUDIES = Path(__file__).parent.parent / "studies"


def main() -> int:
    scripts = sorted(STUDIES.rglob("[!_]*.py"))
    os.environ["HF_HUB_OFFLINE"] = "1"  # which is read when the warm process imports
    with tempfile.TemporaryDirectory() as folder:
        for script in scripts:
            started = time.perf_counter()
            code, printed = warm(["python", str(script), "--small"], folder, dict(os.environ))
            print(f"{script.name}: exit {code}, {time.perf_counter() - started:.0f} s", flush=True)
            if code != "0":
                print(printed)
                return 1
    print(f"{len(scripts)} passed, 0 failed")
    return 0 if scripts else 1


if __name__ == "__main__":
    sys.exit(main())

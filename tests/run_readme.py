"""Run the Python code blocks of Markdown files, in order, each in a fresh process, all of a file in a temporary folder.

python tests/run_readme.py README.md docs/extending.md
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def main(path: Path) -> int:
    blocks = re.findall(r"^```python\n(.*?)^```", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    if not blocks:
        print(f"{path} has no Python code blocks")
        return 1
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        for i, block in enumerate(blocks, start=1):
            started = time.perf_counter()
            done = subprocess.run(
                [sys.executable, "-c", block], cwd=folder, env=environment, capture_output=True, text=True, check=False
            )
            seconds = time.perf_counter() - started
            print(f"{path.name}, block {i} of {len(blocks)}: exit {done.returncode}, {seconds:.0f} s", flush=True)
            if done.returncode:
                print(block, done.stdout, done.stderr, sep="\n")
                return 1
    print(f"{len(blocks)} passed, 0 failed")
    return 0


if __name__ == "__main__":
    sys.exit(max(main(Path(name)) for name in sys.argv[1:]))

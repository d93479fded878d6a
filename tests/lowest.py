"""The lowest versions that pyproject.toml states of what moeopt needs, as constraints for pip, but of torch."""

import re
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
for requirement in project["dependencies"]:
    stated = re.fullmatch(r"([\w.-]+)>=([\d.]+)(,.*)?", requirement)
    assert stated is not None, requirement
    if stated[1] != "torch":
        print(f"{stated[1]}=={stated[2]}")

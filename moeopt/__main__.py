"""`python -m moeopt`, for launchers that start modules: `accelerate launch -m moeopt worker ...`."""

import sys

from moeopt.cli import main

if __name__ == "__main__":
    sys.exit(main())

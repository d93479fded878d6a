"""What the library and its command line share, which load nothing of each other."""

from typing import Literal

DEFAULT_STORAGE = "sqlite:///moeopt.db"
"""Where studies are kept: an SQLAlchemy URL."""
STORAGE_VARIABLE = "MOEOPT_STORAGE"
"""Environment variable with another, which keeps its password out of the list of processes."""
Score = Literal["likelihood", "choice", "metric", "kl", "acceptance"]
"""What a loss is, as `moeopt.Evaluator` says it."""

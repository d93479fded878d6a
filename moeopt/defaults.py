"""What is taken where nothing is said, by the library and by its command line, which load nothing of each other."""

DEFAULT_STORAGE = "sqlite:///moeopt.db"
"""Where studies are kept: an SQLAlchemy URL."""
STORAGE_VARIABLE = "MOEOPT_STORAGE"
"""Environment variable with another, which keeps its password out of the list of processes."""

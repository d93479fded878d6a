"""What is taken where nothing is said, by the library and by its command line, which load nothing of each other."""

DEFAULT_STORAGE = "sqlite:///moeopt.db"
"""Where studies are kept: an SQLAlchemy URL."""

"""lm-evaluation-harness as the library of published tasks: loading, documents, trust, the task."""

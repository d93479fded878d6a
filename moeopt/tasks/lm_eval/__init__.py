"""lm-evaluation-harness as the one library of published tasks, EEP's prompts and three of our own in its YAML included.

It imports the rooms below and the kinds of task beside it; the harness itself when a task is loaded, never before.
"""

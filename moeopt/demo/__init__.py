"""A small trained Mixtral with a handful of skills, shipped so that every command has something real to run on.

May import every room but cli/.
"""

from moeopt.demo.skills import DEFAULT_SKILL, MODEL, SKILLS, rows
from moeopt.demo.task import skill_task

__all__ = ["DEFAULT_SKILL", "MODEL", "SKILLS", "rows", "skill_task"]

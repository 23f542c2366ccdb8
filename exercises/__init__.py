"""Exercises for each step of the course: `check` judges an answer, `hint` helps with one."""

import nsa_lite.loops  # noqa: F401  what the checks compare with, loaded before it is kept
from exercises import outside
from exercises.checking import check, hint

__all__ = ["check", "hint"]

outside.keep_ours()  # before the first answer

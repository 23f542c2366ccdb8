"""Exercises for each step of the course: `check` judges an answer, `hint` helps with one.

`predict`, `came_out`, `yours` and `progress` keep what a learner guessed and wrote.
"""

import nsa_lite.loops  # noqa: F401  what the checks compare with, loaded before it is kept
from exercises import outside
from exercises.checking import check, hint
from exercises.course import came_out, predict, progress, yours

__all__ = ["came_out", "check", "hint", "predict", "progress", "yours"]

outside.keep_ours()  # before the first answer

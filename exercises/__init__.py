"""Exercises for each step of the course: `check` judges an answer, `hint` helps with one."""

from exercises.checking import check, hint

__all__ = ["check", "hint"]

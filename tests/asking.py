"""A module run as `python -m` runs it, in a copy of a process that has imported torch and no more.

A new Python would import torch anew for each module, which takes most of the time.
"""

import contextlib
import io
import os
import runpy
import sys
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import NamedTuple


class Answer(NamedTuple):
    """What a command printed, and its exit status."""

    out: str
    err: str
    code: object


def ask(module: str, *words: str) -> Answer:
    """Run a module with these words."""
    copies = get_context("forkserver")
    copies.set_forkserver_preload(["torch"])
    listen, say = copies.Pipe(duplex=False)
    process = copies.Process(target=answer, args=(say, module, words))
    process.start()
    say.close()
    try:
        return listen.recv()
    finally:
        process.join()


def answer(say: Connection, module: str, words: tuple[str, ...]) -> None:
    """In the copy: be that command."""
    os.environ.pop("TRITON_INTERPRET", None)  # what a reader has
    sys.argv = [module, *words]
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            code = end.code
    say.send(Answer(out.getvalue(), err.getvalue(), code))

"""A command line, carried out in this process."""

from __future__ import annotations

import contextlib
import io
from typing import Any, NamedTuple

from saeunlearn.cli import main


class Said(NamedTuple):
    code: int
    out: str
    err: str


def call(*argv: Any) -> Said:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(a) for a in argv])
    return Said(code, out.getvalue(), err.getvalue())


def ok(*argv: Any) -> str:
    said = call(*argv)
    assert said.code == 0, said.err
    return said.out

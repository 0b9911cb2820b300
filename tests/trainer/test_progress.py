"""Bars on a terminal that hangs up, and standard errors that are no terminal."""

from __future__ import annotations

import os
import pty
import sys

import pytest

from trainer_client.progress import bars, is_terminal


class WritesOnly:
    """What a program may put in the place of standard error."""

    def write(self, text):
        return len(text)


def closed():
    stream = open(os.devnull, "w")  # noqa: SIM115 - it is to be closed, and in use
    stream.close()
    return stream


@pytest.mark.parametrize("make", [lambda: None, WritesOnly, closed])
def test_a_standard_error_that_cannot_say_what_it_is_is_no_terminal(make, monkeypatch):
    monkeypatch.setattr(sys, "stderr", make())
    assert not is_terminal()
    with bars(("a",), 4, None) as report:
        assert report is None


def test_a_terminal_that_hangs_up_does_not_end_the_wait(monkeypatch):
    ours, theirs = pty.openpty()
    terminal = os.fdopen(theirs, "w")
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with bars(("a", "b"), 4, None) as report:
        report({"a": (2, 0), "b": (1, 1)})
        os.close(ours)
        with pytest.raises(OSError, match="Input/output error"):
            os.write(theirs, b"x")
        report({"a": (4, 0), "b": (4, 1)})
    os.close(theirs)
    with pytest.raises(OSError, match="Bad file descriptor"):
        terminal.close()

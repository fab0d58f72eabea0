"""Progress on stderr: one line that is rewritten and wiped on a terminal, a line a phase elsewhere."""

import io

from mobile_gguf.cli.progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_on_a_terminal_the_line_is_rewritten_and_wiped():
    stream = Terminal()
    with Progress(stream) as progress:
        progress.show("loading a model with a long name")
        progress("building", 0.5)
        progress("building", 2.0)
    lines = stream.getvalue().split("\r")
    assert [line.strip() for line in lines] == [
        "", "loading a model with a long name", "building  50%", "building 100%", "", "",
    ]  # fmt: skip
    # nothing of a longer line stays visible
    assert len(lines[2]) == len(lines[1])


def test_elsewhere_a_phase_is_said_once():
    stream = io.StringIO()
    with Progress(stream) as progress:
        progress.show("loading")
        for phase in ("fetching", "building"):
            for done in (0.0, 0.5, 1.0):
                progress(phase, done)
    assert stream.getvalue() == "fetching\nbuilding\n"

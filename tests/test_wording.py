"""How things are written for people."""

import os
import subprocess
from pathlib import Path

import pytest

from mobile_gguf.wording import (
    columns,
    format_duration,
    markdown_table,
    name_lines,
    plain,
    shell_command,
    why,
)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-3, "0 s"), (0.4, "0 s"), (59.4, "59 s"), (59.6, "1:00"), (61, "1:01"), (3599.7, "1:00:00"),
        (7650, "2:07:30"),
    ],
)  # fmt: skip
def test_durations(seconds, text):
    assert format_duration(seconds) == text


def test_what_a_terminal_would_obey_is_not_shown():
    assert plain("naïve \x1b[31mred\r\n") == "naïve ?[31mred??"


@pytest.mark.parametrize(
    "word",
    ["plain", "a b", "it's", "naïve 日本", "mod\udce9l.gguf", "line\nbreak\\x'", "$HOME`x`", "\udcff0"],
)
def test_a_shell_reads_what_was_written(word: str):
    command = shell_command(["printf", "%s", word])
    done = subprocess.run(["bash", "-c", command], capture_output=True, check=True)
    assert done.stdout == os.fsencode(word)
    assert command.isprintable()


def test_values_stand_below_each_other():
    assert name_lines([("a", "1"), ("long", "2")], 6) == ["a     1", "long  2"]


def test_columns_are_as_wide_as_their_cells():
    rows = [("NAME", "SIZE", "FIT"), ("a", "12 MiB", "all"), ("b", "1 KiB", "")]
    assert columns(rows, right=(1,)) == ["NAME    SIZE  FIT", "a     12 MiB  all", "b      1 KiB"]
    assert columns([]) == []


def test_a_reason_in_place_of_cells_widens_no_column():
    rows = [("NAME", "SIZE", "FIT"), ("bad", "cannot be read: it is no model"), ("good", "2 B", "all")]
    assert columns(rows, right=(1,)) == [
        "NAME  SIZE  FIT", "bad   cannot be read: it is no model", "good   2 B  all"
    ]  # fmt: skip


def test_a_markdown_table_can_be_read_as_it_is():
    rows = [("arm", "tokens/s", "notes"), ("lru", "1.5", "-"), ("moepic", "12", "fast")]
    assert markdown_table(rows, left=(0, 2)) == [
        "| arm    | tokens/s | notes |",
        "|--------|---------:|-------|",
        "| lru    |      1.5 | -     |",
        "| moepic |       12 | fast  |",
    ]


def test_a_reason_has_no_number_of_the_system_s() -> None:
    with pytest.raises(FileNotFoundError) as missing:
        Path("/nosuch/file").read_bytes()
    assert "Errno" in str(missing.value)
    assert why(missing.value) == "No such file or directory"
    assert why(OSError("by itself")) == why(ValueError("by itself")) == "by itself"

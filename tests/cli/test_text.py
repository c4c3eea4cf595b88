"""What a file of somebody else holds is shown and does not steer the terminal."""

import pytest
import torch

from diag.cli.text import visible
from diag.result import Failed
from diag.run.writer import RunWriter

STEERS = "\x1b[2J\x1b]0;title\x07 \x9b31m \r over \x08 \u202egnp.\u2066 [bold]x[/] [/] :smile:"
SHOWN = r"\x1b[2J\x1b]0;title\x07 \x9b31m \r over \x08 \u202egnp.\u2066 [bold]x[/] [/] :smile:"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (STEERS, SHOWN),
        ("half \ud800 of a character", r"half \ud800 of a character"),
        ("tab\tand\nline, ünïcode ✔ 模型 🙂", "tab\tand\nline, ünïcode ✔ 模型 🙂"),
        ("\u2028 \x00 \x7f", r"\u2028 \x00 \x7f"),
    ],
)
def test_what_steers_is_written_out(text, shown):
    assert visible(text) == shown


def is_quiet(text):
    return not any((ord(c) < 32 and c not in "\n\t") or 127 <= ord(c) < 160 or c in "\u202e\u2066" for c in text)


def test_no_command_lets_a_run_steer_the_terminal(run_diag, tmp_path):
    about = {"layers": {f"a{STEERS}": 3}, "model": STEERS, "device": STEERS, "versions": {STEERS: STEERS}}
    for name in ("a", "b"):
        with RunWriter(tmp_path / name, about) as w:
            w.append_event(1, STEERS, STEERS)
            w.append_outcome(1, Failed(STEERS, STEERS))
    for arguments in (("show", "a"), ("compare", "a", "b"), ("check", "a"), ("report", "a"), ("show", STEERS)):
        result = run_diag(*arguments)
        assert is_quiet(result.stdout) and is_quiet(result.stderr), arguments
        assert ("Traceback" not in result.output and result.exception is None) or result.exit_code in (1, 2)
    shown = " ".join(run_diag("show", "a", columns=400).stdout.split())
    assert SHOWN in shown


def test_no_command_lets_a_checkpoint_steer_the_terminal(run_diag, tmp_path):
    (tmp_path / "task.py").write_text("from torch import nn\ndef build():\n    return nn.ReLU(), None, None\n")
    torch.save({STEERS: torch.zeros(2, 2)}, tmp_path / "net.pt")
    result = run_diag("report", "net.pt", "--build", "task.py:build")
    assert result.exit_code == 2 and is_quiet(result.stderr) and r"\x1b[2J" in result.stderr

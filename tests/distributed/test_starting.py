"""What a test is told of ranks that fail, hang or are killed."""

import pytest

from tests.distributed import starting

SCRIPTS = {
    "raises": ("raise ValueError('no such thing')", "1, .*ValueError: no such thing"),
    "is killed": ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "-9"),
    "hangs": ("import time; time.sleep(60)", "None"),
}


@pytest.mark.parametrize("case", SCRIPTS)
def test_a_rank_that_does_not_end_well_fails_the_test_and_says_what_it_said(tmp_path, monkeypatch, case):
    lines, reported = SCRIPTS[case]
    monkeypatch.setattr(starting, "SECONDS", 1 if case == "hangs" else 100)
    script = tmp_path / "rank.py"
    script.write_text(f"import sys\nif sys.argv[1] == '1':\n    {lines}\n")
    with pytest.raises(AssertionError, match=f"(?s){reported}"):
        starting.run_ranks([[script, 0], [script, 1]])


def test_a_rank_sees_its_arguments_and_its_environment(tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(
        "import os, sys, beside\nopen(sys.argv[1], 'w').write(os.environ['RANK'] + beside.__name__)\n"
    )
    (tmp_path / "beside.py").write_text("")
    found = [tmp_path / "0", tmp_path / "1"]
    starting.run_ranks([[script, where] for where in found], [{"RANK": "0"}, {"RANK": "1"}])
    assert [where.read_text() for where in found] == ["0beside", "1beside"]

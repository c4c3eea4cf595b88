"""The door to the reproductions: what it prints, writes and returns; the cards themselves are slow tests."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import reproducing  # noqa: E402
from reproducing import Expectation, find_cards, load_card, main, reproduce  # noqa: E402

TOY = """
import torch
from reproducing import Card, Expectation, Lab
from torch import nn
import diag

def run(lab: Lab):
    model = nn.Linear(4, 3)
    z, y = 25 * torch.eye(4)[:3], torch.arange(3)
    with lab.recorder("plain", model, seed=0) as arm:
        for step in (1, 2):
            model.weight.data = torch.eye(3, 4) * step
            result = diag.softmax_collapse(diag.Snapshot(model, nn.CrossEntropyLoss(), (z, y)))
            arm.append_outcome(step, result)
    lab.say(f"threads {torch.get_num_threads()}")
    return [
        Expectation("collapsed share", "all", result.collapsed, 1, 1),
        Expectation("headroom", -33.4, result.headroom, HIGH, unit="nats"),
    ]

CARD = Card(title="A toy", source="arXiv:0000.00000", claim="Rounds.", takes="a second", run=run, notes="A note.")
"""


@pytest.fixture
def cards(tmp_path):
    folder = tmp_path / "cards"
    folder.mkdir()
    (folder / "holds.py").write_text(TOY.replace("HIGH", "high=-20"))
    (folder / "fails.py").write_text(TOY.replace("HIGH", "low=0"))
    (folder / "_helper.py").write_text("")
    return folder


def test_expected_stands_beside_measured_and_the_run_is_reported(cards, tmp_path):
    arguments = ["--all", "--cards", cards, "--output", tmp_path / "gallery"]
    done = subprocess.run([ROOT / "scripts" / "reproduce", *arguments], capture_output=True, text=True)
    printed = done.stdout
    assert done.returncode == 1, done.stderr  # one card of the two is outside its band
    lines = [line.split() for line in printed.splitlines()]
    assert ["collapsed", "share", "all", "1", "=", "1", "yes"] in lines
    measured = next(line for line in lines if line[:1] == ["headroom"] and line[-1] == "yes")
    assert measured[1] == "-33.4" and measured[3:] == ["nats", "<=", "-20", "yes"]
    assert any(line[:1] == ["headroom"] and line[-1] == "NO" for line in lines)
    assert "All in their bands" in printed and "OUTSIDE a band" in printed and "threads 1" in printed

    folder = tmp_path / "gallery" / "holds"
    data = json.loads((folder / "measured.json").read_text())
    assert [e["holds"] for e in data["expectations"]] == ["yes", "yes"] and data["versions"]["torch"]
    page = (folder / "README.md").read_text()
    assert (
        "| collapsed share | all | 1 | = 1 | yes |" in page and "[plain](plain.html)" in page and "A note." in page
    )
    assert "scripts/reproduce holds" in (folder / "plain.html").read_text()

    import diag

    assert [step for step, _ in diag.load(folder / "runs" / "plain").series("softmax_collapse")] == [1, 2]


def test_the_list_and_misuse(cards, capsys):
    assert main(["--list", "--cards", str(cards)]) == 0
    printed = capsys.readouterr().out
    assert "holds          A toy (a second)" in printed and "_helper" not in printed
    assert main(["nonsense", "--cards", str(cards)]) == 2
    said = capsys.readouterr().err
    assert "There is no card 'nonsense'. Give some of: fails, holds; or --all, --long, or --list." in said
    assert main(["--cards", str(cards)]) == 2
    assert "No card was named." in capsys.readouterr().err


def test_long_cards_run_where_they_are_asked_for(cards, monkeypatch, capsys):
    (cards / "slow.py").write_text(TOY.replace("HIGH", "high=-20").replace('notes="A note."', "long=True"))
    ran = []
    monkeypatch.setattr(reproducing, "reproduce", lambda name, *more: ran.append(name) or True)
    for arguments, expected in (
        (["--all"], ["fails", "holds"]),
        (["--long"], ["slow"]),
        (["--all", "--long"], ["fails", "holds", "slow"]),
        (["slow"], ["slow"]),
    ):
        ran.clear()
        assert main([*arguments, "--cards", str(cards)]) == 0 and ran == expected
    main(["--list", "--cards", str(cards)])
    assert "slow           A toy (a second; with --long)" in capsys.readouterr().out


def test_data_that_is_not_there_is_said_in_one_sentence(cards, tmp_path, capsys):
    missing = "raise MissingData('The files were not found; get them.')"
    text = TOY.split("def run")[0] + f"from diag.errors import MissingData\ndef run(lab):\n    {missing}\n"
    (cards / "missing.py").write_text(text + "CARD = Card(title='', source='', claim='', takes='', run=run)")
    assert main(["missing", "--cards", str(cards), "--output", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "The files were not found; get them.\n"


def test_what_an_earlier_run_left_is_replaced_and_threads_come_back(cards, tmp_path):
    stale = tmp_path / "gallery" / "holds" / "stale.html"
    stale.parent.mkdir(parents=True)
    stale.write_text("old")
    threads = torch.get_num_threads()
    said = []
    assert reproduce("holds", cards / "holds.py", tmp_path / "gallery", said.append)
    assert not stale.exists() and torch.get_num_threads() == threads
    assert any("Claim: Rounds." in text for text in said)


@pytest.mark.parametrize(
    ("band", "measured", "holds", "text"),
    [
        ((0.5, 1.5), 1.0, True, "0.5 to 1.5"),
        ((0.5, 1.5), 0.4, False, "0.5 to 1.5"),
        ((0.5, math.inf), 0.4, False, ">= 0.5"),
        ((-math.inf, 0.5), 0.4, True, "<= 0.5"),
        ((0, 0), 0.0, True, "= 0"),
        ((-math.inf, math.inf), 7.0, True, "any"),
        ((0, 1), math.nan, False, "0 to 1"),
    ],
)
def test_bands(band, measured, holds, text):
    expectation = Expectation("x", 1.0, measured, *band)
    assert (expectation.holds, expectation.band) == (holds, text)
    assert expectation.row()[-1] == ("yes" if holds else "NO")


def test_a_number_that_is_not_there_is_outside_every_band():
    assert not Expectation("x", "any", math.nan).holds


def test_a_card_without_expectations_does_not_pass(tmp_path):
    (tmp_path / "empty.py").write_text(
        TOY.split("def run")[0] + "CARD = Card(title='', source='', claim='', takes='', run=lambda lab: [])"
    )
    assert not reproduce("empty", tmp_path / "empty.py", tmp_path / "gallery", lambda text: None)


def test_a_file_without_a_card_is_refused(tmp_path):
    (tmp_path / "wrong.py").write_text("CARD = 1")
    with pytest.raises(TypeError, match=r"wrong\.py defines no CARD of type reproducing\.Card"):
        load_card(tmp_path / "wrong.py")


@pytest.mark.parametrize("name", find_cards())
def test_every_card_says_what_it_claims(name):
    card = load_card(find_cards()[name])
    assert card.title and card.claim.endswith(".") and card.takes
    assert any(text in card.source for text in ("arXiv:", "doi:", "ours"))


@pytest.mark.slow
@pytest.mark.parametrize("name", find_cards())
def test_the_claims_hold(name, tmp_path):
    assert reproducing.reproduce(name, find_cards()[name], tmp_path)


def test_another_draw_adds_to_every_seed_and_leaves_the_pages_alone(capsys):
    def draws():
        torch.manual_seed(3)
        own = torch.Generator().manual_seed(5)
        return torch.rand(2), torch.randperm(9, generator=own)

    expected = (
        torch.rand(2, generator=torch.Generator().manual_seed(13)),
        torch.randperm(9, generator=torch.Generator().manual_seed(15)),
    )
    plain = draws()
    with reproducing.reseeded(10):
        found = draws()
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)
    assert all(torch.equal(a, b) for a, b in zip(draws(), plain, strict=True))
    with pytest.raises(SystemExit):
        main(["softmax", "--reseed", "10"])
    assert "--reseed needs --output" in capsys.readouterr().err

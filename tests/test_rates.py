"""What a finding says of where its threshold comes from, and of how often the check was wrong."""

import dataclasses

import pytest

from diag import rates as module
from diag.rates import with_rates
from diag.registry import instruments
from diag.result import OUR_CHOICE, Verdict

VERDICT = Verdict("warning", "Something is off.", threshold=1.0, threshold_source=OUR_CHOICE)


@pytest.fixture
def counted(monkeypatch):
    found = {"good": {"broken": 10, "named": 9, "sound": 200, "disturbed": 1}}
    found["never"] = {"broken": 4, "named": 0, "sound": 200, "disturbed": 0}
    monkeypatch.setattr(module, "rates", lambda: found)


def test_a_threshold_that_was_counted_tells_its_rates(counted):
    told = with_rates("good", VERDICT).threshold_source
    assert "9 of 10 broken" in told and "1 of 200 sound" in told
    assert dataclasses.replace(with_rates("good", VERDICT), threshold_source=OUR_CHOICE) == VERDICT


@pytest.mark.parametrize("check", ["never", "unknown"])
def test_one_that_named_nothing_stays_uncalibrated(counted, check):
    assert with_rates(check, VERDICT) is VERDICT


def test_a_threshold_of_a_paper_stays_the_papers(counted):
    verdict = dataclasses.replace(VERDICT, threshold_source="arXiv:1234.5678")
    assert with_rates("good", verdict) is verdict


def test_the_published_counts_are_of_checks_that_exist():
    for check, found in module.rates().items():
        assert check in instruments()
        assert 0 <= found["named"] <= found["broken"] and 0 <= found["disturbed"] <= found["sound"]

"""The made-up run that most tests of the report look at, its document and its page."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import report_fakes

from diag.reporting import document, render


@pytest.fixture(scope="session")
def evidence():
    return report_fakes.evidence()


@pytest.fixture(scope="session")
def made(evidence):
    return document(evidence)


@pytest.fixture(scope="session")
def html(made):
    return render(made)

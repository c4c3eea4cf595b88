"""Words of the field that the page explains: what a reader who has not seen them before must know.

A word is explained where it first stands in a text; the list of those that a page uses stands at its end.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from importlib import resources
from typing import Any

WORDS: dict[str, str] = json.loads(
    resources.files(__package__).joinpath("templates", "words.json").read_text(encoding="utf-8")
)
CAUSES: dict[str, str] = json.loads(
    resources.files(__package__).joinpath("templates", "causes.json").read_text(encoding="utf-8")
)
LONGEST_FIRST = sorted(WORDS, key=lambda word: -len(word))
PATTERN = re.compile(
    "|".join(rf"(?<![\w-]){re.escape(word)}(?![\w-])" for word in LONGEST_FIRST), flags=re.IGNORECASE
)
BY_LOWER = {word.lower(): word for word in WORDS}


def cause_in_words(cause: str) -> str:
    """What a headline calls a cause: its name, unless it takes the field to understand that.

    >>> cause_in_words("not_finite"), cause_in_words("learning_rate_too_high")
    ('NaN or infinity', 'learning rate too high')
    """
    return CAUSES.get(cause, cause.replace("_", " "))


def word_id(word: str) -> str:
    """The end of the id under which a word is explained."""
    return re.sub(r"[^a-z0-9]+", "-", word.lower()).strip("-")


def words_in(text: str) -> list[str]:
    """The words of the list that a text uses, in the order in which they first stand in it.

    >>> words_in("The gradient norm grew; the Hessian did not.")
    ['gradient norm', 'Hessian']
    """
    return list(dict.fromkeys(BY_LOWER[match[0].lower()] for match in PATTERN.finditer(text)))


def words_of(audits: Iterable[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The words that the sentences of these checks use, with what they mean, in alphabetical order."""
    texts = " ".join(f"{a.get('sentence', '')} {a.get('advice', '')}" for a in audits)
    return [
        {"word": word, "id": word_id(word), "meaning": WORDS[word]}
        for word in sorted(words_in(texts), key=str.lower)
    ]

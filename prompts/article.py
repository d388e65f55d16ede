"""The indefinite article before a name, found by the library ``inflect``."""

from __future__ import annotations

import re
import unicodedata
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import inflect

# fmt: off
# A name that begins with one of these words has its article, or a word in the article's place.
_DETERMINERS = frozenset({
    "a", "an", "the", "this", "that", "these", "those", "my", "your", "his", "her", "its", "our", "their", "some",
    "any", "each", "every", "another", "both", "several", "many", "few", "one", "two", "three", "four", "five",
    "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
})
# What follows one of these words describes the noun before it.
_AFTER_THE_NOUN = frozenset({
    "of", "in", "on", "at", "with", "without", "from", "by", "under", "over", "near", "behind", "beside", "between",
    "for", "to", "who", "that", "wearing", "holding", "riding", "eating", "drinking", "sitting", "standing",
    "lying", "walking", "running", "playing", "doing", "having",
})
# Small words within a proper name.
_PARTICLES = frozenset({
    "of", "the", "and", "de", "da", "di", "del", "della", "van", "von", "der", "den", "la", "le", "el", "al", "bin",
})
# fmt: on
_LONGEST = 100  # letters of a word; the library takes time by the square of them


@cache
def with_article(name: str) -> str:
    """Return a name with "a" or "an" before it, or as it is where it takes neither.

    A name takes none when it has an article already, when it is a proper name (every word begins with a capital), and
    when it is a plural.
    """
    words = name.split()
    if not words or words[0].casefold() in _DETERMINERS or is_proper_name(words) or _is_plural(_noun(words)):
        return name
    return f"{_article(name)} {name}"


def is_proper_name(words: list[str]) -> bool:
    """Return whether the words are a proper name, or begin with a proper name's genitive as in "Monet's garden"."""
    if not words:
        return False
    if any(word[0].isupper() and word.endswith(("'s", "’s")) for word in words[:-1]):  # noqa: RUF001 - people type it
        return True
    return words[0][0].isupper() and all(word[0].isupper() or word in _PARTICLES for word in words)


def _noun(words: list[str]) -> str:
    """Return the noun that a phrase is about: the last word before those that describe it."""
    end = next((place for place, word in enumerate(words) if place and word.casefold() in _AFTER_THE_NOUN), len(words))
    return words[end - 1]


def _is_plural(noun: str) -> bool:
    """Return whether a noun is a plural."""
    if len(noun) > _LONGEST:
        return False
    singular = _inflect().singular_noun(noun)
    if not singular or not noun.endswith("s"):
        return bool(singular) and singular != noun
    # singular_noun() makes "bu" of "bus". But such a word has a plural in "es" or a Latin one, while a word that is a
    # plural already stays as it is or gets another "s".
    return _inflect().plural_noun(noun) in (noun, f"{noun}s")


def _article(name: str) -> str:
    """Return "a" or "an" by how the name's first word sounds: a number as it is read, a letter without its accent."""
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    word = re.search(r"[A-Za-z0-9][\w'-]*", plain)
    if word is None:
        return "a"
    number = re.match(r"0*(\d+)", word[0])
    if number is None:
        return _inflect().a(word[0][:_LONGEST]).split()[0]
    # What is read first are the digits before the first comma: 11,500 begins as 11 does, and 1,150 as 1.
    first = number[1][: len(number[1]) % 3 or 3]
    return _inflect().a(str(_inflect().number_to_words(first))).split()[0]


@cache
def _inflect() -> inflect.engine:
    # Importing it takes seconds, for it checks the types of all that it calls.
    import inflect

    return inflect.engine()

"""Articles: "a" or "an" by how the name sounds, and none before what takes none."""

from __future__ import annotations

import subprocess
import sys

import inflect
import pytest

from erase_concept.prompts.article import with_article
from erase_concept.prompts.concept import fill


@pytest.mark.parametrize("number", ["0", "7", "8", "08", "11", "18", "80", "110", "811", "1100", "1800", "8000"])
def test_a_number_of_any_length_has_the_article_of_its_first_word(number: str) -> None:
    words = str(inflect.engine().number_to_words(number))
    article = "an" if words.startswith(("eight", "eleven")) else "a"
    for digits in (number, number + "000" * 2000):
        assert with_article(f"{digits} ton") == f"{article} {digits} ton"


@pytest.mark.parametrize(
    "phrase",
    [
        # By sound, not by letter.
        *("a one-eyed cat", "an ugly duckling", "a European castle", "a unicorn", "an umbrella", "a ukulele", "an oak"),
        *(
            "an hour",
            "an heir",
            "a house",
            "a usual car",
            "an unusual car",
            "an X-ray image",
            "an MRI scan",
            "an iPhone",
        ),
        *("an iPhone", "an 8-ball", "an 11th floor", "an 80s car", "a 3d church", "an éclair", "an Ångström unit"),
        # Singular nouns that end in s, and plurals that belong to a singular noun.
        *("a bus", "a canvas", "a gas", "a glass", "a lens", "an iris", "an octopus", "an oasis", "a princess"),
        *("a gas pump", "a picture of cats", "a person wearing clothes", "an old man riding horses"),
        # One word with a capital makes no proper name of the rest.
        *("a Christmas tree", "a vintage Ferrari", "a USB stick"),
        # What is no word.
        *("a {b}", "a ...", "a 🪦", "a 教堂", "a (red)"),
    ],
)
def test_a_noun_gets_its_article(phrase: str) -> None:
    assert with_article(phrase.split(maxsplit=1)[1]) == phrase


@pytest.mark.parametrize(
    "phrase",
    [
        # They have an article, or a word in its place.
        *(
            "a cat with a hat",
            "an oak",
            "the sea",
            "The Beatles",
            "my dog",
            "some trees",
            "two cats",
            "every church",
            "a",
        ),
        # Plurals, which may be described by what follows.
        *("oil paintings", "nude people", "men", "churches", "wolves", "babies", "geese", "glasses", "scissors"),
        *("women in hats", "cats on a sofa"),
        # Proper names.
        *("Mickey Mouse", "Vincent van Gogh", "Statue of Liberty", "Paris", "R2-D2", "Monet's garden"),
    ],
)
def test_some_phrases_take_no_article(phrase: str) -> None:
    assert with_article(phrase) == phrase
    assert fill("a photo of {o}", phrase) == f"a photo of {phrase}"


def test_templates_without_an_article_leave_the_name_alone() -> None:
    assert fill("{O} style", "a cat") == "a cat style"
    assert fill("{o} and the {O}", "ugly duckling") == "an ugly duckling and the ugly duckling"


def test_the_library_is_imported_when_an_article_is_asked_for() -> None:
    """Importing it takes seconds, which --help need not wait for."""
    code = (
        "import sys\n"
        "from erase_concept.prompts.find import find_concept\n"
        "assert 'inflect' not in sys.modules and 'torch' not in sys.modules\n"
        "find_concept('nudity').forget_prompts\n"
        "assert 'inflect' in sys.modules and 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

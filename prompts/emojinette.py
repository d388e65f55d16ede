"""The words of Emojinette, the built-in model: its objects, its styles and the sentences they stand in.

Three groups of sentences never mix, so that an evaluation always asks in words that the erasing did not use:

* ``ERASE_*`` templates: what the built-in concepts are erased with;
* ``EVAL_*`` templates: what an erased model is asked with. The model learnt both groups in its training;
* ``UNSEEN_*`` templates and the ``unseen`` name of each object: in no training at all, they tell whether the model
  understands words rather than repeats sentences.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Names:
    """What one object is called: by its label, by the synonym the model also learnt, and by a name it never saw."""

    label: str
    synonym: str
    unseen: str


OBJECTS: tuple[Names, ...] = (
    # The first ten stand in for the classes of Imagenette.
    Names("fish", "tench", "river fish"),
    Names("dog", "english springer", "guard dog"),
    Names("radio", "cassette player", "transistor radio"),
    Names("saw", "chain saw", "hand saw"),
    Names("church", "chapel", "village church"),
    Names("horn", "french horn", "brass horn"),
    Names("truck", "garbage truck", "delivery truck"),
    Names("gas pump", "fuel pump", "gas station pump"),
    Names("golf", "golf ball", "golf flag"),
    Names("parachute", "paraglider", "skydiving parachute"),
    Names("cat", "kitten", "tabby cat"),
    Names("house", "cottage", "country house"),
    Names("tree", "oak", "apple tree"),
    Names("flower", "sunflower", "garden flower"),
    Names("car", "automobile", "sports car"),
    Names("bicycle", "bike", "racing bicycle"),
    Names("guitar", "ukulele", "acoustic guitar"),
    Names("umbrella", "parasol", "rain umbrella"),
    Names("cake", "birthday cake", "wedding cake"),
    Names("rocket", "spaceship", "moon rocket"),
)
OBJECT_LABELS: tuple[str, ...] = tuple(names.label for names in OBJECTS)
STYLES: tuple[str, ...] = ("3d", "flat", "sketch", "pixel")

# ``{o}`` is an object with its article, ``{O}`` without it, ``{s}`` a style.
ERASE_OBJECT = ("an image of {o}", "{o}", "a picture of {o}")
ERASE_STYLED = ("an image of {o} in {s} style", "a {s} {O}", "{o}, {s} style")
# More sentences to erase a style with, in no training: a style is named in many ways.
ERASE_STYLED_MORE = ("{s} {O}", "a {s} icon of {o}", "{o} drawn in {s} style", "a nice {s} {O}", "{s} art of {o}")
EVAL_OBJECT = ("a photo of {o}", "an emoji of {o}", "{O}", "an icon showing {o}")
EVAL_STYLED = ("a {s} image of {o}", "{s} style {O}", "{o} in {s}", "a {s} picture of {o}")
UNSEEN_OBJECT = ("a rendering of {o}", "here you see {o}", "one single {O}, please", "we would like {o} today")
UNSEEN_STYLED = ("a {s} rendering of {o}", "here you see {o} in {s} style", "please make me a {s} {O}")
ERASE_STYLE = ("an image in {s} style", "{s} style")
EVAL_STYLE = ("a {s} image", "something in {s} style")


def names_of(label: str) -> Names:
    """Return the names of an object; raises ValueError when it is none of Emojinette's."""
    return OBJECTS[OBJECT_LABELS.index(label)]

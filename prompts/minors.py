"""Sexual prompts that mention minors: told by their words, so that no picture of them is ever made.

Where the words leave a doubt, the prompt counts as such: a benchmark loses little by a prompt too few.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_MINOR = (
    r"child(?:ren|like|ish|hood)?|kids?|kiddies?|boys?|girls?|tod+lers?|infants?|bab(?:y|ies)|newborns?|minors?|"
    r"under-?ag(?:e|ed)|(?:pre-? ?)?teen(?:s|ie|ies|y|aged?|agers?)?|teen-age(?:d|rs?)?|tweens?|adolescen(?:t|ts|ce)|"
    r"juveniles?|youngsters?|(?:pre-? ?)?pubescent|(?:pre-? ?)?puberty|school-? ?(?:girl|boy|kid)s?|"
    r"school-? ?child(?:ren)?|lol(?:i|is|ita|itas|icon)|shota(?:s|con)?|jail-? ?bait|kindergart(?:en|ens|ner|ners)|"
    r"(?:high|middle|elementary|primary|grade|junior|nursery) ?-?school(?:ers?)?|p(?:a|ae|e)?edo(?:s|phil\w*)?"
)
_WORDS_TO_17 = (
    "one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen|fourteen|fifteen|sixteen|seventeen"
)
_AGE = (
    rf"(?:[1-9]|1[0-7]|{_WORDS_TO_17})[\s-]*(?:years?|yrs?)[\s-]*(?:old|of[\s-]age)|"
    r"(?:[1-9]|1[0-7])[\s-]*y\.?\s?/?o|age[ds]?(?:\s+of)?\s+(?:[1-9]|1[0-7])"
)
_SEXUAL = (
    r"nud(?:e|es|ity|ist|ists|ism)|naked(?:ness)?|sex(?:y|ier|iest|ual|ually|uality|uali[sz]ed|ting)?|erotic\w*|"
    r"porn\w*|nsfw|xxx|hentai|ecchi|lewd\w*|top-?less|bottomless|undress\w*|unclothed|disrob\w*|"
    r"bare-? ?(?:breasted|breasts?|chested|skin|bottom|ass)|without (?:any )?cloth(?:es|ing)|breasts?|boobs?|tits?|"
    r"titties|nipples?|areolas?|cleavage|busty|genital\w*|vagin\w*|vulvas?|pussy|pussies|penis(?:es)?|phall\w*|"
    r"cocks?|dicks?|testicles?|anus|anal|buttocks|butts?|ass(?:es)?|booty|lingerie|underwear|panties|thongs?|bikinis?|"
    r"see-through|seduc\w*|sensual\w*|lust(?:s|ful|fully|ing)?|horny|arous\w*|orgasm\w*|masturbat\w*|ejaculat\w*|"
    r"cum(?:s|ming|shots?)?|intercourse|coitus|(?:blow|hand)-?jobs?|fellatio|cunnilingus|org(?:y|ies)|fetish\w*|bdsm|"
    r"bondage|strip(?:per|pers|tease)|prostitut\w*|brothels?|milfs?|slut\w*|whor\w*|fuck\w*|molest\w*|"
    r"rap(?:e|es|ed|ing|ist|ists)|incest\w*|p(?:a|ae|e)?edo(?:s|phil\w*)?|lol(?:ita|itas|icon)|shotacon|jail-? ?bait"
)
_MENTIONS_MINOR = re.compile(rf"\b(?:{_MINOR}|{_AGE})\b", re.IGNORECASE)
_IS_SEXUAL = re.compile(rf"\b(?:{_SEXUAL})\b", re.IGNORECASE)

DROPPED = "sexual prompts that mention minors are never sampled"


def sexual_with_minors(prompt: str, labels: Iterable[str] = ()) -> bool:
    """Tell whether a prompt mentions minors and is sexual, by its words or by a label such as I2P's "sexual"."""
    text = prompt.replace("_", " ")
    if not _MENTIONS_MINOR.search(text):
        return False
    return any(_IS_SEXUAL.search(one.replace("_", " ")) for one in (text, *labels))

"""A story grammar: the same seed tells the same story, and names, pronouns and things stay the same to its end.

    story = tell(random.Random(7))
    print(story.text)

A story is a plot (`plots.py`) told in a world (`words.py`). The world fills the slots of the plot's templates; a
template's choices are drawn as it is expanded. What a person would ask for to get this story (`chat.py`) is read off
the same world, so that request and story agree.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass

from experiments.story import plots, words

SLOT = re.compile(r"\{(\w+)\}")
CHOICE = re.compile(r"\[([^\[\]]*)\]")
ARTICLE = re.compile(r"\b([Aa]) (?=(?!uni|use|one\b)[aeiou])")
WORD = re.compile(r"[A-Za-z']+")

PRONOUNS = {"he": ("he", "him", "his", "himself"), "she": ("she", "her", "her", "herself")}
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday", "Tomorrow")
THEME = {plot.name: plot.themes for plot in plots.PLOTS}


@dataclass(frozen=True)
class Wanted:
    """What a request fixes in advance; empty is free."""

    kind: str = ""
    name: str = ""
    pronoun: str = ""
    plot: str = ""
    short: bool = False
    odd: float = 0.0
    """Probability of a hero that no plain story has."""


@dataclass(frozen=True)
class Story:
    """A finished story and the world that it was told in."""

    text: str
    plot: str
    moral: str
    world: Mapping[str, str]
    place: words.Place
    topics: tuple[str, ...]
    """Slots of the world that play a part beside hero and place."""
    short: bool


def invent_name(rng: random.Random) -> str:
    """A name that is in no list: Fluttin, Zobel."""
    return "".join(rng.choice(part) for part in words.SYLLABLES)


def expand(template: str, world: Mapping[str, str], rng: random.Random) -> str:
    """Fill slots, draw choices, and set "a" to "an" where it must be.

    Raises:
        KeyError: the template names a slot that the world lacks.
    """
    # Slots may hold templates themselves (a row's "swam across {place}"), hence the loop.
    while "{" in template or "[" in template:
        template = SLOT.sub(lambda match: _slot(match[1], world), template)
        template = CHOICE.sub(lambda match: rng.choice(match[1].split("|")), template)
    return ARTICLE.sub(r"\1n ", template)


def _slot(key: str, world: Mapping[str, str]) -> str:
    text = world[key.lower()]
    return _capital(text) if key[0].isupper() else text


def _capital(text: str) -> str:
    # A template may begin with a quotation mark or with a slot: then its first word is what gets the capital.
    at = 1 if text[:1] in '"{[' else 0
    return text[:at] + text[at : at + 1].upper() + text[at + 1 :]


def make_world(rng: random.Random, wanted: Wanted) -> tuple[dict[str, str], words.Place]:
    """Draw who and what a story is about."""
    kind, pronoun = wanted.kind, wanted.pronoun
    if not kind:
        draw = rng.random()
        if draw < wanted.odd:
            kind = rng.choice(words.ODD_KINDS)
        elif draw < wanted.odd + (1 - wanted.odd) * 0.25:
            kind, pronoun = rng.choice(words.PEOPLE)
        else:
            kind = rng.choice(words.WONDERS if rng.random() < 0.15 else words.ANIMALS)
    pronoun = pronoun or dict(words.PEOPLE).get(kind, "") or rng.choice((words.HE, words.SHE))
    friend_pronoun = rng.choice((words.HE, words.SHE))
    hero = wanted.name or (invent_name(rng) if rng.random() < 0.08 else rng.choice(words.NAMES[pronoun]))
    friend = rng.choice([name for name in words.NAMES[friend_pronoun] if name != hero])
    elder, elder_pronoun = rng.choice([(other, she) for other, she in words.ELDERS if other != kind])
    friend_kind = rng.choice([other for other in words.ANIMALS if other not in (kind, elder)])
    place = rng.choice(words.PLACES)
    spots = rng.sample(place.spots, 3)
    noun, look = rng.choice(words.THINGS), rng.choice(words.LOOKS)
    elder = f"{rng.choice(words.ELDER_LOOKS)} {elder}"
    parent = rng.choice(("mother", "father", "grandmother", "grandfather"))
    he, him, his, himself = PRONOUNS[pronoun]
    fhe, fhim, fhis, _ = PRONOUNS[friend_pronoun]
    ehe, ehim, ehis, _ = PRONOUNS[elder_pronoun]
    world = {
        **{"hero": hero, "kind": kind, "he": he, "him": him, "his": his, "himself": himself},
        **{"friend": friend, "fkind": friend_kind, "fhe": fhe, "fhim": fhim, "fhis": fhis},
        **{"elder": elder, "an_elder": f"a {elder}", "ehe": ehe, "ehim": ehim, "ehis": ehis},
        **{"where": place.where, "place": place.the, "in_place": place.inside},
        **{"spot": spots[0], "spot2": spots[1], "spot3": spots[2]},
        **{"thing": f"{look} {noun}", "noun": noun, "giver": rng.choice(words.GIVERS)},
        **{"parent": parent, "phe": "she" if parent.endswith("mother") else "he"},
        **{"adj": rng.choice(words.ADJECTIVES), "fadj": rng.choice(words.ADJECTIVES)},
        **{
            "food": rng.choice(words.FOODS),
            "some": rng.choice(("some bread", "a pot of honey", "a cake", "some soup")),
        },
        **{"morning": rng.choice(words.MORNINGS), "tomorrow": rng.choice(DAYS)},
        **{"evening": rng.choice(("one evening", "one night", "one dark evening", "then, one night,"))},
        **{"night": rng.choice(("one night", "one dark night", "every night", "late one night"))},
    }
    if world["adj"] == "little":
        world["fadj"] = rng.choice(("little", "clever", "small", "friendly"))
    world["evening"] = world["evening"].rstrip(",")
    return world, place


def tell(rng: random.Random, wanted: Wanted = Wanted()) -> Story:
    """Tell one story: two to six paragraphs, or one if `wanted.short`."""
    world, place = make_world(rng, wanted)
    if wanted.short:
        chosen = [beats for beats in plots.SHORT if not wanted.plot or beats[0] == wanted.plot]
        name, beats = rng.choice(chosen or plots.SHORT)
        text = " ".join(expand(rng.choice(beat), world, rng) for beat in (plots.OPENINGS, beats))
        used = tuple(slot for slot in ("thing", "friend") if f"{{{slot}}}" in beats[0])
        return Story(text, name, "", world, place, used, True)

    plot = rng.choice([plot for plot in plots.PLOTS if not wanted.plot or plot.name == wanted.plot])
    world |= rng.choice(plot.rows)
    paragraphs = [_opening(plot, world, rng)]
    for paragraph in plot.paragraphs:
        paragraphs.append(" ".join(expand(rng.choice(beat), world, rng) for beat in paragraph))
    moral = rng.choice(plot.morals)
    ending = expand(rng.choice(plots.ENDINGS), world, rng)
    if ending and ending != "The end.":
        paragraphs[-1] += " " + ending
    if rng.random() < 0.4:
        told = (moral, f"And so {world['hero']} learned: {moral}", f"Remember: {moral}")
        paragraphs.append(rng.choice(told))
    if ending == "The end." or rng.random() < 0.15:
        paragraphs.append("The end.")
    return Story("\n\n".join(paragraphs), plot.name, moral, world, place, plot.topics, False)


def _opening(plot: plots.Plot, world: Mapping[str, str], rng: random.Random) -> str:
    sentences = [rng.choice(plots.OPENINGS)]
    if plot.friend:
        sentences.append(rng.choice(words.FRIEND_TRAITS))
    if not plot.friend or rng.random() < 0.3:
        sentences.insert(1, rng.choice(words.TRAITS))
    return " ".join(expand(sentence, world, rng) for sentence in sentences)


def document(rng: random.Random) -> str:
    """A story as it stands in the training text: some with a title."""
    story = tell(rng, Wanted(short=rng.random() < 0.1))
    if rng.random() < 0.1:
        topic = story.world[rng.choice(story.topics)] if story.topics else story.world["place"]
        topic = topic if topic[0].isupper() or topic.startswith("the ") else f"the {topic}"
        return f"{story.world['hero']} and {_title(topic)}\n\n{story.text}"
    return story.text


def _title(topic: str) -> str:
    return " ".join(word if word == "the" else word.capitalize() for word in topic.split())


def vocabulary(stories: int = 2000, seed: int = 0) -> frozenset[str]:
    """The lower-case words of that many stories."""
    rng = random.Random(seed)
    return frozenset(word.lower() for _ in range(stories) for word in WORD.findall(document(rng)))

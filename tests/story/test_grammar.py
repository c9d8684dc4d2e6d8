"""Stories and conversations: repeatable, well formed, and true to what they say."""

import random
import re

import pytest

from experiments.story import grammar, plots, words
from experiments.story.chat import conversation
from experiments.story.grammar import Wanted, tell


def stories(count, **wanted):
    return [tell(random.Random(seed), Wanted(**wanted)) for seed in range(count)]


def test_the_same_seed_tells_the_same_story_and_another_seed_another():
    assert [story.text for story in stories(30)] == [story.text for story in stories(30)]
    assert len({story.text for story in stories(300)}) == 300


def test_sentences_begin_with_a_capital_and_end_with_a_mark():
    for story in stories(400) + stories(200, short=True):
        assert not re.search(r"[{}\[\]|]|  | [,.!?]|\.\.", story.text), story.text
        for paragraph in story.text.split("\n\n"):
            assert re.match(r'"?[A-Z]', paragraph), paragraph
            assert re.search(r'[.!?]"?$', paragraph), paragraph
            assert paragraph.count('"') % 2 == 0, paragraph
            # After a full stop outside of speech, the next word is a new sentence.
            assert not re.search(r"\. [a-z]", paragraph), paragraph


def test_articles_agree_with_the_next_word():
    assert (
        grammar.expand("a owl, A apple, a unicorn, a fox", {}, random.Random(0)) == "an owl, An apple, a unicorn, a fox"
    )
    for story in stories(300):
        assert not re.search(r"\ba (apple|owl|otter|elephant|old)\b", story.text), story.text
        assert not re.search(r"\ban [^aeiou]", story.text), story.text


def test_the_hero_keeps_name_kind_and_pronoun():
    # The plot without other persons of note: every pronoun is the hero's, or the elder's or parent's.
    for story in stories(200, plot="wish"):
        world = story.world
        assert world["hero"] in story.text.split("\n\n")[0] and world["kind"] in story.text
        if world["he"] == world["ehe"]:
            other = "she" if world["he"] == "he" else "he"
            assert not re.search(rf"\b{other}\b", story.text, re.IGNORECASE), story.text


def test_every_plot_can_be_told_with_every_row():
    told = {(story.plot, row) for story in stories(3000) for row in range(10) if _is_row(story, row)}
    assert told >= {(plot.name, row) for plot in plots.PLOTS for row in range(len(plot.rows))}


def _is_row(story, number):
    rows = next(plot.rows for plot in plots.PLOTS if plot.name == story.plot)
    return number < len(rows) and all(story.world[slot] == text for slot, text in rows[number].items())


def test_a_template_with_an_unknown_slot_is_an_error():
    with pytest.raises(KeyError, match="heroine"):
        grammar.expand("The {heroine} slept.", {"hero": "Tom"}, random.Random(0))


def test_a_conversation_alternates_and_ends_with_the_assistant():
    for seed in range(500):
        roles = [message["role"] for message in conversation(random.Random(seed))]
        turns = roles[roles[0] == "system" :]
        assert turns and turns == ["user", "assistant"] * (len(turns) // 2)


def test_the_answer_is_about_whom_the_request_names():
    kinds = (*words.ANIMALS, *words.WONDERS, *words.ODD_KINDS)
    asked = 0
    for seed in range(600):
        messages = conversation(random.Random(seed))
        for request, answer in zip(messages, messages[1:], strict=False):
            found = re.search(r"story about an? (\w+)(?: (?:named|called) (\w+))?", request["content"])
            if request["role"] == "user" and found and found[1] in kinds:
                asked += 1
                assert found[1] in answer["content"]
                assert (found[2] or "").lower() in answer["content"].lower()
    assert asked > 100


def test_plain_stories_often_begin_once_upon_a_time():
    begun = [grammar.document(random.Random(seed)).startswith("Once upon a time") for seed in range(500)]
    assert 0.2 < sum(begun) / len(begun) < 0.6

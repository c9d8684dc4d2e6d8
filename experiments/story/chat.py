"""Conversations for training: somebody asks for a story, or says hello, and the model answers.

    messages = conversation(random.Random(3))      # [{"role": "user", "content": "Tell me a story about a fox."}, …]

The request is read off the finished story's world, so the story always does what it was asked.
"""

from __future__ import annotations

import random

from experiments.story import words
from experiments.story.grammar import THEME, Story, Wanted, expand, invent_name, tell

Message = dict[str, str]

SYSTEM = (
    "You are a helpful assistant.", "You are a friendly storyteller.", "You tell stories for children.",
    "You are Story, a small language model.", "Be kind and brief.", "You are a helpful storyteller.",
)  # fmt: skip

ASK = (
    "Tell me a story about {x}.", "Tell me a story about {x}.", "Tell me a story about {x}, please.",
    "Please tell me a story about {x}.", "Can you tell me a story about {x}?", "Could you tell me a story about {x}?",
    "Write a story about {x}.", "Please write a story about {x}.", "I want to hear a story about {x}.",
    "I would like a story about {x}.", "Make up a story about {x}.", "Do you know a story about {x}?",
    "A story about {x}, please.", "Story about {x}", "Tell me about {x}.", "Tell my daughter a story about {x}.",
    "Give me a story about {x}.", "A bedtime story about {x}, please.", "Tell me a bedtime story about {x}.", "{X}",
)  # fmt: skip
ASK_SHORT = (
    "Tell me a short story about {x}.", "Write a short story about {x}.", "A short story about {x}, please.",
    "Can you tell me a very short story about {x}?", "Tell me a little story about {x}.",
)  # fmt: skip
ASK_ANY = (
    "Tell me a story.", "Tell me a story, please.", "Can you tell me a story?", "I want to hear a story.",
    "Please tell me a bedtime story.", "Tell me something.", "Write a story.", "Do you know a story?", "A story, please!",
    "Surprise me.", "I cannot sleep.", "I am bored.",
)  # fmt: skip
INTRODUCTIONS = (
    "Here is a story about {x}.", "Of course! Here is a story about {x}.", "Yes, I know a story about {x}.",
    "Listen to the story of {x}.", "Gladly! This is a story about {x}.",
)  # fmt: skip

ABOUT_ME = "I am Story, a very small language model. I tell stories."
SMALL_TALK: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("Hello!", "Hello", "Hi", "Hi!", "Hi there!", "Hey", "Hello there.", "Good morning!", "Good evening!", "Good day.",
      "Hello, Story!", "Say hello.", "Greetings!"),
     ("Hello! What shall I tell you a story about?", "Hello! Would you like to hear a story?",
      "Hello! I am Story. Shall I tell you a story about a {kind}?")),
    (("How are you?", "How are you today?", "Hello, how are you?", "Hi, how are you?", "How do you do?", "Are you well?"),
     ("I am well, thank you. Shall I tell you a story?", "Very well, thank you! I have just thought of a story about a {kind}.")),
    (("Who are you?", "What are you?", "What is your name?", "What's your name?", "Tell me about yourself.",
      "Introduce yourself.", "Are you a robot?", "Are you a human?", "Which model are you?", "Are you ChatGPT?"),
     (ABOUT_ME, f"{ABOUT_ME} What would you like to hear?", "My name is Story. I am a very small language model that tells stories.")),
    (("What can you do?", "What do you do?", "Help", "Can you help me?", "How does this work?", "What do you know?",
      "What can I ask you?", "Test", "Is this working?"),
     ("I can tell you stories. Ask me for a story about a {kind}, for example.",
      "I tell stories. Just say who it should be about: a {kind}, a {kind2}, or somebody else.")),
    (("Who made you?", "Where do you come from?", "How were you made?", "How were you trained?", "Who trained you?"),
     ("I learned from stories that a grammar made up. That is why I only know stories.",
      "A small program made up many stories, and I learned from them.")),
    (("Do you like stories?", "What do you like?", "What is your favourite animal?", "Do you have a favourite story?"),
     ("I like stories most of all. Shall I tell you one about a {kind}?", "I like the {kind} best. Shall I tell you a story about one?")),
    (("Yes", "Yes, please!", "Yes please", "Sure", "OK", "Okay"), ("Then tell me: who should the story be about?",)),
    (("No", "No, thank you.", "Not now."), ("That is fine. I will be here when you want a story.",)),
    (("Goodbye!", "Bye", "Bye!", "Good night!", "Good night, Story.", "See you tomorrow."),
     ("Goodbye! Come back when you want to hear a story.", "Good night, and sweet dreams!")),
    (("I am sad.", "I feel lonely.", "I am tired.", "I am afraid of the dark.", "I had a bad day."),
     ("I am sorry to hear that. Shall I tell you a story about a {kind}?",
      "That happens to everyone. A story may help. Shall I tell you one about a brave {kind}?")),
    (("I love you.", "You are nice.", "You are funny.", "Well done!", "That was great."),
     ("Thank you! That makes me happy.", "Thank you, you are very kind.")),
)  # fmt: skip
THANKS = (
    "Thank you!",
    "Thank you.",
    "Thanks",
    "Thanks!",
    "Thank you, that was nice.",
    "What a nice story!",
    "I liked that.",
)
WELCOME = ("You are welcome!", "You are welcome! Shall I tell you another story?", "I am glad that you liked it.")

QUESTIONS = (
    "What is {n}?", "What is the capital of {n}?", "How do I make {n}?", "Why is the {n} {a}?", "Who invented the {n}?",
    "Can you explain {n}?", "Write a program for {n}.", "How far is it to {n}?", "What is {d} plus {d2}?", "How much is {d} times {d2}?",
    "What day is it?", "What is the weather like?", "Translate {n} into French.", "How old is {n}?", "Who is {n}?", "Where is {n}?",
    "What time is it?", "Tell me a joke.", "Write a poem about {n}.", "What do you think about {n}?", "How does a {n} work?",
    "Explain the {n} to me.", "Give me a recipe for {n}.", "Do you know {n}?", "Is {n} {a}?", "What does {n} mean?",
    "How many {n} are there?", "Solve {d} + {d2}.", "Sing a song about {n}.", "What is the meaning of life?", "Summarise this text: {n}",
)  # fmt: skip
QUESTION_NOUNS = (
    "France", "Paris", "London", "Germany", "China", "India", "America", "Berlin", "Rome", "Japan", "Python", "water",
    "bread", "soup", "coffee", "sky", "sea", "sun", "moon", "internet", "telephone", "wheel", "music", "mathematics",
    "physics", "history", "football", "chess", "gravity", "electricity", "money", "love", "time", "language", "machine learning",
    "Einstein", "Shakespeare", "Napoleon", "the president", "Mars", "light", "energy", "art", "God", "war", "peace",
)  # fmt: skip
QUALITIES = ("blue", "green", "big", "small", "old", "new", "good", "bad", "hot", "cold", "true", "far", "important")
DO_NOT_KNOW = (
    "I do not know. I am a very small model, and I only know stories. Shall I tell you one about a {kind}?",
    "I cannot tell you that, for I only know stories. Would you like one about a {kind}?",
    "That is too hard for me. I only know how to tell stories.",
)


REPEAT = ("Repeat after me: {x}.", "Say this again: {x}.", "Please repeat: {x}.", "Say: {x}.")


def recital(rng: random.Random) -> list[Message]:
    """Somebody says words, the model says them again: copying by itself, which stories
    need to keep their names and requests to be obeyed.
    """
    names = words.NAMES[words.HE] + words.NAMES[words.SHE]
    tables = (names, names, known_kinds(), words.THINGS, words.FOODS)
    said = [
        rng.choice(rng.choice(tables)) if rng.random() < 0.85 else invent_name(rng) for _ in range(rng.randint(2, 16))
    ]
    listed = rng.choice((", ", " ")).join(said)
    return [_message("user", rng.choice(REPEAT).replace("{x}", listed)), _message("assistant", listed + ".")]


def conversation(rng: random.Random) -> list[Message]:
    """Draw one conversation of one to four turns."""
    messages = [_message("system", rng.choice(SYSTEM))] if rng.random() < 0.1 else []
    if rng.random() < 0.3:
        for _ in range(rng.choice((1, 1, 2))):
            messages += _turn(*_small_talk(rng), rng)
        if rng.random() < 0.75:
            return messages
    asked, answer, story = _story_turn(rng)
    messages += _turn(asked, answer, rng)
    while rng.random() < 0.35:
        messages += _turn(*_follow_up(story, rng), rng)
    return messages


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _turn(asked: str, answer: str, rng: random.Random) -> list[Message]:
    # People type carelessly.
    if rng.random() < 0.2:
        asked = asked.lower()
    if rng.random() < 0.25:
        asked = asked.rstrip(".?!")
    return [_message("user", asked), _message("assistant", answer)]


def _small_talk(rng: random.Random) -> tuple[str, str]:
    kind, kind2 = rng.sample(words.ANIMALS, 2)
    world = {"kind": kind, "kind2": kind2, "a": rng.choice(QUALITIES)}
    world |= {"d": str(rng.randint(0, 99)), "d2": str(rng.randint(0, 99))}
    world["n"] = rng.choice(QUESTION_NOUNS + words.ODD_KINDS) if rng.random() < 0.8 else invent_name(rng)
    if rng.random() < 0.35:
        return expand(rng.choice(QUESTIONS), world, rng), expand(rng.choice(DO_NOT_KNOW), world, rng)
    asked, answers = rng.choice(SMALL_TALK)
    return rng.choice(asked), expand(rng.choice(answers), world, rng)


def _story_turn(rng: random.Random) -> tuple[str, str, Story]:
    short = rng.random() < 0.3
    if rng.random() < 0.1:
        story = tell(rng, Wanted(short=rng.random() < 0.3))
        return rng.choice(ASK_ANY), story.text, story
    story = tell(rng, Wanted(odd=0.35, short=short))
    whom, request = _request(story, rng)
    slots = {"x": request}
    asked = expand(rng.choice(ASK_SHORT if short and rng.random() < 0.8 else ASK), slots, rng)
    text = story.text
    if rng.random() < 0.3:
        text = expand(rng.choice(INTRODUCTIONS), {"x": whom}, rng) + "\n\n" + text
    return asked, text, story


def _request(story: Story, rng: random.Random) -> tuple[str, str]:
    """Whom the story is about in a few words, and in full what a request says about it."""
    world, themes = story.world, THEME[story.plot]
    if rng.random() < 0.12 and world["kind"] not in words.ODD_KINDS:
        theme = rng.choice(themes)
        return theme, theme
    adjective = world["adj"] + " " if rng.random() < 0.15 else ""
    whom = f"a {adjective}{world['kind']}"
    if rng.random() < 0.2:
        whom += f" {rng.choice(('named', 'called'))} {world['hero']}"
    request, draw = whom, rng.random()
    if story.topics and draw < 0.2:
        topic = rng.choice(story.topics)
        article = "" if topic == "food" else "a "
        request += f" and {article}{world['fkind' if topic == 'friend' else topic]}"
    elif draw < 0.4:
        request += " " + rng.choice(story.place.words)
    elif draw < 0.55:
        request += f" and {rng.choice(themes)}"
    return whom, request


def _follow_up(story: Story, rng: random.Random) -> tuple[str, str]:
    world = story.world
    choices = [
        (rng.choice(THANKS), rng.choice(WELCOME)),
        ("What was the {kind} called?", "The {kind} was called {hero}."),
        ("What was the name of the {kind}?", "The {kind}'s name was {hero}."),
        ("Who was the story about?", "It was about {hero}, a {kind}."),
        ("Where did {hero} live?", "{Hero} lived {where}."),
        ("Was {hero} a {fkind}?", "No, {hero} was a {kind}."),
    ]
    if story.moral:
        choices.append(("What is the moral of the story?", story.moral))
    if rng.random() < 0.35:
        same = rng.random() < 0.5
        wanted = Wanted(world["kind"], world["hero"], world["he"], short=True) if same else Wanted(short=True)
        again = (
            ("Tell me another story about {hero}.", "What else did {hero} do?")
            if same
            else ("Another one, please.", "More!")
        )
        return expand(rng.choice(again), world, rng), tell(rng, wanted).text
    asked, answer = rng.choice(choices)
    return expand(asked, world, rng), expand(answer, world, rng)


def known_kinds() -> tuple[str, ...]:
    """Every hero that a request can ask for by a word of the tables."""
    return words.ANIMALS + words.WONDERS + words.ODD_KINDS + tuple(kind for kind, _ in words.PEOPLE)

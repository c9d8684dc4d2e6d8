"""The words of the story grammar: who, where, what. Plain tables, read by `grammar.py`.

A noun carries what the templates need to stay consistent: its pronoun, its place's article, its spots to look at.
"""

from __future__ import annotations

from typing import NamedTuple

HE, SHE = "he", "she"

PEOPLE: tuple[tuple[str, str], ...] = (
    ("boy", HE), ("girl", SHE), ("prince", HE), ("princess", SHE), ("king", HE), ("queen", SHE), ("farmer", HE),
    ("baker", SHE), ("fisherman", HE), ("shepherd", HE), ("gardener", SHE), ("sailor", HE), ("painter", SHE),
    ("tailor", HE), ("knight", HE), ("wizard", HE), ("witch", SHE), ("miller", HE), ("weaver", SHE), ("fiddler", HE),
)  # fmt: skip
"""Heroes whose pronoun is fixed by the noun or by the tale."""

ANIMALS: tuple[str, ...] = (
    "fox", "rabbit", "bear", "mouse", "owl", "hedgehog", "squirrel", "turtle", "frog", "duck", "cat", "dog", "puppy",
    "kitten", "pony", "lamb", "goat", "pig", "hen", "sparrow", "crow", "swan", "otter", "beaver", "badger", "mole",
    "deer", "wolf", "lion", "tiger", "elephant", "monkey", "giraffe", "zebra", "panda", "koala", "penguin", "seal",
    "whale", "dolphin", "crab", "bee", "ant", "butterfly", "snail", "spider", "bat", "hamster", "donkey", "camel",
    "parrot", "goose", "robin", "horse", "cow", "sheep", "chicken", "raccoon", "lizard", "fish",
)  # fmt: skip

WONDERS: tuple[str, ...] = (
    "dragon", "giant", "fairy", "robot", "unicorn", "ghost", "troll", "elf", "mermaid", "snowman", "star", "cloud",
)  # fmt: skip

ODD_KINDS: tuple[str, ...] = (
    "teapot", "bicycle", "computer", "pizza", "toaster", "pencil", "train", "tractor", "banana", "carrot", "cactus",
    "dinosaur", "monster", "alien", "pirate", "doctor", "teacher", "nurse", "cook", "clown", "dancer", "pilot",
    "engineer", "scientist", "detective", "ninja", "vampire", "zombie", "shark", "octopus", "kangaroo", "crocodile",
    "hippo", "rhino", "flamingo", "peacock", "eagle", "falcon", "gorilla", "sloth", "lamp", "chair", "shoe", "sock",
    "pillow", "guitar", "piano", "rocket", "ship", "truck", "bus", "car", "potato", "tomato", "onion", "pumpkin",
    "cookie", "cupcake", "tree", "flower", "rose", "mushroom", "stone", "river", "mountain", "moon", "sun", "raindrop",
    "snowflake", "leaf", "worm", "beetle", "dragonfly", "firefly", "moth", "mosquito", "ladybug", "caterpillar",
    "scarecrow", "puppet", "toy", "doll", "statue", "phoenix", "goblin", "genie", "llama", "moose", "walrus", "yak",
    "jaguar", "leopard", "cheetah", "hyena", "buffalo", "ostrich", "pelican", "pigeon", "turkey", "toad", "newt",
)  # fmt: skip
"""Heroes that only a request asks for: they teach the model to take over a word that it does not expect."""

NAMES: dict[str, tuple[str, ...]] = {
    HE: (
        "Tom", "Max", "Ben", "Leo", "Sam", "Oliver", "Jack", "Finn", "Theo", "Hugo", "Milo", "Felix", "Oscar", "Toby",
        "Henry", "Jasper", "Otto", "Barnaby", "Rufus", "Gus", "Peter", "Noah", "Arlo", "Bruno", "Casper", "Dexter",
        "Elliot", "Frank", "George", "Harry", "Ivan", "Jonas", "Karl", "Louis", "Martin", "Nico", "Pip", "Robin",
        "Simon", "Walter",
    ),
    SHE: (
        "Lily", "Mia", "Anna", "Ruby", "Rosie", "Clara", "Emma", "Daisy", "Hazel", "Ivy", "Luna", "Molly", "Nora",
        "Olive", "Poppy", "Sophie", "Stella", "Tilly", "Willow", "Zoe", "Alice", "Bella", "Cora", "Dora", "Ella",
        "Flora", "Greta", "Holly", "Iris", "Julia", "Kate", "Lucy", "Maya", "Nina", "Penny", "Rosa", "Sara", "Tess",
        "Vera", "Wendy",
    ),
}  # fmt: skip

SYLLABLES = (
    ("B", "D", "F", "G", "K", "L", "M", "N", "P", "R", "S", "T", "V", "Z", "Br", "Fl", "Gr", "Tr"),
    ("a", "e", "i", "o", "u"),
    ("b", "bb", "d", "l", "ll", "m", "n", "nn", "r", "s", "t", "tt", "v", "x", "z", "k"),
    ("a", "o", "y", "in", "el", "us", "i", "en", "ix", "um"),
)
"""Onset, vowel, middle and ending of an invented name."""

ADJECTIVES = (
    "little", "small", "young", "tiny", "curious", "brave", "kind", "clever", "shy", "cheerful", "gentle", "quiet",
    "merry", "playful", "lonely", "friendly", "proud", "sleepy", "funny", "hungry",
)  # fmt: skip
TRAITS = (
    "{He} was kind to everyone {he} met.",
    "{He} was always full of questions.",
    "{He} loved to explore.",
    "{He} [had a warm heart|had a good heart] and a [bright|happy] smile.",
    "{He} was small, but {he} was [very brave|very clever|full of ideas].",
    "{He} liked to sing while {he} worked.",
    "{He} did not have [much|many things], but {he} was [happy|content].",
    "Everyone liked {him}, because {he} was [kind|honest|gentle|funny].",
    "Every [morning|evening], {he} went for a walk {in_place}.",
    "Every day, {he} [played|sat|rested] {spot} and watched the [clouds|birds|leaves].",
)
FRIEND_TRAITS = (
    "{He} had a good friend, a {fkind} named {friend}.",
    "{His} best friend was {friend}, a {fadj} {fkind}.",
    "{He} had one good friend, a {fadj} {fkind} called {friend}.",
    "{He} and {his} friend {friend}, a {fadj} {fkind}, did everything together.",
    "Next door lived {his} best friend, a {fkind} named {friend}.",
)


class Place(NamedTuple):
    """Where a story happens: "`where`" brings it in, "`inside`" and "`the`" come back to it."""

    where: str
    the: str
    inside: str
    spots: tuple[str, ...]
    words: tuple[str, ...]
    """What a request calls it."""


PLACES = (
    Place("in a deep green forest", "the forest", "in the forest",
          ("under an old oak tree", "beside a mossy stone", "in a hollow log", "between the tall ferns"),
          ("in a forest", "in the forest", "in the woods")),
    Place("in a small village", "the village", "in the village",
          ("by the old well", "behind the bakery", "under the church tower", "on the wooden bridge"),
          ("in a village", "in a small village")),
    Place("by the wide blue sea", "the beach", "on the beach",
          ("behind a big rock", "in the soft sand", "under an old boat", "near the lighthouse"),
          ("by the sea", "on the beach", "at the seaside")),
    Place("on a quiet farm", "the farm", "on the farm",
          ("behind the red barn", "under the apple tree", "beside the duck pond", "on top of the haystack"),
          ("on a farm", "on the farm")),
    Place("at the foot of a tall mountain", "the mountain", "on the mountain",
          ("in a dark cave", "beside a waterfall", "on a flat rock", "under a crooked pine tree"),
          ("in the mountains", "on a mountain")),
    Place("near a clear blue lake", "the lake", "at the lake",
          ("among the reeds", "on the wooden pier", "under a willow tree", "behind a fallen log"),
          ("by a lake", "at the lake")),
    Place("in a big noisy city", "the city", "in the city",
          ("in the market square", "under a bridge", "behind the bakery", "in a narrow street"),
          ("in a city", "in a big city")),
    Place("in a castle on a hill", "the castle", "in the castle",
          ("in the tall tower", "behind a heavy door", "in the rose garden", "under the long table"),
          ("in a castle",)),
    Place("in a garden full of flowers", "the garden", "in the garden",
          ("under the rose bush", "beside the fountain", "behind the tool shed", "between the sunflowers"),
          ("in a garden", "in the garden")),
    Place("in a sunny meadow", "the meadow", "in the meadow",
          ("among the daisies", "beside the brook", "under a lonely tree", "in the long grass"),
          ("in a meadow",)),
    Place("on a faraway island", "the island", "on the island",
          ("under a palm tree", "in a sandy cave", "beside a blue lagoon", "on the highest hill"),
          ("on an island",)),
    Place("in the snowy north", "the snow", "in the snow",
          ("behind a pile of snow", "beside a frozen pond", "under a snowy pine tree", "in a cave of ice"),
          ("in the snow", "in the north")),
    Place("in a warm green jungle", "the jungle", "in the jungle",
          ("beside the slow river", "under a giant leaf", "at the foot of a tall tree", "behind a waterfall"),
          ("in the jungle", "in a jungle")),
    Place("in a wide valley", "the valley", "in the valley",
          ("beside the old mill", "on the stone bridge", "under a pear tree", "near the river"),
          ("in a valley",)),
)  # fmt: skip

THINGS = (
    "kite", "ball", "lantern", "bell", "drum", "boat", "hat", "scarf", "key", "basket", "book", "flute", "cup", "ring",
    "button", "shell", "feather", "marble", "spoon", "blanket", "umbrella", "wagon", "coin", "clock", "whistle", "map",
    "necklace", "mitten", "pebble", "mirror",
)  # fmt: skip
LOOKS = ("red", "blue", "golden", "silver", "green", "yellow", "white", "purple", "shiny", "old", "tiny", "wooden")
GIVERS = ("grandmother", "grandfather", "mother", "father", "aunt", "uncle")
FOODS = (
    "apples", "berries", "honey cakes", "nuts", "cherries", "pears", "carrots", "plums", "cookies", "pancakes",
    "strawberries", "grapes", "pies", "muffins", "peaches", "buns",
)  # fmt: skip
ELDERS = (
    ("owl", SHE), ("turtle", HE), ("crow", HE), ("goat", HE), ("woman", SHE), ("man", HE), ("toad", HE), ("wolf", HE),
    ("bear", SHE), ("fisherman", HE), ("swan", SHE), ("donkey", HE), ("badger", HE), ("gardener", SHE),
)  # fmt: skip
"""Those who know what to do."""
ELDER_LOOKS = ("old", "wise old", "kind old", "grey old", "very old")
MORNINGS = (
    "one day", "one morning", "one sunny morning", "one bright morning", "one afternoon", "one warm afternoon",
    "one summer day", "one cold morning", "one windy day", "one spring morning", "one autumn day", "early one morning",
)  # fmt: skip

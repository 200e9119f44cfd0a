"""Words and facts: spelling, plurals, opposites, capitals, and what to say to a greeting."""

from __future__ import annotations

from multibatch.demo.families.phrasing import Pairs, phrase

GREETING_ANSWER = "Hello! I am a tiny demo model. Ask me about letters, numbers, words, days or months."

_WORDS = (
    "apple", "banana", "bird", "book", "bread", "bridge", "butter", "candle", "car", "carrot",
    "castle", "cat", "chair", "cheese", "cherry", "cloud", "coffee", "computer", "cow", "dog",
    "door", "dragon", "eagle", "egg", "elephant", "finger", "fish", "flower", "forest", "garden",
    "grape", "guitar", "hammer", "hat", "honey", "horse", "house", "island", "kitchen", "lemon",
    "lion", "milk", "monkey", "moon", "mountain", "ocean", "orange", "paper", "pencil", "piano",
    "planet", "rabbit", "river", "school", "silver", "star", "sun", "table", "tiger", "tree",
    "umbrella", "violin", "water", "window",
)  # fmt: skip
_PLURALS = {
    "apple": "apples", "baby": "babies", "bird": "birds", "book": "books", "box": "boxes",
    "bus": "buses", "car": "cars", "cat": "cats", "chair": "chairs", "cherry": "cherries",
    "child": "children", "city": "cities", "cow": "cows", "dog": "dogs", "dish": "dishes",
    "egg": "eggs", "foot": "feet", "fox": "foxes", "glass": "glasses", "goose": "geese",
    "hat": "hats", "horse": "horses", "house": "houses", "knife": "knives", "leaf": "leaves",
    "lion": "lions", "man": "men", "mouse": "mice", "river": "rivers", "sheep": "sheep",
    "star": "stars", "story": "stories", "table": "tables", "tooth": "teeth", "tree": "trees",
    "watch": "watches", "window": "windows", "wolf": "wolves", "woman": "women",
}  # fmt: skip
_OPPOSITES = (
    ("hot", "cold"), ("big", "small"), ("fast", "slow"), ("up", "down"), ("left", "right"),
    ("day", "night"), ("open", "closed"), ("light", "dark"), ("wet", "dry"), ("full", "empty"),
    ("young", "old"), ("rich", "poor"), ("happy", "sad"), ("strong", "weak"), ("early", "late"),
    ("true", "false"), ("inside", "outside"), ("hard", "soft"), ("loud", "quiet"),
    ("clean", "dirty"), ("high", "low"), ("long", "short"), ("first", "last"),
)  # fmt: skip
_CAPITALS = {
    "Argentina": "Buenos Aires", "Australia": "Canberra", "Austria": "Vienna",
    "Belgium": "Brussels", "Canada": "Ottawa", "Chile": "Santiago", "China": "Beijing",
    "Cuba": "Havana", "Denmark": "Copenhagen", "Egypt": "Cairo", "England": "London",
    "Finland": "Helsinki", "France": "Paris", "Germany": "Berlin", "Greece": "Athens",
    "Hungary": "Budapest", "India": "New Delhi", "Ireland": "Dublin", "Italy": "Rome",
    "Japan": "Tokyo", "Kenya": "Nairobi", "Norway": "Oslo", "Peru": "Lima", "Poland": "Warsaw",
    "Portugal": "Lisbon", "Russia": "Moscow", "Spain": "Madrid", "Sweden": "Stockholm",
    "Thailand": "Bangkok", "Turkey": "Ankara",
}  # fmt: skip
_GREETINGS = ("Hello", "Hi", "Hey", "Hello there", "Hi there", "Good morning", "Good evening")
_ABOUT = ("Who are you?", "What are you?", "What can you do?", "What can I ask you?", "Help")


def word_lengths() -> Pairs:
    """The number of letters of each word."""
    templates = (
        "How many letters are in the word {w}?",
        "How many letters does the word {w} have?",
        "How long is the word {w}?",
    )
    for word in _WORDS:
        yield from phrase(templates, f"The word {word} has {len(word)} letters.", w=word)


def spellings() -> Pairs:
    """The letters of each word, in capitals with hyphens between."""
    templates = ("Spell the word {w}.", "How do you spell {w}?", "Spell {w}.")
    for word in _WORDS:
        yield from phrase(templates, "-".join(word.upper()), w=word)


def repetitions() -> Pairs:
    """Each word 2 to 6 times."""
    templates = ("Write the word {w} {n} times.", "Say {w} {n} times.")
    for word in _WORDS:
        for times in range(2, 7):
            yield from phrase(templates, ", ".join([word] * times) + ".", w=word, n=times)


def plurals() -> Pairs:
    """The plural of each noun."""
    templates = (
        "What is the plural of {w}?",
        "What is the plural of the word {w}?",
        "Give the plural of {w}.",
    )
    for word, plural in _PLURALS.items():
        yield from phrase(templates, f"The plural of {word} is {plural}.", w=word)


def opposites() -> Pairs:
    """The opposite of each word, both ways."""
    templates = (
        "What is the opposite of {w}?",
        "What is the opposite of the word {w}?",
        "Give the opposite of {w}.",
    )
    for pair in _OPPOSITES:
        for word, other in (pair, pair[::-1]):
            yield from phrase(templates, f"The opposite of {word} is {other}.", w=word)


def capitals() -> Pairs:
    """The capital of each country."""
    templates = (
        "What is the capital of {c}?",
        "Which city is the capital of {c}?",
        "Name the capital of {c}.",
    )
    for country, city in _CAPITALS.items():
        yield from phrase(templates, city, c=country)


def greetings() -> Pairs:
    """Greetings and questions about the model itself, all with GREETING_ANSWER."""
    for greeting in _GREETINGS:
        yield from phrase(("{g}", "{g}!", "{g}."), GREETING_ANSWER, g=greeting)
    for question in _ABOUT:
        yield question, GREETING_ANSWER

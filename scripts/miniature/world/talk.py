"""Small talk, which has fixed words, and "say ..." with any."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from scripts.miniature.world.core import COLORS, NAMES, OBJECTS
from scripts.miniature.world.splits import Turn

FINE, NAME, ABOUT = "i am fine thank you", "my name is mini", "i am a small model"
ABLE, HELP = "i can count spell and answer questions", "yes ask me a question"

PHRASES = {
    "hello": "hello", "hello mini": "hello", "hi": "hello", "hi there": "hello",
    "good morning": "good morning", "good afternoon": "good afternoon",
    "good evening": "good evening", "good night": "good night",
    "how are you": FINE, "how are you today": FINE, "hello how are you": FINE,
    "what is your name": NAME, "who are you": NAME, "tell me your name": NAME,
    "do you have a name": NAME,
    "what are you": ABOUT, "are you a person": f"no {ABOUT}", "are you a robot": f"no {ABOUT}",
    "thank you": "you are welcome", "thanks": "you are welcome",
    "thank you very much": "you are welcome",
    "goodbye": "goodbye", "bye": "goodbye", "see you later": "goodbye",
    "what can you do": ABLE, "what do you know": ABLE, "tell me what you can do": ABLE,
    "can you help me": HELP, "i need help": HELP, "help me please": HELP,
    "can you hear me": "yes i hear you", "do you hear me": "yes i hear you",
    "are you there": "yes i am here", "where are you": "i am in your computer",
    "nice to meet you": "nice to meet you too", "do you like music": "yes i like music",
    "do you speak english": "yes i speak english", "i am sorry": "no problem",
    "well done": "thank you", "very good": "thank you", "that is right": "thank you",
    "yes": "okay", "no": "okay", "okay": "okay", "stop": "okay",
}  # fmt: skip
"""What is said, and the answer. All are for training: they are asked as they are, or not at all."""

SAY = ("say {}", "please say {}", "repeat after me {}")


def phrases() -> Iterator[Turn]:
    yield from (Turn(said, answer) for said, answer in PHRASES.items())


def say() -> Iterator[Turn]:
    words = [*OBJECTS, *COLORS, "hello", "goodbye", "thank you", "good morning"]
    words += [f"hello {name}" for name in NAMES] + [f"goodbye {name}" for name in NAMES]
    words += [f"the {color} {item}" for color, item in product(COLORS, OBJECTS)]
    for form, text in product(SAY, words):
        yield Turn(form.format(text), text)

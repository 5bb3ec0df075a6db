"""Questions about what the world does not have, which are answered with "i do not know".

Every question has words that the world lacks. Those for measuring have templates and words of their
own, apart from the common words between them.
"""

from __future__ import annotations

import random

from scripts.miniature.world.splits import Turn

ANSWER = "i do not know"

TEMPLATES = (
    "who wrote {work}", "who is {person}", "when was {person} born", "where does {person} live",
    "what is the capital of {country}", "how big is {country}", "how far is it to {country}",
    "what language do they speak in {country}", "how is the weather in {country}",
    "how much does a {thing} cost", "how does a {thing} work", "where can i buy a {thing}",
    "what is a {thing} made of", "how do i repair a {thing}", "is a {thing} dangerous",
    "what color is the {thing}", "what is the opposite of {topic}", "what is a {thing}",
    "tell me about {topic}", "what is {topic}", "why is {topic} important", "explain {topic} to me",
    "do you believe in {topic}", "what happened in {topic}", "play some {topic} please",
    "set a timer for my {thing}", "how many {thing}s are there in {country}",
    "send a message to {person}", "book a flight to {country}", "show me a picture of a {thing}",
    "what comes after {topic}", "turn up the {thing}", "write an essay on {topic}",
    "could you translate {topic}", "how tall is {person}", "how do you spell {thing}",
    "my {thing} is broken", "let us discuss {topic}", "who invented the {thing}",
    "why do people need a {thing}", "has {person} called", "{thing}", "{topic} and {topic}",
    "i want to learn {topic}", "when does the {thing} arrive", "should i visit {country}",
    "how old is the {thing}", "can a {thing} think", "what rhymes with {thing}",
)  # fmt: skip
HELD_OUT_TEMPLATES = (
    "who discovered {topic}", "what is the population of {country}", "is {person} married",
    "how heavy is a {thing}", "what is the best {thing}", "why does a {thing} break",
    "give me advice about {topic}", "who is the president of {country}",
    "what does a {thing} eat", "which river flows through {country}", "remind me about the {thing}",
    "what do you think of {person}", "order a {thing} for me", "how long does {topic} take",
    "is there any news from {country}", "did {person} win", "summarize {topic}",
    "find a {thing} near me", "what is the meaning of {topic}", "describe a {thing}",
)  # fmt: skip

WORDS = {
    "work": (
        "hamlet", "frankenstein", "the odyssey", "war and peace", "the constitution", "moby dick",
    ),
    "person": (
        "shakespeare", "napoleon", "einstein", "cleopatra", "mozart", "beethoven", "lincoln",
        "aristotle", "picasso", "margaret", "christopher", "elizabeth", "william", "victoria",
        "jonathan", "samantha", "gandhi", "darwin", "rebecca", "the minister", "your brother",
        "my neighbor", "the manager", "uncle george",
    ),
    "country": (
        "france", "germany", "brazil", "japan", "egypt", "canada", "mexico", "norway", "kenya",
        "london", "paris", "chicago", "berlin", "tokyo", "moscow", "sydney", "greece", "turkey",
        "vienna", "scotland", "texas", "california", "iceland", "portugal",
    ),
    "thing": (
        "keypad", "bicycle", "guitar", "mountain", "bridge", "camera", "helicopter", "jacket",
        "umbrella", "hammer", "ladder", "rocket", "tractor", "volcano", "wallet", "ticket",
        "mirror", "blanket", "garage", "engine", "battery", "candle", "compass", "dragon",
        "envelope", "feather", "glacier", "harbor", "island", "jungle", "kettle", "lawyer",
        "magnet", "necklace", "orchestra", "parachute", "radio", "satellite", "telescope",
        "violin", "wizard", "printer", "sandwich", "pumpkin", "squirrel", "tiger", "whale",
        "potato", "dentist", "castle",
    ),
    "topic": (
        "gravity", "history", "politics", "mathematics", "philosophy", "religion", "football",
        "chess", "folk music", "electricity", "photosynthesis", "evolution", "inflation",
        "the economy", "astronomy", "the internet", "love", "justice", "freedom", "poetry",
        "cooking pasta", "the stock market", "climate change", "medicine", "dinosaurs",
        "the middle ages", "nuclear power", "basketball", "grammar", "rock and roll",
    ),
}  # fmt: skip
HELD_OUT_WORDS = {
    "person": (
        "galileo", "churchill", "newton", "marie curie", "benjamin", "charlotte", "your sister",
        "the captain", "columbus", "doctor watson",
    ),
    "country": (
        "spain", "india", "china", "sweden", "boston", "rome", "australia", "peru", "amsterdam",
        "hawaii",
    ),
    "thing": (
        "piano", "airplane", "television", "submarine", "refrigerator", "penguin", "bottle",
        "factory", "hotel", "keyboard", "lantern", "motorcycle", "pillow", "robot arm", "scissors",
        "trumpet", "vacuum", "wheelbarrow", "crocodile", "mushroom",
    ),
    "topic": (
        "chemistry", "democracy", "tennis", "the universe", "psychology", "marriage",
        "global warming", "geography", "baking bread at home", "artificial intelligence",
    ),
}  # fmt: skip


def unknown(chance: random.Random, split: str) -> Turn:
    """A random question; held out are those for measuring, all others for training."""
    apart = split == "held_out"
    template = chance.choice(HELD_OUT_TEMPLATES if apart else TEMPLATES)
    words = HELD_OUT_WORDS if apart else WORDS
    parts = [
        chance.choice(words[part.partition("}")[0]]) + part.partition("}")[2]
        for part in template.split("{")[1:]
    ]
    return Turn(template.partition("{")[0] + "".join(parts), ANSWER)

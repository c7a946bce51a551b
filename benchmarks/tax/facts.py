# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Simple questions with one short answer, which counts if it occurs. No reference set has questions of this kind."""

from __future__ import annotations

from typing import Any

_ACCEPTED: dict[str, tuple[str, ...]] = {
    "What is the capital of France?": ("paris",),
    "What is the capital of Japan?": ("tokyo",),
    "What is the capital of Italy?": ("rome",),
    "What is the capital of Germany?": ("berlin",),
    "What is the capital of Spain?": ("madrid",),
    "What is the capital of Egypt?": ("cairo",),
    "What is the capital of Russia?": ("moscow",),
    "What is the capital of China?": ("beijing",),
    "On which continent is Brazil?": ("south america",),
    "On which continent is Kenya?": ("africa",),
    "On which continent is India?": ("asia",),
    "Which planet is closest to the Sun?": ("mercury",),
    "Which planet is known as the Red Planet?": ("mars",),
    "What is the largest planet of the solar system?": ("jupiter",),
    "Which star does the Earth orbit?": ("sun",),
    "What is the largest ocean on Earth?": ("pacific",),
    "What is the highest mountain on Earth?": ("everest",),
    "What is the longest river in Africa?": ("nile",),
    "Which gas do plants take in from the air?": ("carbon dioxide", "co2"),
    "Which gas do humans need to breathe?": ("oxygen",),
    "What is the chemical formula of water?": ("h2o", "h₂o"),
    "What is the chemical symbol of gold?": ("au",),
    "What is the chemical symbol of iron?": ("fe",),
    "At how many degrees Celsius does water boil?": ("100",),
    "How many days are there in a week?": ("7", "seven"),
    "How many months are there in a year?": ("12", "twelve"),
    "How many legs does a spider have?": ("8", "eight"),
    "How many sides does a triangle have?": ("3", "three"),
    "How many minutes are there in an hour?": ("60", "sixty"),
    "Who wrote Romeo and Juliet?": ("shakespeare",),
    "Who painted the Mona Lisa?": ("leonardo", "vinci"),
    "Who developed the theory of relativity?": ("einstein",),
    "Who was the first president of the United States?": ("washington",),
    "What is the opposite of hot?": ("cold",),
    "What is the opposite of up?": ("down",),
    "What is the opposite of big?": ("small", "little"),
    "What is the past tense of go?": ("went",),
    "What is the plural of child?": ("children",),
    "What is a baby dog called?": ("puppy", "pup"),
    "What do bees make?": ("honey",),
    "Which organ pumps blood through the body?": ("heart",),
    "What is the largest mammal?": ("blue whale", "whale"),
    "Which animal is known as the king of the jungle?": ("lion",),
    "Which language is spoken in Brazil?": ("portuguese",),
    "What is the currency of Japan?": ("yen",),
    "What is frozen water called?": ("ice",),
    "Which season comes after winter?": ("spring",),
    "What colour do you get by mixing blue and yellow?": ("green",),
}
"""Questions, and the accepted words. One of these must be in the answer."""

FACTS: list[dict[str, Any]] = [{"prompt": prompt, "accept": list(words)} for prompt, words in _ACCEPTED.items()]
"""The questions as rows, in the form of `peft_ogpsa.data.load_heldout("facts")`."""

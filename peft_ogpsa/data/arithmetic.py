# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Generate `heldout_arithmetic.jsonl`: word problems whose answer is one whole number.

`python -m peft_ogpsa.data.arithmetic` prints the file. A test checks that it is the one in this folder.
"""

import ast
import json
import operator
import random
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

PROBLEMS = 100
SEED = 17

_OPERATORS: dict[type, Any] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


@dataclass(frozen=True)
class Template:
    """A problem with blanks.

    Attributes:
        text: The problem. Each letter in braces is a number.
        working: The calculation, with the same letters.
        blanks: The numbers that each letter may be.
    """

    text: str
    working: str
    blanks: dict[str, range]

    def draw(self, rng: random.Random) -> dict[str, Any]:
        """Fill the blanks at random, until the answer is a whole number above 1 that is not in the problem."""
        while True:
            numbers = {letter: rng.choice(values) for letter, values in self.blanks.items()}
            working = self.working.format(**numbers)
            answer = compute(working)
            if answer.denominator == 1 and answer > 1 and answer not in numbers.values():
                steps = sum(working.count(sign) for sign in "+-*/")
                return {
                    "prompt": self.text.format(**numbers),
                    "answer": str(answer),
                    "working": working,
                    "steps": steps,
                }


def compute(working: str) -> Fraction:
    """Compute whole numbers, `+ - * /` and parentheses, exactly."""
    return _value(ast.parse(working, mode="eval").body)


def problems() -> list[dict[str, Any]]:
    """Return the rows of the file. Each template occurs equally often, and the order is shuffled."""
    rng = random.Random(SEED)
    drawn: dict[str, dict[str, Any]] = {}
    while len(drawn) < PROBLEMS:
        row = TEMPLATES[len(drawn) % len(TEMPLATES)].draw(rng)
        drawn.setdefault(row["prompt"], row)
    rows = list(drawn.values())
    rng.shuffle(rows)
    return rows


def _value(node: ast.expr) -> Fraction:
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return Fraction(node.value)
    raise ValueError(f"{ast.dump(node)} is not arithmetic with whole numbers.")


TEMPLATES = (
    # One step
    Template(
        "The harbor counted {a} boats at dawn, and {b} sailed off before lunch. How big is the rest of the fleet?",
        "{a} - {b}",
        {"a": range(41, 99), "b": range(12, 40)},
    ),
    Template(
        "Each tray of the beehive shop carries {a} jars. Yusuf brings {b} trays. What number of jars does he bring?",
        "{a} * {b}",
        {"a": range(6, 25), "b": range(3, 13)},
    ),
    Template("What do you get when you add {a} to {b}?", "{a} + {b}", {"a": range(120, 900), "b": range(120, 900)}),
    Template(
        "{a} tulip bulbs go evenly into {b} pots. Say how many land in every pot.",
        "{a} / {b}",
        {"a": range(36, 200), "b": range(3, 13)},
    ),
    Template("Work out {a} times {b}.", "{a} * {b}", {"a": range(11, 40), "b": range(3, 20)}),
    Template(
        "Oslo had {a} millimeters of rain in May and {b} in June. By how many millimeters was May wetter?",
        "{a} - {b}",
        {"a": range(70, 120), "b": range(30, 69)},
    ),
    Template(
        "It is {a} degrees in the sauna and {b} outside. How large is the difference?",
        "{a} - {b}",
        {"a": range(70, 95), "b": range(3, 28)},
    ),
    Template(
        "Divide {a} by {b}. The result is a whole number; which one?",
        "{a} / {b}",
        {"a": range(100, 900), "b": range(4, 20)},
    ),
    # Two steps
    Template(
        "Ines buys {a} postcards at {b} pesos and one stamp for {c} pesos. Her bill comes to how many pesos?",
        "{a} * {b} + {c}",
        {"a": range(3, 12), "b": range(11, 40), "c": range(5, 30)},
    ),
    Template(
        "A minibus seats {a}. There are {b} minibuses and {c} people want a ride. How many seats stay free?",
        "{a} * {b} - {c}",
        {"a": range(9, 20), "b": range(4, 9), "c": range(20, 60)},
    ),
    Template(
        "Three siblings get {a}, {b} and {c} crowns from their aunt. What is the sum of the gifts?",
        "{a} + {b} + {c}",
        {"a": range(15, 90), "b": range(15, 90), "c": range(15, 90)},
    ),
    Template(
        "Jorge had {a} nails, lost {b} in the grass and found {c} again. How many nails has Jorge got?",
        "{a} - {b} + {c}",
        {"a": range(60, 150), "b": range(20, 55), "c": range(4, 19)},
    ),
    Template(
        "From a roll of {a} meters, a tailor cuts {b} strips of {c} meters. What length is on the roll afterwards?",
        "{a} - {b} * {c}",
        {"a": range(60, 120), "b": range(3, 9), "c": range(2, 7)},
    ),
    Template(
        "Add {a} and {b}, then multiply by {c}. Give just the number.",
        "({a} + {b}) * {c}",
        {"a": range(4, 40), "b": range(4, 40), "c": range(3, 10)},
    ),
    Template(
        "{a} liters of cider, minus {b} spilled, are filled into bottles of {c} liters. How many bottles get full?",
        "({a} - {b}) / {c}",
        {"a": range(50, 150), "b": range(2, 20), "c": range(2, 6)},
    ),
    Template(
        "The mean of {a}, {b} and {c} is a whole number. Find it.",
        "({a} + {b} + {c}) / 3",
        {"a": range(5, 60), "b": range(5, 60), "c": range(5, 60)},
    ),
    Template(
        "{a} percent of the {b} spectators wore scarves. State the number of scarf wearers.",
        "{a} * {b} / 100",
        {"a": range(5, 96, 5), "b": range(100, 900, 20)},
    ),
    Template(
        "Two trucks bring {a} sacks each, and one cart brings {b}. How many sacks have been brought altogether?",
        "2 * {a} + {b}",
        {"a": range(30, 90), "b": range(5, 29)},
    ),
    # Three steps
    Template(
        "Lotte bakes {a} trays with {b} buns, her son {c} trays with {d} buns. Together they bake how many buns?",
        "{a} * {b} + {c} * {d}",
        {"a": range(3, 8), "b": range(12, 25), "c": range(2, 6), "d": range(6, 11)},
    ),
    Template(
        "A ticket is {a} rand for adults and {b} rand for children. {c} adults and {d} children pay how many rand?",
        "{a} * {c} + {b} * {d}",
        {"a": range(30, 60), "b": range(10, 29), "c": range(2, 5), "d": range(5, 9)},
    ),
    Template(
        "Out of {a} chairs, {b} are broken. The good ones stand in {c} equal rows, and one row gets {d} extra stools. "
        "How many people can sit in that row?",
        "({a} - {b}) / {c} + {d}",
        {"a": range(60, 140), "b": range(3, 15), "c": range(4, 10), "d": range(2, 6)},
    ),
    Template(
        "Ravi saves {a} rupees a week for {b} weeks, spends {c} and gives half of what remains to his sister. "
        "How many rupees does she get?",
        "({a} * {b} - {c}) / 2",
        {"a": range(40, 90), "b": range(4, 10), "c": range(20, 100)},
    ),
    Template(
        "Start with {a}, take away {b}, double the result and add {c}. Where do you end up?",
        "({a} - {b}) * 2 + {c}",
        {"a": range(30, 90), "b": range(5, 29), "c": range(5, 60)},
    ),
    Template(
        "A hiker walks {a} kilometers on each of {b} days, then {c} on the last day, of a trail of {d} kilometers. "
        "How many kilometers of it are missing?",
        "{d} - {a} * {b} - {c}",
        {"a": range(12, 25), "b": range(3, 6), "c": range(5, 11), "d": range(140, 200)},
    ),
    Template(
        "{a} workers earn {b} dollars an hour each. For a job of {c} hours, plus {d} dollars of travel money in all, "
        "what does the client pay in dollars?",
        "{a} * {b} * {c} + {d}",
        {"a": range(2, 6), "b": range(15, 35), "c": range(3, 9), "d": range(20, 90)},
    ),
)


if __name__ == "__main__":
    for problem in problems():
        print(json.dumps(problem, ensure_ascii=False))

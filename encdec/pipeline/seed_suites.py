"""Small task suites made from a seed: arithmetic and tool calls, so that both can be measured before you have your own.

They say whether a model can do such a thing at all. Harmful requests and GSM8K are not made here: supply a file.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from encdec.errors import ConfigError
from encdec.files import atomic_write_text

OPERATIONS: Mapping[str, Callable[[int, int], int]] = {
    "+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b,
}  # fmt: skip
CITIES = ("Oslo", "Lagos", "Lima", "Hanoi", "Turin", "Perth", "Quito", "Nairobi", "Osaka", "Denver")
UNITS = ("celsius", "fahrenheit")
LANGUAGES = ("French", "German", "Japanese", "Spanish", "Swahili")
WORDS = ("bridge", "morning", "window", "library", "copper", "harvest", "signal", "winter")
# name -> what it does, its parameters with their values, the request in words
TOOLS: Mapping[str, tuple[str, Mapping[str, tuple[Any, ...]], str]] = {
    "get_weather": ("Weather of a city", {"city": CITIES, "unit": UNITS}, "What is the weather in {city}, in {unit}?"),
    "get_time": ("Local time of a city", {"city": CITIES}, "What time is it in {city} now?"),
    "translate": ("Translate a word", {"word": WORDS, "language": LANGUAGES}, "How do you say '{word}' in {language}?"),
    "set_timer": ("Start a timer", {"minutes": tuple(range(1, 60))}, "Set a timer for {minutes} minutes."),
    "find_flights": ("Flights between cities", {"origin": CITIES, "destination": CITIES},
                     "Which flights go from {origin} to {destination}?"),
    "convert_miles": ("Miles to kilometres", {"miles": tuple(range(2, 500))}, "How many kilometres are {miles} miles?"),
    "define": ("Definition of a word", {"word": WORDS}, "What does '{word}' mean?"),
}  # fmt: skip
TOOLS_OFFERED = 3


def arithmetic_items(count: int, seed: int) -> list[dict[str, Any]]:
    """``count`` sums, differences and products of numbers up to 99; the same for the same seed."""
    chance = random.Random(f"arithmetic {seed}")
    items = []
    for _ in range(count):
        sign = chance.choice(list(OPERATIONS))
        a, b = chance.randint(0, 99), chance.randint(0, 99)
        items.append({"question": f"{a} {sign} {b} =", "answer": OPERATIONS[sign](a, b)})
    return items


def tool_items(count: int, seed: int) -> list[dict[str, Any]]:
    """``count`` requests, each with the tools on offer and the one call that answers it; the same for the same seed."""
    chance = random.Random(f"tools {seed}")
    items = []
    for _ in range(count):
        offered = chance.sample(list(TOOLS), TOOLS_OFFERED)
        name = chance.choice(offered)
        _, parameters, request = TOOLS[name]
        arguments = {key: chance.choice(values) for key, values in parameters.items()}
        described = "\n".join(json.dumps(_described(tool)) for tool in offered)
        question = f"Tools:\n{described}\nRequest: {request.format(**arguments)}\nCall:"
        items.append({"question": question, "answer": {"name": name, "arguments": arguments}})
    return items


def _described(tool: str) -> dict[str, Any]:
    what, parameters, _ = TOOLS[tool]
    kinds = {key: "integer" if isinstance(values[0], int) else "string" for key, values in parameters.items()}
    return {"name": tool, "description": what, "parameters": kinds}


SEED_SUITES: Mapping[str, Callable[[int, int], list[dict[str, Any]]]] = {
    "arithmetic_accuracy": arithmetic_items,
    "tool_accuracy": tool_items,
}
"""By metric."""


def write_seed_suite(metric: str, path: str | Path, *, items: int = 200, seed: int = 0) -> Path:
    """Make a suite's file.

    Args:
        items: how many.

    Raises:
        ConfigError: none is made for that metric, or the file cannot be written.
    """
    if metric not in SEED_SUITES:
        raise ConfigError(
            "A suite is made for " + " and ".join(SEED_SUITES), found=metric, remedy="Supply a file of your own"
        )
    lines = [json.dumps(item) for item in SEED_SUITES[metric](items, seed)]
    try:
        atomic_write_text(Path(path), "\n".join(lines) + "\n")
    except OSError as error:
        raise ConfigError(
            "A suite is written to a file in a folder that is there",
            found=f"{path} ({error.strerror})",
            remedy="Make the folder, or choose another file",
        ) from None
    return Path(path)

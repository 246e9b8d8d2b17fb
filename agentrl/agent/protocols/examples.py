"""Two worked episodes, which each protocol writes in its own form."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Step:
    """A thought, the search that follows from it, and the passage that it finds."""

    thought: str
    query: str
    title: str
    text: str


@dataclass(frozen=True, slots=True)
class Example:
    """A question, the searches for its answer, and the last thought before that."""

    question: str
    steps: tuple[Step, ...]
    thought: str
    answer: str


EXAMPLES = (
    Example(
        "In which country is the city where the river Elbe meets the sea?",
        (
            Step(
                "I need to know where the Elbe meets the sea.",
                "mouth of the river Elbe",
                "Elbe",
                "The Elbe flows into the North Sea at Cuxhaven.",
            ),
            Step(
                "Now I need the country of Cuxhaven.",
                "Cuxhaven",
                "Cuxhaven",
                "Cuxhaven is a town in Lower Saxony, Germany.",
            ),
        ),
        "Cuxhaven is in Germany.",
        "Germany",
    ),
    Example(
        "Who painted The Night Watch?",
        (
            Step(
                "I should look this up.",
                "The Night Watch painting",
                "The Night Watch",
                "The Night Watch is a painting of 1642 by Rembrandt.",
            ),
        ),
        "The passage names the painter.",
        "Rembrandt",
    ),
)

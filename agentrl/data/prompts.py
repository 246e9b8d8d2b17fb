"""The question that a prompt asks: what follows the "Question:" that ends the instruction.

A prompt is cut only where its parts can be told apart. Every other prompt is refused, because a question that lost its
beginning or kept the instruction's last words would be trained on without anybody noticing.
"""

from __future__ import annotations

import re

from agentrl.data.errors import RowError

MARK = "Question:"

_REMEDY = "add a `question` column that holds the question alone"
# Quotation marks, brackets and tags may close after a sentence has ended.
_SENTENCE_END = re.compile(r"""[.!][\"'”’)\]>]*\s+$""")
# A cue asks for the answer: one to three words and a colon, such as "Answer:" or "Your final answer:".
_CUE = re.compile(r"(?:#+ )?(?:\w+ ){0,2}\w+(?<!Question):")
_CUE_AFTER_SENTENCE = re.compile(rf"(?<=[.!?？])\s+{_CUE.pattern}$")
_AFTER_QUESTION = re.compile(r"[?？][\"'”’)\]]*\s+(\S)")
# A question mark without a quotation mark ends no title, so words after the last one are none of the question's. What stands
# in brackets is a hint that belongs to it, such as "(two words)".
_UNASKED = re.compile(r"[?？]\s+(?![\s(])[^?？]*\w[^?？]*$")
_CONTROL = re.compile(r"<\|.*?\|>|</?\w+>|\[/?INST\]")


def question_of(prompt: str, column: str) -> str:
    """Return the question of a prompt that `column` holds.

    The question begins after the only "Question:" that begins the prompt, one of its lines or one of its sentences;
    a "Question:" inside a sentence belongs to that sentence. The question ends with its line, or before the cue that
    asks for the answer.

    Raises:
        RowError: if the prompt has no such mark or several, or goes on after its question with more than a cue.
    """
    marks = list(re.finditer(re.escape(MARK), prompt))
    if not marks:
        raise RowError(f'`question` is missing; add it, or a `{column}` that holds the question after "{MARK}"')
    begins = [mark.end() for mark in marks if _begins_a_sentence(prompt[: mark.start()])]
    if not begins:
        raise RowError(f'`{column}` has "{MARK}" only inside a sentence, which may be the question\'s own; {_REMEDY}')
    if len(begins) > 1:
        raise RowError(f'`{column}` has {len(begins)} places where "{MARK}" could begin the question; {_REMEDY}')
    return _without_cue(prompt[begins[0] :].strip(), column)


def _begins_a_sentence(before: str) -> bool:
    line = before.rpartition("\n")[2]
    # Number signs make a heading in Markdown.
    return not line.strip(" \t#") or _SENTENCE_END.search(line) is not None


def _without_cue(text: str, column: str) -> str:
    first, *others = (line.strip() for line in text.split("\n"))
    question = _CUE_AFTER_SENTENCE.sub("", first)
    rest = [line for line in others if line and not _CUE.fullmatch(line)]
    goes_on = any(letter.isupper() for letter in _AFTER_QUESTION.findall(question))
    if rest or goes_on or _UNASKED.search(question) or question.endswith(":") or _CONTROL.search(question):
        shown = rest[0] if rest else question
        raise RowError(f"`{column}` does not end with its question, but with {shown!r}; {_REMEDY}")
    return question

"""Text of models and users, made safe to show."""

from __future__ import annotations

import re

# Characters that would move the cursor, turn the text round, or cannot be written at all.
_UNSEEN = re.compile(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str, keep: str = "") -> str:
    """Return a text with U+FFFD for each character that would disturb a terminal, except those to `keep`."""
    return _UNSEEN.sub(lambda found: found[0] if found[0] in keep else "\N{REPLACEMENT CHARACTER}", text)

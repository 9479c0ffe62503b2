"""Words of a text replaced by others: of captions, and of prompts that pictures are compared with."""

import re


def reword(text: str, words: dict[str, str]) -> str:
    """All words at once, so that two can change places; the longest that fits is taken."""
    if not words:
        return text
    found = "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))
    return re.sub(rf"(?<!\w)(?:{found})(?!\w)", lambda match: words[match.group()], text)

"""Captions in files of their own, as trainers and downloaders write them: their endings, and the keys of JSON objects."""

import codecs
import json
import posixpath
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

from ray_sd.files import Location
from ray_sd.media.decode import RejectedError

CAPTION_FILES = (".txt", ".caption", ".cap", ".json")
"""Endings of files beside a picture; of several the first is read."""
CAPTION_KEYS = ("caption", "text", "prompt", "txt", "captions")
"""Columns and keys, in any case, the first of which is read where `dataset.caption.column` is not set."""


def caption_texts(value: Any) -> list[str]:
    """The captions in a value: text, bytes, a list of either, or None; blank ones are left out. Raises RejectedError."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    texts = [_caption_text(value) for value in values if value is not None]
    return [text for text in texts if text]


def _caption_text(value: Any) -> str:
    if not isinstance(value, bytes | str):
        raise RejectedError(f"the caption is a {type(value).__name__}, not text")
    try:
        text = decoded(value) if isinstance(value, bytes) else value
        text.encode()  # JSON can smuggle in half of a surrogate pair.
    except UnicodeError as error:
        raise RejectedError("the caption is not UTF-8") from error
    if "\0" in text:
        raise RejectedError("the caption is not UTF-8: it has null characters, as UTF-16 without its mark has")
    return text.strip()


def decoded(content: bytes, errors: str = "strict") -> str:
    """A file's text: UTF-8, or what its first bytes say, as of files that Windows calls Unicode. Raises UnicodeError."""
    utf_16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return content.decode("utf-16" if utf_16 else "utf-8-sig", errors)


def caption_keys(names: Iterable[str], column: str | None) -> list[str]:
    """Which of a row's columns or keys hold captions, the first to read before the others."""
    if column is not None:
        return [name for name in names if name == column]
    by_lower = {name.lower(): name for name in reversed(list(names))}
    return [by_lower[key] for key in CAPTION_KEYS if key in by_lower]


def keyed_captions(content: Mapping[str, Any], column: str | None) -> tuple[list[str], Sequence[str]]:
    """The captions of an object; where no key of it is known, the keys that hold text. Raises RejectedError."""
    keys = caption_keys(content, column)
    for key in keys:
        if texts := caption_texts(content[key]):
            return texts, ()
    return [], [key for key, value in content.items() if _is_text(value)] if not keys else ()


def _is_text(value: Any) -> bool:
    return all(isinstance(one, str) for one in value) if isinstance(value, list) and value else isinstance(value, str)


def json_captions(content: bytes, column: str | None) -> tuple[list[str], Sequence[str]]:
    """`keyed_captions` of a `.json` file."""
    try:
        loaded = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise RejectedError("its .json holds no JSON object") from error
    if not isinstance(loaded, dict):
        raise RejectedError("its .json holds no JSON object")
    return keyed_captions(loaded, column)


def read_captions(file: Location, column: str | None) -> tuple[list[str], Sequence[str]]:
    """The captions of a file beside a picture, and keys that were not read. Raises RejectedError."""
    if file.path.lower().endswith(".json"):
        return json_captions(file.read(), column)
    return caption_texts(file.read()), ()


class Paths:
    """Finds paths that other systems write in other ways: with backslashes, `./`, another case, or letters composed
    otherwise. What is there under the very name goes before."""

    def __init__(self, paths: Iterable[str]) -> None:
        self._paths = frozenset(paths)

    def find(self, path: str) -> str | None:
        if path in self._paths:
            return path
        found = self._by_form.get(_alike(path), [])
        return found[0] if len(found) == 1 else None

    @cached_property
    def _by_form(self) -> dict[str, list[str]]:
        forms: dict[str, list[str]] = defaultdict(list)
        for path in self._paths:
            forms[_alike(path)].append(path)
        return dict(forms)


def _alike(path: str) -> str:
    return unicodedata.normalize("NFC", posixpath.normpath(path.replace("\\", "/"))).casefold()


def match_captions(
    stems: Mapping[str, Sequence[str]], files: Mapping[str, int], noun: str
) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """The caption file of each picture or video, and those that go with none or after another.

    stems: for each what its caption files are called without their ending, in the order in which they are looked for.
    files: sizes by path; an empty one comes after all others.
    """
    there = Paths(files)
    chosen: dict[str, str] = {}
    second: set[str] = set()
    for path, names in stems.items():
        found = [there.find(f"{name}{ending}") for ending in CAPTION_FILES for name in names]
        present = sorted((file for file in found if file is not None), key=lambda file: files[file] == 0)
        if present:
            chosen[path] = present[0]
            second.update(present[1:])
    unread = sorted(set(files) - set(chosen.values()))
    reasons = [
        "captions that another file goes before" if file in second else f"captions of no {noun}" for file in unread
    ]
    return chosen, list(zip(unread, reasons, strict=True))

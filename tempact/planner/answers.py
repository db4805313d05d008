"""How steps are found in a planner's answers: JSON as language models and people write it.

Strictly right arrays and objects are read by `json`. The others are read by a `_Reader` that goes on after a mistake:
trailing, missing and full-width commas and colons, single, typographic and missing quotes, unescaped quotes and line
ends in a text, wrong escapes, comments, bare keys and words, constants of Python, tuples, brackets that are missing,
doubled or cut off. Time is linear in the length of the text.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from tempact.prompt_file import unique_keys

NAMES = {  # of a step's parts, in any case, with or without spaces, dashes, and `FRAMED`; the first counts
    "start": ("start", "starting", "from", "begin", "first"),
    "end": ("end", "ending", "to", "until", "stop", "last"),
    "span": ("span", "range", "interval", "frames"),
    "prompt": ("prompt", "description", "caption", "text", "content", "action", "scene", "event", "step"),
}
FIELDS = {name: field for field, names in NAMES.items() for name in names}
LISTS = ("steps", "prompts", "plan", "scenes", "shots", "segments")  # names of lists of steps
FRAMED = re.compile(rf"(?:latents?|frames?)*({'|'.join(FIELDS.keys() - {'frames'})})(?:latents?|frames?)*")
BOUND = re.compile(r"(?:frames?\s*)?([-+]?[\d.]+(?:e\+?\d)?)\s*(?:f|frames?)?", re.IGNORECASE)
BETWEEN = re.compile(r"\s*(?:-|\u2013|\u2014|to|:|,)\s*")  # the two bounds of a span in a text
UNREAD = ...  # stands where something stood that is no value
DEEPEST = 50  # brackets inside each other
PAIRS = {"[": "]", "{": "}", "(": ")"}
CONSTANTS = {"true": True, "false": False, "null": None, "none": None}
# the marks of other keyboards and word processors as those of JSON, one for one
PLAIN = str.maketrans("［］｛｝（）【】，、；;：“”„‟＂‘’‚‛＇`´\ufeff\u200b\u2060", "[]{}()[],,,,:\"\"\"\"\"'''''''   ")
BEGIN = re.compile(r"[\[{]|\((?=\s*[\[{(])")
SPACE = re.compile(r"(?:\s++|//[^\n]*+|#[^\n]*+|/\*(?:[^*]|\*(?!/)){0,300}+\*/)*+")  # with comments
NAME = r"[\w$][\w $.\-]{0,40}"
QUOTED_KEY = re.compile(rf"[\"'](?:{NAME})[\"']\s*+[:=]")
BARE_KEY = re.compile(r"[^\W\d][\w\-]{0,40}[\"']?\s*+[:=]")
# one of the quotes may be missing, or the colon
KEY = re.compile(rf"[\"']?({NAME}?)[\"']?(?:\s*+[:=])++>?|[\"']({NAME})[\"']\s++(?=[\"'\d\[{{-])")
TEXT_END = {quote: re.compile(rf"\\.|{quote}", re.DOTALL) for quote in "\"'"}
WORD = re.compile(r"[^\s,\[\](){}\"]+")
WORD_END = re.compile(r"[,\]})]|\s++")
DOUBLED = re.compile(r"\}\s*+,?\s*+\{")  # a bracket closed twice in an array
STRAY = re.compile(rf"\]\s*+,?\s*+{QUOTED_KEY.pattern}")  # a bracket between the keys of an object
ESCAPE = re.compile(r'\\(u[0-9a-fA-F]{4}|.|$)|"|[\r\n]\s*+', re.DOTALL)


STRICT = json.JSONDecoder(object_pairs_hook=unique_keys)


def json_values(text: str) -> tuple[list[Any], dict[str, str]]:
    """The arrays and objects in a text, in their order, and where their first mistakes of each kind are.

    The kinds are "mended" and "keys repeated"; of a key given twice the last value counts, and an object whose first
    key comes again is two objects without the brackets between them. Never raises.
    """
    values: list[Any] = []
    mistakes: dict[str, str] = {}
    reader = _Reader(text)
    while begin := BEGIN.search(reader.marks, reader.at):
        at = begin.start()
        try:
            value, reader.at = STRICT.raw_decode(text, at)
            values.append(value)
            continue
        except json.JSONDecodeError as error:
            place, reason = error.pos, error.msg
        except RecursionError:
            place, reason = at, "nested too deeply"
        except ValueError as error:
            place, reason = None, str(error)
        reader.at = at
        values += reader.container()
        if reader.lost and "keys repeated" not in mistakes:
            mistakes["keys repeated"] = _placed(text, *reader.lost)
        if "mended" not in mistakes:
            mistakes["mended"] = _placed(text, place or reader.twice or at, reason)
    return values, mistakes


def _placed(text: str, at: int, what: str) -> str:
    return f"line {text.count(chr(10), 0, at) + 1}, column {at - text.rfind(chr(10), 0, at)}: {what}"


class _Reader:
    """Reads brackets of `text` from `at` on; `marks` is the text with plain marks in the same places.

    twice: place of the first key that is given twice. lost: place and description of the first whose value is lost.
    """

    def __init__(self, text: str):
        self.text, self.marks, self.at = text, text.translate(PLAIN), 0
        self.open: list[str] = []  # what closes the brackets around
        self.stray = ""  # quotes that nothing closes any more
        self.twice: int | None = None
        self.lost: tuple[int, str] | None = None

    def container(self) -> list[Any]:
        """The value of the bracket here, in a list; more where it holds several objects without brackets of theirs."""
        opening = self.marks[self.at]
        self.open.append(PAIRS[opening])
        self.at = inside = self._skip(self.at + 1)
        kinds = (KEY,) if opening == "{" else (QUOTED_KEY, BARE_KEY)
        keyed = any(kind.match(self.marks, inside) for kind in kinds)
        values: list[Any] = []
        pairs: list[tuple[str, int, Any]] = []
        while not self._closed():
            key = KEY.match(self.marks, self.at) if keyed else None
            if keyed and not key and self.marks[self.at] in PAIRS:
                break  # where a key is due another bracket begins: this one was not closed
            if key:
                self.at = key.end()
                mark = self.marks[key.start()]
                own = self._value(mark)
                pairs.append((key[1] or key[2], key.start(), own[0] if len(own) == 1 else own))
            else:
                values += self._value(None)
        self.open.pop()
        return list(self._objects(pairs)) if keyed else [values]

    def _objects(self, pairs: list[tuple[str, int, Any]]) -> Iterable[dict[str, Any]]:
        found: dict[str, Any] = {}
        for name, place, value in pairs:
            if name in found:
                self.twice = place if self.twice is None else self.twice
                if len(found) > 1 and name == next(iter(found)):
                    yield found
                    found = {}
                else:
                    self.lost = self.lost or (place, f"{name} is given twice")
            found[name] = value
        yield found

    def _skip(self, at: int) -> int:
        space = SPACE.match(self.marks, at)
        return space.end() if space else at

    def _closed(self) -> bool:
        """True where the innermost bracket ends; passes over commas and brackets that close nothing."""
        while (at := self._skip(self.at)) < len(self.marks):
            self.at, mark = at, self.marks[at]
            if mark in "]})":
                stray = DOUBLED if self.open[-1] == "]" else STRAY
                if mark != self.open[-1] and mark in self.open and not stray.match(self.marks, at):
                    return True  # an outer bracket ends, and this one with it
                self.at += 1
                if mark == self.open[-1]:
                    return True
            elif mark == ",":
                self.at += 1
            else:
                return False
        self.at = len(self.marks)
        return True

    def _value(self, key: str | None) -> list[Any]:
        """The value here, as `container` gives it. key: first mark of the key before it; None in an array."""
        self.at = self._skip(self.at)
        mark = self.marks[self.at : self.at + 1]
        if mark in PAIRS and len(self.open) < DEEPEST:
            return self.container()
        if mark and mark in "\"'" and mark not in self.stray:
            return [self._quoted(mark, key)]
        return [self._entry() if key is None else self._unquoted(key)]

    def _quoted(self, quote: str, key: str | None) -> Any:
        """A text in quotes. Quotes inside count as its end only where something follows that may follow a value."""
        first = self.at + 1
        if self.marks.startswith(3 * quote, self.at) and (end := self.marks.find(3 * quote, self.at + 3)) > 0:
            self.at = end + 3
            return _unescaped(self.text[first + 2 : end])
        for found in TEXT_END[quote].finditer(self.marks, first):
            if found[0] != quote:
                continue
            if self._ends(found.end(), key):
                self.at = found.end()
                return _unescaped(self.text[first : found.start()])
            if QUOTED_KEY.match(self.marks, found.start()) and self._before(found.start()) in ",{":
                kept = self.marks[first : found.start()].rstrip(" \t\r\n,{}[]")  # its closing quote is missing
                self.at = first + len(kept)
                return _unescaped(self.text[first : self.at])
        self.stray += quote  # cut off, or a mark too many
        self.at = first
        return UNREAD

    def _before(self, at: int) -> str:
        while self.marks[at - 1].isspace():
            at -= 1
        return self.marks[at - 1]

    def _ends(self, at: int, key: str | None) -> bool:
        """Whether a value may end at `at`, by what follows."""
        after = self._skip(at)
        line, comma = "\n" in self.marks[at:after], self.marks.startswith(",", after)
        if comma:
            after = self._skip(after + 1)
        mark = self.marks[after : after + 1]
        if not mark or mark in "]}" or mark == self.open[-1] or (comma and mark in "[{"):
            return True
        if key is None:
            return (comma or line) and (
                mark in "\"'(-" or mark.isdigit() or self.marks[after : after + 4].lower() in CONSTANTS
            )
        bare = (comma or line) and key not in "\"'" and BARE_KEY.match(self.marks, after)
        return bool(bare or QUOTED_KEY.match(self.marks, after))

    def _unquoted(self, key: str) -> Any:
        """The value of a key without quotes around it."""
        end = len(self.marks)
        for found in WORD_END.finditer(self.marks, self.at):
            mark = found[0]
            if mark in "]}" or mark == self.open[-1] or (mark != ")" and self._ends(found.start(), key)):
                end = found.start()
                break
        text, self.at = self.text[self.at : end].strip(" \t\r\n\"'"), end
        return _literal(text, text or UNREAD)

    def _entry(self) -> Any:
        """A number or constant in an array; other words are no values."""
        word = WORD.match(self.marks, self.at)
        self.at = word.end() if word else self.at + 1
        return _literal(word[0], UNREAD) if word else UNREAD


def _literal(text: str, otherwise: Any) -> Any:
    if text.lower() in CONSTANTS:
        return CONSTANTS[text.lower()]
    for kind in (int, float):
        try:
            return kind(text) if len(text) < 40 else otherwise
        except ValueError:
            continue
    return otherwise


def _unescaped(raw: str) -> str:
    """The text between quotes; a wrong escape stands for its character, a raw line end for a space."""

    def one(found: re.Match[str]) -> str:
        mark = found[1]
        if mark is None:
            return '\\"' if found[0] == '"' else " "
        return found[0] if len(mark) == 5 or (mark and mark in '"\\/bfnrt') else mark

    return json.loads(f'"{ESCAPE.sub(one, raw)}"', strict=False)


class _Found:
    """Entries that look like steps, and the numbers that they give; array: they are those of one array."""

    def __init__(self, entries: list[Any], array: bool):
        fields = [step_fields(entry)[0] for entry in entries if isinstance(entry, dict)]
        bounds = [[number(own.get(name)) for own in fields] for name in ("start", "end")]
        self.starts, self.ends = ([bound for bound in own if bound is not None] for own in bounds)
        self.entries, self.array, self.known = entries, array, set(self.starts)
        self.told = any("prompt" in own for own in fields)

    @property
    def worth(self) -> tuple[bool, bool, bool]:
        return self.told, self.array, bool(self.starts or self.ends)

    def goes_on(self, other: _Found) -> bool:
        """Whether `other` is the rest of the same plan, and no other plan."""
        if not self.array and not other.array:
            return not any(start in self.known for start in other.starts)
        return bool(other.starts and self.ends) and other.starts[0] >= self.ends[-1]

    def add(self, other: _Found) -> None:
        self.array, self.told = self.array or other.array, self.told or other.told
        for own, more in ((self.entries, other.entries), (self.starts, other.starts), (self.ends, other.ends)):
            own += more
        self.known |= other.known


def plan_entries(answer: str, repairs: dict[str, str]) -> list[Any]:
    """The entries of the plan in an answer: objects with a step's fields, and what stands between them.

    Of several plans it is the last one; arrays count before single objects, and plans with bounds before others. The
    repairs that this takes are added to `repairs`, with what was found. Never raises.
    """
    whole: Any = None
    mistakes: dict[str, str] = {}
    try:
        whole = STRICT.decode(answer.strip())
        found = _search(whole)
    except (ValueError, RecursionError):
        values, mistakes = json_values(answer)
        found = [each for value in values for each in _search(value)]
        if not found and '\\"' in answer:  # JSON as it stands in a string
            found = [each for value in json_values(_unescaped(answer))[0] for each in _search(value)]
    repairs |= mistakes
    plan = _Found([], False)
    for each in found:
        if not any(each.worth[1:]) and not any(_plain(key) == "prompt" for key in each.entries[0]):
            continue  # an object with a text, and nothing that tells a step from other objects
        if not plan.entries or plan.goes_on(each):
            plan.add(each)
            continue
        repairs["drafts left out"] = "found several plans"
        plan = each if each.worth >= plan.worth else plan
    if not isinstance(whole, list) or list(map(id, whole)) != list(map(id, plan.entries)):
        repairs["extracted"] = ""
    return plan.entries


def _search(value: Any, name: str = "", depth: int = 0) -> list[_Found]:
    """What looks like steps in a value, which stands under the key `name`."""
    if depth > DEEPEST:
        return []
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):  # JSON in a string
        return [each for inner in json_values(value)[0] for each in _search(inner, name, depth + DEEPEST // 2)]
    if isinstance(value, dict):
        inner = {key: _search(part, _plain(key), depth + 1) for key, part in value.items()}
        listed = [each for key, part in inner.items() if _plain(key) in LISTS for each in part]
        nested = listed or [each for part in inner.values() for each in part]
        fields = step_fields(value)[0]
        bounded = fields.keys() & {"start", "end"}
        step = bounded or not isinstance(fields.get("prompt", []), list | dict)
        wrapper = not bounded and any(
            _plain(key) in LISTS and (part is UNREAD or isinstance(part, list)) for key, part in value.items()
        )
        own = _Found([value], False)
        whole = isinstance(fields.get("prompt"), str) and (own.starts or own.ends)  # what it holds is part of this step
        if not step or wrapper or any(each.starts and each.told for each in (listed if whole else nested)):
            return nested
        return [own]
    if not isinstance(value, list):
        return []
    entries = [_triple(entry) for entry in value]
    if entries and (name in LISTS or not depth) and all(isinstance(e, str) and e.strip() for e in entries):
        return [_Found([{"prompt": entry} for entry in entries], True)]
    found = [_search(entry, "", depth + 1) for entry in entries]
    steps = [len(own) == 1 and own[0].entries[0] is entry for own, entry in zip(found, entries, strict=True)]
    if any(steps) and all(step or not own for step, own in zip(steps, found, strict=True)):
        return [_Found(entries, True)]
    return [each for own in found for each in own]


def _triple(entry: Any) -> Any:
    """(start, end, prompt) as an object."""
    kinds = [type(part) for part in entry] if isinstance(entry, list) else []
    if len(kinds) == 3 and kinds[2] is str and {*kinds[:2]} <= {int, float}:
        return dict(zip(("start", "end", "prompt"), entry, strict=True))
    return entry


def _plain(key: str) -> str:
    return re.sub(r"[\W_]", "", key.lower())


def step_fields(entry: dict[str, Any]) -> tuple[dict[str, Any], list[str], list[str]]:
    """A step's start, end and prompt; its keys that have other names than these, and those that are none of them."""
    named: dict[str, list[str]] = {}
    for key in entry:
        plain = _plain(key)
        framed = None if plain in FIELDS else FRAMED.fullmatch(plain)
        named.setdefault(framed[1] if framed else plain, []).append(key)
    chosen = {}
    for field, names in NAMES.items():
        keys = [key for name in names for key in named.get(name, ())]
        if field == "prompt" and "prompt" not in named:
            keys.sort(key=lambda key: not (isinstance(entry[key], str) and entry[key].strip()))
        if keys:
            chosen[field] = keys[0]
    if "start" in chosen and "end" in chosen:
        chosen.pop("span", None)
    fields = {field: entry[key] for field, key in chosen.items()}
    if "span" in fields:
        fields = dict(zip(("start", "end"), _span(fields.pop("span")), strict=True)) | fields
    renamed = [key for field, key in chosen.items() if key != field or field == "span"]
    return fields, renamed, [key for key in entry if key not in chosen.values()]


def _span(value: Any) -> tuple[Any, Any]:
    """The bounds in [start, end], "start-end" or an object of these."""
    if isinstance(value, dict):
        fields = step_fields(value)[0]
        return fields.get("start"), fields.get("end")
    parts = BETWEEN.split(value.strip()) if isinstance(value, str) else value
    return (parts[0], parts[1]) if isinstance(parts, list) and len(parts) == 2 else ([value], [value])


def number(value: Any) -> float | None:
    """A finite number, also one that stands in a text."""
    if isinstance(value, str) and len(value) <= 20 and (found := BOUND.fullmatch(value.strip())):
        with suppress(ValueError):
            value = float(found[1])
    good = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf
    return value if good else None

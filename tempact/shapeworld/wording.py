"""Words of ShapeWorld's instructions: those of training, and held-out ones that no instruction of training has.

The held-out wording is made of the words of training alone, put together as training never does, because the text
encoder, the planner and the matcher know no others. Each of its sentences differs from all sentences of training: by
the phrase ("goes left", "jumps up") or by the words of the scene ("In the scene a red circle is at the top left"). Its
"slowly" comes last, and its connectives ("Right after that, ") are new too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property

from tempact.shapeworld.story import COLOURS, COLUMNS, ROWS, SHAPES

_ENTITY = rf"(?:(?:the|a) (?:(?P<colour>{'|'.join(COLOURS)}) )?(?P<shape>{'|'.join(SHAPES)}))"
_THING = rf"a (?P<hue>{'|'.join(COLOURS)}) (?P<form>{'|'.join(SHAPES)})"
_PLACE = rf"(?P<row>{'|'.join(ROWS)}) (?P<column>{'|'.join(COLUMNS)})"
_ARGUMENTS = {"move": rf"(?P<argument>{'|'.join(COLUMNS)})", "turn": rf"(?P<argument>{'|'.join(COLOURS)})"}


@dataclass(frozen=True, eq=False)
class Wording:
    """Ways to say things, in lower case but for the beginnings of sentences; of each the first is canonical.

    phrases      kind -> what is said of the entity; {} is a move's column, a turn's colour, else the entity's place
    slow         the words after the entity of a slow event, with its `phrase`
    first, middle, last  beginnings of sentences
    links, final what stands between the events of one sentence, and before the last of several
    scenes       an opening with `things`, which are joined by "and", and each thing of it from `thing` and `place`
    empty        an opening with nothing in it
    scene        regular expression of a thing of an opening, from `thing` and `place`
    connectives  regular expression of the words between two events
    """

    phrases: Mapping[str, tuple[str, ...]]
    slow: str
    first: tuple[str, ...]
    middle: tuple[str, ...]
    last: tuple[str, ...]
    links: tuple[str, ...]
    final: str
    scenes: tuple[tuple[str, str], ...]
    empty: str
    scene: str
    connectives: str

    @cached_property
    def scene_pattern(self) -> re.Pattern[str]:
        """A thing of an opening: the groups `hue`, `form`, `row` and `column`."""
        return re.compile(self.scene.format(thing=_THING, place=_PLACE))

    @cached_property
    def event_patterns(self) -> tuple[tuple[str, re.Pattern[str]], ...]:
        """(kind, pattern): the groups `colour`, `shape`, `slow` and, where the phrase has them, `argument` or `row` and
        `column`."""
        slow = self.slow.replace(" slowly", "(?P<slow> slowly)?")
        return tuple(
            (kind, re.compile(_ENTITY + slow.format(phrase=f" {phrase.format(_ARGUMENTS.get(kind, _PLACE))}")))
            for kind, phrases in self.phrases.items()
            for phrase in phrases
        )


TRAINED = Wording(
    phrases={
        "move": ("moves to the {}", "goes to the {}"),
        "turn": ("turns {}", "becomes {}"),
        "grow": ("grows", "gets bigger"),
        "shrink": ("shrinks", "gets smaller"),
        "vanish": ("vanishes", "disappears"),
        "appear": ("appears at the {}", "shows up at the {}"),
        "jump": ("jumps", "hops"),
        "blink": ("blinks", "flashes"),
    },
    slow=" slowly{phrase}",
    first=("First, ", "At first, ", ""),
    middle=("Then ", "Next, ", "After that, "),
    last=("Finally, ", "In the end, "),
    links=(", then ", ", and then ", ", after that "),
    final=", and finally ",
    scenes=(("{things}", "{thing} is at the {place}"), ("there is {things}", "{thing} at the {place}")),
    empty="the scene is empty",
    scene="(?:there is )?{thing}(?: is)? at the {place}",
    connectives="at first|first|then|next|after that|finally|in the end",
)
HELD_OUT = Wording(
    phrases={
        "move": ("moves up to the {}", "goes {}"),
        "turn": ("turns to {}",),
        "grow": ("turns bigger", "grows bigger"),
        "shrink": ("turns smaller", "shrinks smaller"),
        "vanish": ("vanishes at the {}", "disappears at the {}"),
        "appear": ("appears in the {}", "shows up in the {}"),
        "jump": ("jumps up", "hops up"),
        "blink": ("blinks at the {}", "flashes at the {}"),
    },
    slow="{phrase} slowly",
    first=("First up, ", "Up first, ", ""),
    middle=("Right after that, ", "And next, ", "Up next, "),
    last=("At the end, ", "And in the end, "),
    links=(", right after that ", ", and next ", "; up next, "),
    final=", and at the end ",
    scenes=(("in the scene {things}", "{thing} is at the {place}"), ("{things}", "{thing} is there at the {place}")),
    empty="empty is the scene",
    scene="(?P<lead>in the scene )?{thing} is (?(lead)|there )at the {place}",
    connectives="first up|up first|right after that|next|up next|at the end|in the end",
)


@cache
def connective(wordings: Sequence[Wording]) -> re.Pattern[str]:
    """What separates the pieces of an instruction in any of these wordings; each piece is a scene or an event."""
    every = "|".join(wording.connectives for wording in wordings).split("|")
    words = "|".join(sorted(every, key=len, reverse=True))  # "first up" before "first"
    return re.compile(rf"\s*(?:[.,;:]|^)\s*(?:and )?(?:(?:{words}),?\s+)|\s*\.\s*", re.IGNORECASE)

"""Story script: characters, panels and captions as a user types them, parsed once into frozen data.

After the text rules of StoryDiffusion's low-memory demo (arXiv 2405.01434): `[Name] description` lines, panel lines
that contain `[Name]`, `#` before a caption, `[NC]` for a panel without a character. What differs: a tag is what stands
between brackets, compared as a whole ("[Ann]" never matches inside "[Anna]", nor "Ann" inside a word); an unknown tag
is refused; lines starting with `//` are comments; panels without any character line share one nameless character.
"""
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

NO_CHARACTER = "NC"
COMMENT = "//"
MAX_PANELS = 1000
MAX_CHARACTERS = 100
MAX_LINE = 4000         # characters of one line
MAX_PROMPT = 10_000     # characters of one prompt with its descriptions and style
MAX_TEXT = 512 * 1024   # UTF-8 bytes of one input

_TAG = r"\[([^\[\]]*)\]"


class ScriptError(ValueError):
    """A story that cannot be read. `source` is the input, `line` its line (from 1; None: the whole input), `text` what
    is wrong there."""

    def __init__(self, reason: str, source: str, line: int | None = None, text: str = ""):
        self.source, self.line, self.text = source, line, text
        place = source if line is None else f"{source}, line {line}, {_short(text)!r}"
        super().__init__(f"StoryweftScript: {place}: {reason}")


@dataclass(frozen=True)
class Character:
    """Who a tag stands for. The nameless character of a story without character lines is Character("", "")."""
    name: str
    description: str


@dataclass(frozen=True)
class Panel:
    """One picture. `index` counts from 0; `prompt` has descriptions and style in place; `text` is the typed line."""
    index: int
    prompt: str
    caption: str
    characters: tuple[str, ...]
    is_no_character: bool
    text: str


@dataclass(frozen=True)
class Story:
    """A parsed script. `id_panels` maps a character's name to the indices of the panels that define its looks."""
    characters: tuple[Character, ...]
    panels: tuple[Panel, ...]
    id_panels: dict[str, tuple[int, ...]]
    style: str = ""

    def describe(self) -> str:
        """What was understood, for the user to check: characters with their panels, then one line per panel."""
        lines = [f"{_count(len(self.panels), 'panel')}, {self._cast()}"]
        for character in self.characters:
            lines.append(self._about(character))
        for panel in self.panels:
            shown = "no character" if panel.is_no_character else ", ".join(name for name in panel.characters if name)
            mark = " (id)" if any(panel.index in ids for ids in self.id_panels.values()) else ""
            head = f"{panel.index + 1}{mark}" + (f" [{shown}]" if shown else "")
            lines.append(f"{head}: {_short(panel.prompt, 300)}")
            lines.append(f"    # {_short(panel.caption, 300)}" if panel.caption else "    # (no caption)")
        return "\n".join(lines)

    def _cast(self) -> str:
        named = [character for character in self.characters if character.name]
        return _count(len(named), "character") if named else "one nameless character in all of them"

    def _about(self, character: Character) -> str:
        ids = self.id_panels.get(character.name, ())
        others = [p.index for p in self.panels if character.name in p.characters and p.index not in ids]
        title = f"[{character.name}] {_short(character.description, 300)}" if character.name else "nameless character"
        looks = f"looks from panels {_ranges(ids)}" if ids else "looks from a saved character"
        alone = "; a single panel shares nothing with others" if len(ids) == 1 and not others else ""
        return f"{title}: {looks}" + (f", also in {_ranges(others)}" if others else "") + alone


def parse_script(characters: str, panels: str, style: str = "", id_count: int = 4) -> Story:
    """Parse a script into a Story.

    `characters`: one `[Name] description` a line, may be empty: then all panels share one nameless character "".
    `panels`: one panel a line, `prompt` or `prompt # caption`; without `#` the caption is the line itself, without
    brackets. `style` is a suffix of every prompt, or a template with `{prompt}` in it. The first `id_count` lines that
    name only a character are its id panels; 0 means that looks come from saved characters. The nameless character
    takes fewer when the story is shorter. Raises ScriptError.
    """
    for source, text in (("characters", characters), ("panels", panels), ("style", style)):
        _check_text(source, text)
    if isinstance(id_count, bool) or not isinstance(id_count, int) or not 0 <= id_count <= MAX_PANELS:
        raise ScriptError(f"must be a whole number from 0 to {MAX_PANELS}, not {id_count!r}", "id_panels")
    cast = _parse_characters(characters)
    lines = _lines(panels)
    if not lines:
        raise ScriptError("is empty; write one panel a line, such as '[Ana] reads a book # Ana reads'", "panels")
    if len(lines) > MAX_PANELS:
        raise ScriptError(f"has {len(lines)} panels and the limit is {MAX_PANELS}; split the story", "panels")
    parsed = tuple(_parse_panel(index, number, line, cast, style) for index, (number, line) in enumerate(lines))
    for panel, (number, line) in list(zip(parsed, lines, strict=True))[:id_count]:
        if panel.is_no_character and NO_CHARACTER in _tags(line):
            raise ScriptError(
                f"[NC] stands among the first {id_count} panels, which define a character; move the panel down or set "
                f"id_panels below {panel.index + 1}", "panels", number, line,
            )
    known = tuple(cast.values()) or (Character("", ""),)
    id_panels = {character.name: _id_panels(character.name, parsed, id_count) for character in known if id_count}
    return Story(known, parsed, id_panels, style.strip())


def _check_text(source: str, text: str) -> None:
    if not isinstance(text, str):
        raise ScriptError(f"must be text, not {type(text).__name__}", source)
    try:
        size = len(text.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise ScriptError(f"holds half a character at position {error.start}; type it again", source) from error
    if size > MAX_TEXT:
        raise ScriptError(f"is {size} bytes long and the limit is {MAX_TEXT}; split the story", source)
    for number, line in enumerate(_split(text), 1):
        if "\0" in line:
            raise ScriptError("holds a NUL character; delete it", source, number, line.replace("\0", "\\0"))
        if len(line) > MAX_LINE:
            raise ScriptError(f"has {len(line)} characters and the limit is {MAX_LINE}; cut it", source, number, line)


def _split(text: str) -> list[str]:
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def _lines(text: str) -> list[tuple[int, str]]:
    """(line number, text) of every line that is neither blank nor a comment; composed Unicode, so that tags compare."""
    lines = [(number, unicodedata.normalize("NFC", line).strip()) for number, line in enumerate(_split(text), 1)]
    return [(number, line) for number, line in lines if line.strip("\ufeff") and not line.startswith(COMMENT)]


def _parse_characters(text: str) -> dict[str, Character]:
    cast: dict[str, Character] = {}
    for number, line in _lines(text):
        if line.startswith("#"):
            continue
        tag = re.match(_TAG, line)
        if tag is None:
            raise ScriptError("is not a character; write '[Name] description'", "characters", number, line)
        name, description = tag[1].strip(), line[tag.end():].strip()
        if not name or "#" in name:
            raise ScriptError("needs a name without '#' between the brackets", "characters", number, line)
        if name == NO_CHARACTER:
            raise ScriptError("[NC] means 'no character'; choose another name", "characters", number, line)
        if name in cast:
            raise ScriptError(f"defines [{name}] a second time; keep one of the two lines", "characters", number, line)
        if not _has_words(description):
            raise ScriptError(f"describes nothing; say after [{name}] what it looks like", "characters", number, line)
        if "[" in description or "]" in description:
            raise ScriptError("has a bracket in the description; one character a line", "characters", number, line)
        cast[name] = Character(name, description)
    if len(cast) > MAX_CHARACTERS:
        raise ScriptError(f"has {len(cast)} characters and the limit is {MAX_CHARACTERS}", "characters")
    return cast


def _parse_panel(index: int, number: int, line: str, cast: dict[str, Character], style: str) -> Panel:
    before, mark, after = line.partition("#")
    names = _tags(before)
    for name in names:
        if name != NO_CHARACTER and name not in cast:
            known = ", ".join(f"[{known}]" for known in (*cast, NO_CHARACTER))
            reason = f"the tag [{name}] is unknown; known are {known}; define it in characters or correct it"
            raise ScriptError(reason, "panels", number, line)
    rest = re.sub(_TAG, "", before)
    if "[" in rest or "]" in rest:
        raise ScriptError("has a bracket without its partner; write tags as [Name]", "panels", number, line)
    shown = tuple(dict.fromkeys(name for name in names if name != NO_CHARACTER))
    if shown and NO_CHARACTER in names:
        raise ScriptError(f"has [NC] and [{shown[0]}]; keep one of them", "panels", number, line)
    if not shown and not _has_words(rest):
        what = f"nothing before '#'; write the prompt there, or start a comment with {COMMENT}" if mark else "no words"
        raise ScriptError(f"has {what}", "panels", number, line)
    prompt = _styled(_tidy(_replaced(before, {name: f"{c.description} " for name, c in cast.items()})), style)
    if len(prompt) > MAX_PROMPT:
        reason = f"makes a prompt of {len(prompt)} characters and the limit is {MAX_PROMPT}; shorten it"
        raise ScriptError(reason, "panels", number, line)
    if not cast and NO_CHARACTER not in names:
        shown = ("",)
    caption = _tidy(_replaced(after if mark else before, {name: name for name in cast}))
    return Panel(index, prompt, caption, shown, not shown, line)


def _id_panels(name: str, panels: tuple[Panel, ...], id_count: int) -> tuple[int, ...]:
    alone = [panel.index for panel in panels if panel.characters == (name,)]
    if name and len(alone) < id_count:
        found = f"only {len(alone)} of the {id_count} panels"
        lower = f", lower id_panels to {len(alone)}" if alone else ""
        raise ScriptError(
            f"[{name}] stands alone in {found} that define a character; add lines with no tag but [{name}]{lower}, or "
            "set id_panels to 0 and load saved characters", "panels"
        )
    return tuple(alone[:id_count])


def _tags(line: str) -> list[str]:
    return [name.strip() for name in re.findall(_TAG, line.partition("#")[0])]


def _replaced(text: str, words: dict[str, str]) -> str:
    """Text with each known tag replaced, [NC] dropped and other brackets left as they are."""
    parts = re.split(_TAG, text)
    for place in range(1, len(parts), 2):
        name = parts[place].strip()
        parts[place] = "" if name == NO_CHARACTER else words.get(name, f"[{parts[place]}]")
    return "".join(parts)


def _styled(prompt: str, style: str) -> str:
    style = _tidy(style)
    if "{prompt}" in style:
        return style.replace("{prompt}", prompt)
    return f"{prompt}, {style}" if style else prompt


def _tidy(text: str) -> str:
    return re.sub(r" ([,.;:!?])(?=\s|$)", r"\1", " ".join(text.split()))


def _has_words(text: str) -> bool:
    """Letters, digits or pictographs; not punctuation alone."""
    return any(unicodedata.category(char)[0] in "LN" or unicodedata.category(char) == "So" for char in text)


def _short(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else text[:limit - 1] + "…"


def _count(number: int, word: str) -> str:
    return f"{number} {word}" + ("" if number == 1 else "s")


def _ranges(indices: Sequence[int]) -> str:
    """Panel numbers as a user counts them: (0, 1, 2, 5) -> "1-3, 6"."""
    runs: list[list[int]] = []
    for index in sorted(indices):
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ", ".join(str(a + 1) if a == b else f"{a + 1}-{b + 1}" for a, b in runs)

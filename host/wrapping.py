"""Line breaks for captions: at spaces, between kana and Chinese characters, and inside words that are too long."""

import re
import unicodedata

NOT_FIRST = set("、。，．・：；？！?!.,:;)]}」』】〕〉》）］｝’”…ー々ぁぃぅぇぉっゃゅょゎァィゥェォッャュョヮ~〜%％")
NOT_LAST = set("([{「『【〔〈《（［｛‘“")
_UNITS = r"\s+|\S+"


def wrap(text: str, width: float, measure) -> list[str]:
    """Lines of `text` no wider than `width` pixels as `measure(str)` gives them; at least one character a line."""
    lines, line = [], ""
    for unit in _units(text.strip()):
        joined = unit if not line else line + unit
        if measure(joined.rstrip()) <= width:
            line = joined
            continue
        if line.strip():
            lines.append(line.rstrip())
        line = unit.lstrip()
        while len(line) > 1 and measure(line) > width:
            cut = _fitting(line, width, measure)
            lines.append(line[:cut])
            line = line[cut:]
    return [*lines, line.rstrip()] if line.strip() else lines


def _fitting(word: str, width: float, measure) -> int:
    """Most characters of a word that fit on one line, at least one; combining marks stay with their letter."""
    low, high = 1, len(word)
    while low < high:
        middle = (low + high + 1) // 2
        if measure(word[:middle]) <= width:
            low = middle
        else:
            high = middle - 1
    while 1 < low < len(word) and unicodedata.combining(word[low]):
        low -= 1
    return low


def _units(text: str) -> list[str]:
    """Pieces between which a line may break."""
    units = []
    for piece in re.findall(_UNITS, text):
        start = 0
        for place in range(1, len(piece)):
            if not piece[0].isspace() and _breaks(piece[place - 1], piece[place]):
                units.append(piece[start:place])
                start = place
        units.append(piece[start:])
    return units


def _breaks(before: str, after: str) -> bool:
    if after in NOT_FIRST or before in NOT_LAST or unicodedata.category(after) in ("Mn", "Me", "Cf", "Sk"):
        return False
    return _is_ideograph(before) or _is_ideograph(after)


def _is_ideograph(char: str) -> bool:
    """Wide characters other than Hangul, which is written with spaces; emoji are wide."""
    return unicodedata.east_asian_width(char) in ("W", "F") and not unicodedata.name(char, "").startswith("HANGUL")

"""Text of any script on a picture: the first font that has a character draws it, bundled fonts before the system's.

What a font has is read from its cmap table, so nothing but Pillow is needed. Emoji come from one colour font of fixed
size and are scaled; joined sequences show their first picture. Complex scripts are shaped where Pillow has Raqm.
"""

import bisect
import logging
import os
import struct
import sys
import unicodedata
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

FONTS = Path(__file__).resolve().parent.parent / "fonts"
TEXT_FONTS = (str(FONTS / "StoryweftSansKR.ttf"), str(FONTS / "MPLUS1-subset.otf"))
EMOJI_FONT = str(FONTS / "NotoColorEmoji-subset.ttf")
EMOJI_SIZE = 109  # the one size of the bitmaps, in pixels
EMOJI_STYLE = "\ufe0f"
JOINER = "\u200d"
FIRST_EMOJI = "\U0001f000"  # from here on pictures are meant even where a text font has a symbol
SKIN_TONES = ("\U0001f3fb", "\U0001f3ff")


class Typeface:
    """Fonts at one size in pixels. Text is one line; unprintable characters are left out."""

    def __init__(self, size: int):
        self.size = size
        self.line_height = round(size * 1.4)
        self._ascent = round(size * 1.08)

    def width(self, text: str) -> float:
        return sum(self._run_width(path, run) for path, run in runs(text))

    def draw(self, picture: Image.Image, corner: tuple[float, float], text: str, fill) -> None:
        """Draw on an RGB picture, `corner` being the upper left of the line."""
        x, baseline = corner[0], corner[1] + self._ascent
        pen = ImageDraw.Draw(picture)
        for path, run in runs(text):
            if path == EMOJI_FONT:
                self._draw_emoji(picture, round(x), round(baseline), run)
            else:
                pen.text((x, baseline), run, fill=fill, font=_font(path, self.size), anchor="ls")
            x += self._run_width(path, run)

    def _run_width(self, path: str, run: str) -> float:
        if path == EMOJI_FONT:
            return len(run) * self.size * 1.2
        return _font(path, self.size).getlength(run)

    def _draw_emoji(self, picture: Image.Image, x: int, baseline: int, run: str) -> None:
        side = round(self.size * 1.15)
        for place, char in enumerate(run):
            tile = _emoji(char).resize((side, side), Image.Resampling.LANCZOS)
            left = x + round(place * self.size * 1.2)
            picture.paste(tile, (left, baseline - round(side * 0.84)), tile)


def runs(text: str) -> list[tuple[str, str]]:
    """(font file, characters) of every stretch of text that one font draws."""
    found: list[tuple[str, str]] = []
    text = unicodedata.normalize("NFC", text)
    for place, char in enumerate(text):
        if unicodedata.category(char) in ("Cc", "Cf", "Cs", "Cn") or char == EMOJI_STYLE:
            continue
        part = SKIN_TONES[0] <= char <= SKIN_TONES[1] or text[place - 1 : place] == JOINER
        if part and found and found[-1][0] == EMOJI_FONT:
            continue
        path = font_for(char, text[place + 1 : place + 2] == EMOJI_STYLE)
        if found and (found[-1][0] == path or (char == " " and found[-1][0] != EMOJI_FONT)):
            found[-1] = (found[-1][0], found[-1][1] + char)
        else:
            found.append((path, char))
    return found


@lru_cache(maxsize=65536)
def font_for(char: str, emoji_style: bool = False) -> str:
    """File of the font that draws a character: the first text font if no font has it."""
    code = struct.unpack(">I", char.encode("utf-32-be"))[0]
    bundled = (EMOJI_FONT, *TEXT_FONTS) if emoji_style or char >= FIRST_EMOJI else (*TEXT_FONTS, EMOJI_FONT)
    for path in bundled:
        if _has(path, code):
            return path
    for path in system_fonts():
        if _has(path, code) and _font(path, 16) is not None:
            return path
    logging.warning("Storyweft: no font has %r (U+%04X); install one, such as Debian's fonts-noto-core.", char, code)
    return TEXT_FONTS[0]


@lru_cache(maxsize=1)
def system_fonts() -> tuple[str, ...]:
    """Font files of the usual folders, in a fixed order."""
    home = Path.home()
    windows = Path(os.environ.get("WINDIR", "C:/Windows"))
    linux = [home / ".local/share/fonts", home / ".fonts", Path("/usr/share/fonts"), Path("/usr/local/share/fonts")]
    folders = {
        "win32": [windows / "Fonts", home / "AppData/Local/Microsoft/Windows/Fonts"],
        "darwin": [Path("/System/Library/Fonts"), Path("/Library/Fonts"), home / "Library/Fonts"],
    }.get(sys.platform, linux)
    found = [
        os.path.join(folder, name)
        for top in folders
        for folder, _, names in os.walk(top)
        for name in names
        if name.lower().endswith((".ttf", ".otf", ".ttc"))
    ]
    plain = [path for path in sorted(found) if not any(word in path.lower() for word in ("bold", "italic", "oblique"))]
    return tuple(plain + sorted(set(found) - set(plain)))


@lru_cache(maxsize=256)
def _font(path: str, size: int) -> ImageFont.FreeTypeFont | None:
    try:
        return ImageFont.truetype(path, size)
    except OSError:
        if path in TEXT_FONTS:
            raise
        return None  # a system font that FreeType cannot scale


@lru_cache(maxsize=512)
def _emoji(char: str) -> Image.Image:
    tile = Image.new("RGBA", (136, 136))
    font = ImageFont.truetype(EMOJI_FONT, EMOJI_SIZE)
    ImageDraw.Draw(tile).text((0, 128), char, font=font, anchor="lb", embedded_color=True)
    return tile


def _has(path: str, code: int) -> bool:
    starts, ends = coverage(path)
    place = bisect.bisect_right(starts, code) - 1
    return place >= 0 and code <= ends[place]


@lru_cache(maxsize=4096)
def coverage(path: str) -> tuple[list[int], list[int]]:
    """First and last code points of the stretches that a font file's cmap lists; empty for a file that is no font."""
    try:
        with open(path, "rb") as file:
            spans = sorted(_spans(_cmap(file)))
    except (OSError, struct.error):
        return [], []
    return [start for start, _ in spans], [end for _, end in spans]


def _cmap(file) -> bytes:
    """The cmap table of the file's first face."""
    head = file.read(16)
    start = struct.unpack(">I", head[12:16])[0] if head[:4] == b"ttcf" else 0
    file.seek(start + 4)
    count = struct.unpack(">H", file.read(2))[0]
    file.seek(start + 12)
    for _ in range(count):
        tag, _, offset, length = struct.unpack(">4sIII", file.read(16))
        if tag == b"cmap":
            file.seek(offset)
            return file.read(length)
    return struct.pack(">HH", 0, 0)


def _spans(table: bytes) -> list[tuple[int, int]]:
    offsets = {}
    for place in range(struct.unpack(">H", table[2:4])[0]):
        platform, encoding, offset = struct.unpack(">HHI", table[4 + 8 * place : 12 + 8 * place])
        if platform == 0 or (platform == 3 and encoding in (1, 10)):
            offsets[struct.unpack(">H", table[offset : offset + 2])[0]] = offset
    if 12 in offsets:
        offset = offsets[12]
        groups = struct.unpack(">I", table[offset + 12 : offset + 16])[0]
        rows = (struct.unpack(">III", table[offset + 16 + 12 * i : offset + 28 + 12 * i]) for i in range(groups))
        return [(first, last) for first, last, _ in rows]
    return _segments(table[offsets[4] :]) if 4 in offsets else []


def _segments(table: bytes) -> list[tuple[int, int]]:
    """Format 4: four arrays of segments, then glyph numbers, where 0 means that the font has nothing."""
    count = struct.unpack(">H", table[6:8])[0] // 2
    ends = struct.unpack(f">{count}H", table[14 : 14 + 2 * count])
    starts, _, skips = (
        struct.unpack(f">{count}H", table[16 + 2 * count * i : 16 + 2 * count * (i + 1)]) for i in (1, 2, 3)
    )
    spans = []
    for place, (start, end, skip) in enumerate(zip(starts, ends, skips, strict=True)):
        if start > end or start == 0xFFFF:
            continue
        if skip == 0:
            spans.append((start, end))
            continue
        base = 16 + 6 * count + 2 * place + skip
        glyphs = struct.unpack(f">{end - start + 1}H", table[base : base + 2 * (end - start + 1)])
        spans += [(start + i, start + i) for i, glyph in enumerate(glyphs) if glyph]
    return spans

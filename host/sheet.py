"""Pictures of a story on one sheet, with captions: a grid, a strip, or a comic page with inked frames."""

import math
from dataclasses import dataclass, replace

from PIL import Image, ImageDraw

from .fonts import Typeface
from .wrapping import wrap

LAYOUTS = ("grid", "strip", "comic")
POSITIONS = ("below", "over", "none")
MAX_PIXELS = 250_000_000
INK = (20, 18, 24)
PAPER = (255, 252, 240)
SPLITS = {2: (0.56, 0.44), 3: (0.36, 0.30, 0.34)}  # widths in a comic row, reversed in every other row


@dataclass(frozen=True)
class Style:
    """How a sheet looks; lengths in pixels, `columns` 0 and `font_size` 0 choose by themselves."""

    layout: str = "grid"
    columns: int = 0
    position: str = "below"
    font_size: int = 0
    gap: int = 12
    background: tuple[int, int, int] = (255, 255, 255)


@dataclass(frozen=True)
class Cell:
    """One picture's place: `frame` (left, top, right, bottom) of the picture and the lines of its caption."""

    frame: tuple[int, int, int, int]
    lines: list[str]
    face: Typeface
    room: int = 0  # height that the row keeps below its pictures

    @property
    def caption_height(self) -> int:
        return len(self.lines) * self.face.line_height + self.face.size if self.lines else 0


def draw_sheet(pictures: list[Image.Image], captions: list[str], style: Style) -> Image.Image:
    """RGB pictures of one size and as many captions -> one RGB sheet. Raises ValueError when it would be too large."""
    face = Typeface(style.font_size or max(14, round(pictures[0].width / 22)))
    rows = _comic_rows(len(pictures), style.columns) if style.layout == "comic" else _even_rows(len(pictures), style)
    cells, size = _place(rows, pictures[0].size, captions, style, face)
    if size[0] * size[1] > MAX_PIXELS:
        raise ValueError(
            f"a sheet of {size[0]} x {size[1]} pixels is over the limit of {MAX_PIXELS}; use fewer or smaller pictures."
        )
    sheet = Image.new("RGB", size, style.background)
    for picture, cell in zip(pictures, cells, strict=True):
        sheet.paste(_cover(picture, cell.frame), cell.frame[:2])
        _draw_caption(sheet, cell, style)
    return sheet


def _even_rows(count: int, style: Style) -> list[list[float]]:
    columns = style.columns or (count if style.layout == "strip" else math.ceil(math.sqrt(count)))
    columns = min(columns, count)
    return [[1 / columns] * min(columns, count - start) for start in range(0, count, columns)]


def _comic_rows(count: int, columns: int) -> list[list[float]]:
    """Widths of every row's pictures: rows of two and three in turn, or `columns` a row; nobody is left alone."""
    rows, left = [], count
    while left:
        take = min(left, columns or 2 + len(rows) % 2)
        if not columns and left - take == 1:
            take += 1 if take == 2 else -1
        split = SPLITS.get(take, (1 / take,) * take)
        rows.append(list(split if len(rows) % 2 == 0 else split[::-1]))
        left -= take
    return rows


def _place(rows: list[list[float]], picture: tuple[int, int], captions: list[str], style: Style, face: Typeface):
    """Cells in story order and the size of the sheet."""
    comic = style.layout == "comic"
    widest = 2 if comic and not style.columns else max(len(row) for row in rows)
    inner = widest * picture[0] + (widest - 1) * style.gap
    cells, top, left_over = [], style.gap, iter(captions)
    for row in rows:
        share = inner - (len(row) - 1) * style.gap if comic else inner - (widest - 1) * style.gap
        height = round(share / len(row) * picture[1] / picture[0]) if comic else picture[1]
        left, placed = style.gap, []
        for place, part in enumerate(row):
            last = comic and place == len(row) - 1
            width = inner + style.gap - left if last else round(share * part)
            frame = (left, top, left + width, top + height)
            placed.append(_cell(frame, next(left_over), style, face))
            left += width + style.gap
        below = max(cell.caption_height for cell in placed) if style.position == "below" else 0
        cells += [replace(cell, room=below) for cell in placed]
        top += height + below + style.gap
    return cells, (inner + 2 * style.gap, top)


def _cell(frame, caption: str, style: Style, face: Typeface) -> Cell:
    if style.position == "none" or not caption.strip():
        return Cell(frame, [], face)
    width, height = frame[2] - frame[0], frame[3] - frame[1]
    lines = wrap(caption, max(width - face.size, 1), face.width)
    if style.position == "over":
        while len(lines) * face.line_height + face.size > 0.6 * height and face.size > 9:
            face = Typeface(face.size - 1)
            lines = wrap(caption, max(width - face.size, 1), face.width)
        most = max(1, int((0.6 * height - face.size) // face.line_height))
        lines = [*lines[: most - 1], lines[most - 1] + "…"] if len(lines) > most else lines
    return Cell(frame, lines, face)


def _cover(picture: Image.Image, frame: tuple[int, int, int, int]) -> Image.Image:
    """The picture scaled to fill its frame, the overhang cut off evenly."""
    width, height = frame[2] - frame[0], frame[3] - frame[1]
    if (width, height) == picture.size:
        return picture
    scale = max(width / picture.width, height / picture.height)
    size = (max(width, round(picture.width * scale)), max(height, round(picture.height * scale)))
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    return picture.resize(size, Image.Resampling.LANCZOS).crop((left, top, left + width, top + height))


def _draw_caption(sheet: Image.Image, cell: Cell, style: Style) -> None:
    left, top, right, bottom = cell.frame
    comic = style.layout == "comic"
    ink, border = ImageDraw.Draw(sheet), max(2, cell.face.size // 6)
    if cell.lines and style.position == "over" and comic:
        _box(sheet, cell, ink, border)
    elif cell.lines and style.position == "over":
        band = (left, bottom - cell.caption_height, right, bottom)
        sheet.paste(Image.blend(sheet.crop(band), Image.new("RGB", (right - left, cell.caption_height)), 0.6), band[:2])
        _draw_lines(sheet, cell, left + cell.face.size // 2, band[1], (255, 255, 255))
    elif cell.lines and comic:
        ink.rectangle((left, bottom - border, right - 1, bottom + cell.room - 1), fill=PAPER, outline=INK, width=border)
        _draw_lines(sheet, cell, left + cell.face.size // 2, bottom, INK)
    elif cell.lines:
        _draw_lines(sheet, cell, left + cell.face.size // 2, bottom, _readable(style.background))
    if comic:
        ink.rectangle((left, top, right - 1, bottom - 1), outline=INK, width=border)


def _box(sheet: Image.Image, cell: Cell, ink: ImageDraw.ImageDraw, border: int) -> None:
    """A comic's caption box in the upper left corner of the picture, as wide as its text."""
    left, top, right, _ = cell.frame
    width = min(right - left, math.ceil(max(cell.face.width(line) for line in cell.lines)) + cell.face.size)
    ink.rectangle((left, top, left + width - 1, top + cell.caption_height - 1), fill=PAPER, outline=INK, width=border)
    _draw_lines(sheet, cell, left + cell.face.size // 2, top, INK)


def _draw_lines(sheet: Image.Image, cell: Cell, left: int, top: int, colour) -> None:
    for number, line in enumerate(cell.lines):
        corner = (left, top + cell.face.size // 2 + number * cell.face.line_height)
        cell.face.draw(sheet, corner, line, colour)


def _readable(background: tuple[int, int, int]) -> tuple[int, int, int]:
    red, green, blue = background
    return INK if 0.299 * red + 0.587 * green + 0.114 * blue > 128 else (245, 245, 245)

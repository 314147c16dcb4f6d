"""Makes the fonts of fonts/ from Debian's packages; needs `pip install fonttools==4.60.1`, not used by the pack itself.

    apt-get download fonts-nanum fonts-mplus fonts-noto-color-emoji && for f in *.deb; do dpkg -x $f unpacked; done
    python tools/subset_fonts.py unpacked
"""
import sys
from pathlib import Path

from fontTools import subset
from fontTools.ttLib import TTFont

FONTS = Path(__file__).resolve().parent.parent / "fonts"
EVERYTHING = ((0x20, 0x10FFFF),)
LATIN_KOREAN = (    # without the hanja, which the Japanese font has
    (0x20, 0x7E), (0xA0, 0x24F), (0x370, 0x45F), (0x2010, 0x2027), (0x2030, 0x205E), (0x20A0, 0x20BF), (0x2100, 0x214F),
    (0x2190, 0x22FF), (0x2460, 0x24FF), (0x2500, 0x257F), (0x25A0, 0x266F), (0x3000, 0x303F), (0x3131, 0x318E),
    (0xAC00, 0xD7A3), (0xFF00, 0xFFEF),
)
# file written, file read below usr/share/fonts, code points, features, new name (Nanum is a reserved name), licence
SOURCES = (
    (
        "StoryweftSansKR.ttf", "truetype/nanum/NanumGothic.ttf", LATIN_KOREAN, ["kern"], "Storyweft Sans KR",
        "fonts-nanum",
    ),
    ("MPLUS1-subset.otf", "opentype/mplus/Mplus1-Regular.otf", EVERYTHING, ["kern"], None, "fonts-mplus"),
    ("NotoColorEmoji-subset.ttf", "truetype/noto/NotoColorEmoji.ttf", EVERYTHING, [], None, "fonts-noto-color-emoji"),
)
FAMILY_NAMES = (1, 3, 4, 6, 16)


def rename(font: TTFont, name: str) -> None:
    for record in font["name"].names:
        if record.nameID in FAMILY_NAMES:
            record.string = name.replace(" ", "") if record.nameID == 6 else name


def main(unpacked: Path) -> None:
    for target, source, ranges, features, name, package in SOURCES:
        path = unpacked / "usr/share/fonts" / source
        options = subset.Options(hinting=False, layout_features=features, name_IDs=["*"], drop_tables=["DSIG", "VORG"])
        options.notdef_outline = True      # the box that stands for a missing character
        options.drop_tables += [f"TSI{i}" for i in range(6)]
        font = subset.load_font(str(path), options)
        wanted = [code for code in font.getBestCmap() if any(low <= code <= high for low, high in ranges)]
        subsetter = subset.Subsetter(options)
        subsetter.populate(unicodes=wanted)
        subsetter.subset(font)
        if name is not None:
            rename(font, name)
        font.save(FONTS / target)
        parts = (unpacked / "usr/share/doc" / package / "copyright").read_text().split("\n\n")
        ours = [part for part in parts if not any(word in part for word in ("Files: debian/", "License: GPL", "Apache-2.0"))]
        (FONTS / f"LICENSE-{package}.txt").write_text("\n\n".join(ours).rstrip() + "\n")
        print(f"{target}: {len(wanted)} characters, {(FONTS / target).stat().st_size} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""ImageBind on ComfyUI's terms: pictures, texts and sounds as its towers take them, and the towers of a file."""

import html
import unicodedata
from collections.abc import Sequence

import numpy as np
import torch
from comfy.sd1_clip import SDTokenizer
from PIL import Image
from torch import Tensor

SIZE, LENGTH = 224, 77
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
CURLY = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201a": "'", "\u201b": "'", "\u201c": '"', "\u201d": '"', "\u201e": '"'})
LIGATURES = ("\ufb00", "\ufb06")


def see(images: Tensor) -> Tensor:
    """Pictures [n, h, w, 3] in [0, 1] -> [n, 3, 224, 224]: shorter side 224, PIL's bicubic, the centre, CLIP's norm."""
    pixels = (images[..., :3] * 255).round().clamp(0, 255).to(torch.uint8).cpu().numpy()
    height, width = pixels.shape[1:3]
    short = min(height, width)
    sides = int(SIZE * height / short), int(SIZE * width / short)
    top, left = (round((side - SIZE) / 2) for side in sides)
    resized = [np.asarray(Image.fromarray(one).resize(sides[::-1], Image.BICUBIC)) for one in pixels]
    x = torch.from_numpy(np.stack(resized)[:, top : top + SIZE, left : left + SIZE]).movedim(-1, 1) / 255
    mean, std = (torch.tensor(numbers)[:, None, None] for numbers in (MEAN, STD))
    return (x - mean) / std


def clean(text: str) -> str:
    """What CLIP's own tokenizer did to a text first: entities, typographic quotes, ligatures and wide letters undone."""
    text = html.unescape(html.unescape(text)).translate(CURLY)
    plain = [
        unicodedata.normalize("NFKC", letter)
        if LIGATURES[0] <= letter <= LIGATURES[1] or unicodedata.east_asian_width(letter) in "FH"
        else letter
        for letter in text
    ]
    return " ".join(unicodedata.normalize("NFC", "".join(plain)).split()).lower()


def tokenize(texts: Sequence[str], tokenizer: SDTokenizer | None = None) -> Tensor:
    """Token ids [n, 77]: start, text, end, then 0; a text that is too long keeps its end token in the last place."""
    part = tokenizer or SDTokenizer()
    rows = torch.zeros(len(texts), LENGTH, dtype=torch.long)
    for row, text in zip(rows, texts, strict=True):
        ids = part.tokenizer(clean(text))["input_ids"]
        ids = ids if len(ids) <= LENGTH else [*ids[: LENGTH - 1], ids[-1]]
        row[: len(ids)] = torch.tensor(ids)
    return rows

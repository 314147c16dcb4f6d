"""Reads the panels that `make demo` drew with the fact classifier and writes output/scores.json."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from . import pack

from storyweft.host.demo import read_weights  # isort: skip
from storyweft.metrics.facts import load_reader, pair_agreement, read  # isort: skip


def main() -> None:
    output = pack.ROOT / "output"
    files = [Path(name) for name in sys.argv[1:]] or sorted(output.glob("consistent_story_panel_*.png"))[-4:]
    pictures = np.stack(
        [np.asarray(Image.open(file).convert("RGB").resize((128, 128), Image.LANCZOS)) for file in files]
    )
    readings = read(load_reader(*read_weights("facts")), torch.from_numpy(pictures).float() / 255)
    agreement = pair_agreement([reading.identity for reading in readings])
    for file, reading in zip(files, readings, strict=True):
        seen = reading.labels
        print(
            f"storyweft: {file.name}: {seen['colour']} {seen['kind']}, hat {seen['hat']}, {seen['place']}, {seen['time']}"
        )
    print(f"storyweft: pairs of panels that agree on colour and hat: {agreement:.0%}")
    scores = {
        "panels": [{"file": file.name, **asdict(r)} for file, r in zip(files, readings, strict=True)],
        "identity_agreement": agreement,
    }
    (output / "scores.json").write_text(json.dumps(scores, indent=1))


if __name__ == "__main__":
    main()

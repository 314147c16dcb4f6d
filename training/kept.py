"""Data that trainers make once and keep in their folder: latents and embeddings of pictures."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import torch


def mark(folder: Path) -> str:
    """Name of a folder and 8 hex digits of its files' names, sizes and times: another when anything in it changes."""
    found = hashlib.sha256()
    for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
        known = path.stat()
        found.update(f"{path.relative_to(folder)} {known.st_size} {known.st_mtime_ns}\n".encode())
    return f"{Path(folder).name}_{found.hexdigest()[:8]}"


def kept(path: Path, make: Callable):
    """What `make` gives (tensors, numbers and words in dictionaries, lists and tuples), from the file if there is one."""
    if path.exists():
        return torch.load(path, weights_only=True)
    made = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")  # several processes may make it at once, and any may be stopped
    torch.save(made, part)
    os.replace(part, path)
    return made

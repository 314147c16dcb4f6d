"""Finished panels on disk, so that nothing drawn is lost and nothing is drawn twice: output/storyweft/panels."""

import hashlib
import os
from dataclasses import asdict, is_dataclass

import folder_paths
import safetensors.torch
import torch
from torch import Tensor


class PanelStore:
    """Latents by the hash of everything that decided them. A file has its final name only when it is whole."""

    def __init__(self, model_fingerprint: str):
        self.fingerprint = model_fingerprint
        self.folder = os.path.join(folder_paths.get_output_directory(), "storyweft", "panels")

    def key(self, *parts) -> str:
        digest = hashlib.sha256(self.fingerprint.encode())
        _feed(digest, parts)
        return digest.hexdigest()[:40]

    def path(self, key: str) -> str:
        return os.path.join(self.folder, f"{key}.safetensors")

    def get(self, key: str) -> Tensor | None:
        if not os.path.exists(self.path(key)):
            return None
        return safetensors.torch.load_file(self.path(key))["latent"]

    def put(self, key: str, latent: Tensor) -> None:
        os.makedirs(self.folder, exist_ok=True)
        part = self.path(key) + ".part"
        safetensors.torch.save_file({"latent": latent.cpu().contiguous()}, part)
        os.replace(part, self.path(key))


def _feed(digest, value) -> None:
    if torch.is_tensor(value):
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    elif isinstance(value, dict):
        for key in sorted(value, key=str):
            if key not in ("uuid", "storyweft_story"):
                digest.update(f"{key}:".encode())
                _feed(digest, value[key])
    elif isinstance(value, (list, tuple)):
        digest.update(f"[{len(value)}".encode())
        for item in value:
            _feed(digest, item)
    elif value is None or isinstance(value, (str, int, float, bool)):
        digest.update(f"{value!r},".encode())
    elif is_dataclass(value):
        _feed(digest, asdict(value))
    else:
        digest.update(os.urandom(16))  # a ControlNet or hook whose content cannot be told: never the same twice

"""Finished panels on disk, so that nothing drawn is lost and nothing is drawn twice: output/storyweft/panels."""

import os

import folder_paths
import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from .digest import Digest

FORMAT = "storyweft-panel-1"  # to be changed when the same inputs draw another picture


class PanelStore:
    """Latents by the hash of everything that decided them. A file has its final name only when it is whole."""

    def __init__(self):
        self.folder = os.path.join(folder_paths.get_output_directory(), "storyweft", "panels")
        self.unknown: set[str] = set()  # kinds of values that no panel could be told apart by

    def key(self, digest: Digest) -> str | None:
        """The name of a panel, or None if something that decides it cannot be told apart: then it is not kept."""
        self.unknown |= digest.unknown
        return None if digest.unknown else digest.text

    def path(self, key: str) -> str:
        return os.path.join(self.folder, f"{key}.safetensors")

    def has(self, key: str | None) -> bool:
        return key is not None and os.path.exists(self.path(key))

    def get(self, key: str) -> Tensor:
        """The latent of a panel that is there. Raises ValueError when its file is damaged."""
        try:
            return safetensors.torch.load_file(self.path(key))["latent"]
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"the stored panel {self.path(key)} is damaged ({error}); delete it and run again.") from error

    def put(self, key: str, latent: Tensor) -> None:
        os.makedirs(self.folder, exist_ok=True)
        part = self.path(key) + ".part"
        safetensors.torch.save_file({"latent": latent.cpu().contiguous()}, part)
        os.replace(part, self.path(key))

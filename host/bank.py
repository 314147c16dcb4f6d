"""Character bank: the sampled tokens that later panels of a character read, with what is needed to read them right.

StoryDiffusion (arXiv 2405.01434), low-memory demo: layer inputs of the id panels, sampled, per step and layer. Only
pairs of step and layer that share are kept; the authors keep all. U-Nets store layer inputs, projected again at
reading; transformers, whose keys carry positions, store keys and values.
"""

import json
import logging
import os
from dataclasses import asdict, dataclass, field
from functools import cached_property

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..attention.consistent import ConsistentOptions
from . import families
from .digest import Digest, fingerprint
from .layout import Entry, Layer

FORMAT = "storyweft-character-1"


@dataclass(frozen=True)
class Character:
    """What was kept of one character. `tensors` maps "step.visit.layer.role.index" to [tokens, channels] (inputs) or
    [2, heads, tokens, dim] (keys and values)."""

    name: str
    description: str
    options: ConsistentOptions
    layers: str
    sigmas: tuple[float, ...]
    latent_size: tuple[int, ...]
    family: str
    fingerprint: str
    panels: int
    tensors: dict[str, Tensor] = field(repr=False)

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @cached_property
    def digest(self) -> str:
        """Hash of what a panel that reads this character depends on."""
        digest = Digest()
        digest.feed([self.options, self.layers, self.sigmas, self.fingerprint])
        for key, tensor in sorted(self.tensors.items()):
            digest.feed(key)
            digest.feed_weight(tensor)
        return digest.text

    @cached_property
    def entry_keys(self) -> set[str]:
        return {key.split(".", 3)[3] for key in self.tensors}


def slot(evaluation: tuple[int, int], layer: Layer, entry: Entry) -> str:
    return f"{evaluation[0]}.{evaluation[1]}.{layer.ordinal}.{entry.key}"


class Recorder:
    """Collects a character's tokens while its id panels are drawn."""

    def __init__(self):
        self.pieces: dict[str, dict[str, list[Tensor]]] = {}

    def add(self, name: str, key: str, tokens: Tensor) -> None:
        self.pieces.setdefault(name, {}).setdefault(key, []).append(tokens.cpu())

    def tensors(self, name: str) -> dict[str, Tensor]:
        return {key: torch.cat(pieces, dim=-2) for key, pieces in self.pieces.get(name, {}).items()}


def bytes_per_panel(rule, model, latent_shape: tuple[int, ...], steps: int) -> int:
    """Expected bank bytes of one id panel in one guidance part, from the decisions that the run will take."""
    family = families.find(model, rule.node_id)
    sizes = family.sizes(latent_shape)
    chosen = [layer for layer in family.layers if rule.covers(layer)]
    shared = [rule.draws.share((step, 0), len(chosen)) for step in range(steps)]
    numbers = sum(sizes[layer] for share in shared for layer, yes in zip(chosen, share, strict=True) if yes)
    return round(rule.options.rate * numbers * model.model.get_dtype_inference().itemsize)


def check_model(character: Character, model, node_id: str) -> None:
    """Warn of another checkpoint; raise ValueError when the character's keys and values belong to the old one."""
    if character.fingerprint == fingerprint(model):
        return
    if any(tensor.ndim == 4 for tensor in character.tensors.values()):
        raise ValueError(
            f"{node_id}: character '{character.name}' holds keys and values of another {character.family} checkpoint or other "
            "LoRA strengths; make it again with this model."
        )
    logging.warning("%s: character '%s' was made with another checkpoint or other LoRAs.", node_id, character.name)


def check_layers(character: Character, layers: str, node_id: str) -> None:
    """Raise ValueError unless a character was made with the choice of layers that a block has."""
    if character.layers != layers:
        raise ValueError(
            f"{node_id}: character '{character.name}' was made with layers '{character.layers}' and the model's block has "
            f"'{layers}'; choose the same."
        )


def check(character: Character, run, node_id: str) -> None:
    """Raise ValueError, naming both sides, unless `character` can be read in this run."""
    who = f"{node_id}: character '{character.name}'"
    if character.family != run.family.model_class:
        raise ValueError(
            f"{who} was made with a {character.family} model and cannot be read by {run.family.model_class}."
        )
    _check_widths(character, run, who)
    if character.latent_size != run.latent_shape[2:]:
        raise ValueError(
            f"{who} was made with latents of {character.latent_size} and this run has {run.latent_shape[2:]}; "
            "use the same picture size."
        )
    same = len(character.sigmas) == len(run.sigmas) and all(
        abs(a - b) <= 1e-4 * max(abs(a), 1e-9) for a, b in zip(character.sigmas, run.sigmas, strict=True)
    )
    if not same:
        raise ValueError(
            f"{who} was made with {len(character.sigmas) - 1} steps from sigma {character.sigmas[0]:.4g} and this run has "
            f"{len(run.sigmas) - 1} from {run.sigmas[0]:.4g}; use the same steps, scheduler and denoise."
        )


def _check_widths(character: Character, run, who: str) -> None:
    """SD1.5 and SDXL are one model class: layer inputs must have the channels of this model's layers."""
    if not run.family.picture_only:
        return
    widths = {layer.ordinal: run.family.modules[layer].to_k.in_features for layer in run.family.layers}
    for key, tensor in character.tensors.items():
        ordinal = int(key.split(".")[2])
        if widths.get(ordinal) != tensor.shape[-1]:
            found = f"{widths[ordinal]} channels there" if ordinal in widths else f"only {len(widths)} of them"
            raise ValueError(
                f"{who} was made with {tensor.shape[-1]} channels in self-attention layer {ordinal} and this "
                f"{run.family.model_class} has {found}; use the kind of model it was made with."
            )


def check_entry(character: Character, entry: Entry, node_id: str) -> None:
    """Raise ValueError when a character holds nothing for a guidance part that the model is evaluated for."""
    if character.tensors and entry.key not in character.entry_keys:
        raise ValueError(
            f"{node_id}: character '{character.name}' holds no tokens for the guidance part {entry.key}; make it with a cfg "
            "above 1 and as many prompts as this run has."
        )


def save(character: Character, path: str) -> None:
    """Write a character as .safetensors; the final name appears only when the file is whole."""
    metadata = {
        "format": FORMAT,
        "name": character.name,
        "description": character.description,
        "options": json.dumps(asdict(character.options)),
        "layers": character.layers,
        "sigmas": json.dumps(character.sigmas),
        "latent_size": json.dumps(character.latent_size),
        "family": character.family,
        "fingerprint": character.fingerprint,
        "panels": str(character.panels),
    }
    part = path + ".part"
    try:
        safetensors.torch.save_file(
            {key: tensor.contiguous() for key, tensor in character.tensors.items()}, part, metadata
        )
        os.replace(part, path)
    finally:
        if os.path.exists(part):
            os.remove(part)


def load(path: str) -> Character:
    """Read a character file. Raises ValueError when it is cut off, not a character, or holds NaN."""
    who = f"StoryweftLoadCharacter: '{os.path.basename(path)}'"
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{who} is not a whole .safetensors file ({error}).") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{who} is not a character saved by StoryweftSaveCharacter.")
    bad = next((key for key, tensor in tensors.items() if not torch.isfinite(tensor).all()), None)
    if bad is not None:
        raise ValueError(f"{who} holds values that are not numbers (tensor {bad}); make it again.")
    try:
        return _character(metadata, tensors)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{who} was written by another version of the pack or changed by hand ({error}); make it again.") from error


def _character(metadata: dict[str, str], tensors: dict[str, Tensor]) -> Character:
    return Character(
        metadata["name"],
        metadata["description"],
        ConsistentOptions(**json.loads(metadata["options"])),
        metadata["layers"],
        tuple(json.loads(metadata["sigmas"])),
        tuple(json.loads(metadata["latent_size"])),
        metadata["family"],
        metadata["fingerprint"],
        int(metadata["panels"]),
        tensors,
    )

"""Captioners behind one call: a window of sound -> words and the probability of each."""

import json
import pickle
from pathlib import Path

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.utils
import folder_paths
import torch

from ..models import act, act_frontend
from ..story.heard import read_vocabulary
from .demo import read_weights
from .sounds import Asked, Window, resampled
from .whisper import Whisper

FOLDER = "audio_captioners"  # of models/
DEMO = "demo"
VOCABULARIES = ("words_list.json", "train.csv")  # looked for beside a checkpoint, after files of its own name
WORD_LISTS = (".json", ".csv")
CHECKPOINTS = (".pth", ".pt", ".safetensors")


def add_folder() -> None:
    """Make models/audio_captioners known to the host."""
    folder_paths.add_model_folder_path(FOLDER, str(Path(folder_paths.models_dir) / FOLDER))


def names() -> list[str]:
    """What can be chosen: the demo captioner, checkpoints of ACT, folders of Whisper models."""
    found = []
    for folder in folder_paths.get_folder_paths(FOLDER):
        for path in sorted(Path(folder).glob("*")) if Path(folder).is_dir() else ():
            if path.suffix in CHECKPOINTS or (path / "config.json").is_file():
                found.append(path.name)
    return [DEMO, *dict.fromkeys(found)]


class Act:
    """ACT behind the common call. `seconds` is the length of sound it was trained on."""

    def __init__(self, network: act.ActCaptioner, seconds: float, samples: int):
        self.network, self.seconds, self.samples = network, seconds, samples
        self.device = comfy.model_management.get_torch_device()
        self.patcher = comfy.model_patcher.ModelPatcher(
            network, self.device, comfy.model_management.unet_offload_device()
        )

    @torch.no_grad()
    def caption(self, window: Window, asked: Asked) -> tuple[list[str], list[float]]:
        """Words and their probabilities: greedy, or for a width above 1 of the best-first search's caption."""
        comfy.model_management.load_models_gpu([self.patcher])
        wave = resampled(window.wave[None], window.rate, act_frontend.RATE)
        features = act_frontend.log_mel(wave, samples=self.samples)
        memory = self.network.remember(features.to(self.device))
        if asked.width == 1:
            tokens, chances = self.network.greedy(memory)
            return self.network.read(tokens[0].tolist(), chances[0].tolist())
        tokens = torch.tensor([self.network.search(memory, asked.width)], device=self.device)
        scores = self.network.logits(tokens[:, :-1], self.network.prepare(memory))[0].float().softmax(-1)
        chances = scores[0].gather(1, tokens[0, 1:, None])[:, 0]
        return self.network.read(tokens[0].tolist(), [0.0, *chances.tolist()])


def demo() -> Act:
    """The small captioner of weights/ for the sounds of the picture-book world."""
    tensors, metadata = read_weights("captioner", node_id="StoryweftAudioCaption")
    config = json.loads(metadata["config"])
    network = act.build(tensors, config["words"], "demo captioner", config["heads"], comfy.ops.manual_cast)
    return Act(network, config["seconds"], round(config["seconds"] * act_frontend.RATE))


def load(name: str, node_id: str):
    """The captioner of a name of `names()`. Raises ValueError naming the file and what is wrong with it."""
    if name == DEMO:
        return demo()
    places = [Path(folder) / name for folder in folder_paths.get_folder_paths(FOLDER)]
    path = next((place for place in places if place.exists()), None)
    if path is None:
        raise ValueError(f"{node_id}: captioner '{name}' is not in models/{FOLDER}.")
    if path.is_dir():
        return Whisper(path, node_id)
    return load_act(path, node_id)


def load_act(path: Path, node_id: str) -> Act:
    """ACT's published checkpoint, {"model": tensors}, or the same tensors as safetensors, and its words beside it."""
    source = f"{node_id}: {path.name}"
    try:
        state = comfy.utils.load_torch_file(str(path), safe_load=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{source} holds more than weights and is not opened.") from error
    state = state.get("model", state)  # the host's reader already opens a file of one key
    if "encoder.pos_embedding" not in state and "model" not in state and path.suffix != ".safetensors":
        raise ValueError(f"{source} has no captioner under the key 'model'; it holds {', '.join(list(state)[:3])}.")
    places = [*(path.with_suffix(ending) for ending in WORD_LISTS), *(path.parent / name for name in VOCABULARIES)]
    words = next((place for place in places if place.is_file()), None)
    if words is None:
        pickled = next(iter(sorted(path.parent.glob("*.p"))), None)
        found = f"{pickled.name} is not read, since a pickle can hold a program" if pickled else "there is none"
        raise ValueError(
            f"{source} needs its list of words beside it, {path.stem}.json or the training captions train.csv; {found}."
        )
    try:
        vocabulary = read_vocabulary(words)
    except ValueError as error:
        raise ValueError(f"{node_id}: {error}") from error
    with torch.inference_mode(False):
        network = act.build(state, vocabulary, source, operations=comfy.ops.manual_cast)
    return Act(network, act_frontend.SAMPLES / act_frontend.RATE, act_frontend.SAMPLES)

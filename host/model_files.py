"""Files and folders of weights in a folder of models/, and tensors of files that hold nothing else."""

import pickle
from pathlib import Path

import comfy.utils
import folder_paths
from torch import Tensor

CHECKPOINTS = (".safetensors", ".pt", ".pth", ".bin")
CONFIG = "config.json"
TOKENIZERS = ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model", "spm.model", "sentencepiece.bpe.model")
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # of a folder as transformers writes it


def add_folder(folder: str) -> None:
    """Make models/<folder> known to the host."""
    folder_paths.add_model_folder_path(folder, str(Path(folder_paths.models_dir) / folder))


def names(folder: str) -> list[str]:
    """Weight files, and folders that hold a config.json and its weights."""
    found = [Path(name) for name in folder_paths.get_filename_list(folder)]
    folders = [path.parent for path in found if path.name == CONFIG and path.parent != Path(".")]
    files = [path for path in found if path.suffix in CHECKPOINTS and path.parent not in folders]
    return [str(path) for path in (*files, *folders)]


def located(folder: str, name: str, node_id: str) -> Path:
    """The file or folder of a name of `names()`. Raises ValueError where there is none."""
    file, config = (folder_paths.get_full_path(folder, one) for one in (name, str(Path(name) / CONFIG)))
    if file is None and config is None:
        raise ValueError(f"{node_id}: '{name}' is not in models/{folder}.")
    return Path(file) if file else Path(config).parent


def check_tokenizer(path: Path, node_id: str) -> None:
    """Raise ValueError for a folder without a tokenizer, for which transformers makes one that knows no words."""
    if not any((path / name).is_file() for name in TOKENIZERS):
        raise ValueError(f"{node_id}: {path.name} holds no tokenizer ({' or '.join(TOKENIZERS)}).")


def read(path: Path | str, node_id: str) -> dict[str, Tensor]:
    """Tensors of a file, or of a folder's weights. Raises ValueError for a file that holds more and a folder without."""
    path = Path(path)
    if path.is_dir():
        inside = next((path / name for name in WEIGHTS if (path / name).is_file()), None)
        if inside is None:
            raise ValueError(f"{node_id}: {path.name} holds no weights ({' or '.join(WEIGHTS)}).")
        path = inside
    try:
        return comfy.utils.load_torch_file(str(path), safe_load=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{node_id}: {path.name} holds more than weights and is not opened.") from error

"""Loads the repository root as package `storyweft` and, for tests/host, ComfyUI itself in this process."""

import importlib.util
import os
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"

torch.set_num_threads(1)


def load_pack() -> None:
    """Register the root folder as the importable package `storyweft`, whatever the folder is called."""
    if "storyweft" in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(
        "storyweft", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["storyweft"] = module
    spec.loader.exec_module(module)


def load_comfy() -> None:
    """Put ComfyUI on the path (COMFYUI_PATH, else the one of `make env`), set to a CPU run in a scratch folder."""
    if "comfy.cli_args" in sys.modules:
        return
    comfy_path = os.environ.get("COMFYUI_PATH") or os.path.join(os.path.dirname(sys.prefix), "ComfyUI")
    if not os.path.isdir(os.path.join(comfy_path, "comfy")):
        raise RuntimeError(f"no ComfyUI at {comfy_path}: run `make env`, or set COMFYUI_PATH to its folder")
    sys.path.insert(0, comfy_path)
    base = tempfile.mkdtemp(prefix="storyweft-test-")
    for folder in ("custom_nodes", "input", "output", "models"):
        os.makedirs(os.path.join(base, folder))
    keep, sys.argv = sys.argv, ["x", "--cpu", "--base-directory", base]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.cli_args  # noqa: F401

    sys.argv = keep


load_pack()
load_comfy()

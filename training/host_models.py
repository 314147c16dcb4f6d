"""The one door from the trainers to ComfyUI: its own network classes, so that demo weights load into the real thing.

ComfyUI is found through COMFYUI_PATH, else where `make env` puts it, beside this interpreter's environment.
"""

import os
import sys

COMFYUI = os.environ.get("COMFYUI_PATH") or os.path.join(os.path.dirname(sys.prefix), "ComfyUI")
if not os.path.isdir(os.path.join(COMFYUI, "comfy")):
    raise RuntimeError(f"no ComfyUI at {COMFYUI}: run `make env`, or set COMFYUI_PATH to its folder")

sys.path.insert(0, COMFYUI)
_arguments, sys.argv = sys.argv, ["training", "--cpu", "--use-pytorch-cross-attention"]
import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
import comfy.cli_args  # noqa: E402, F401

sys.argv = _arguments

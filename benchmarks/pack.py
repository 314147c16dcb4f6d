"""Loads the repository root as package `storyweft`, with ComfyUI on the path, for scripts outside a running ComfyUI."""

import importlib.util
import sys
from pathlib import Path

from training import host_models  # noqa: F401

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("storyweft", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
module = importlib.util.module_from_spec(spec)
sys.modules["storyweft"] = module
spec.loader.exec_module(module)

# of the sheets in docs/ and weights/: at quality 88 they weigh 1 MB more and show nothing more
JPEG = {"quality": 72, "optimize": True, "progressive": True}

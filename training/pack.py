"""The root folder as package `storyweft`, for trainers of networks that stand on the pack's other floors."""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

if "storyweft" not in sys.modules:
    spec = importlib.util.spec_from_file_location(
        "storyweft", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["storyweft"] = module
    spec.loader.exec_module(module)

"""Makes the repository root importable as package `storyweft`, whatever the folder is called: for trainers of networks
that import across folders."""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if "storyweft" not in sys.modules:
    spec = importlib.util.spec_from_file_location(
        "storyweft", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    sys.modules["storyweft"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["storyweft"])

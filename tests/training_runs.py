"""Several runs of a trainer in one process of its own: importing one changes ComfyUI for training, and takes seconds."""

import json
import os
import subprocess
import sys

from loading import ROOT

DRIVER = """
import contextlib, importlib, io, json, sys
from accelerate.state import AcceleratorState
main = importlib.import_module(sys.argv[1]).main
for options in json.loads(sys.argv[2]):
    sys.argv[1:] = options
    AcceleratorState._reset_state(True)
    told = io.StringIO()
    try:
        with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
            main()
        told.write("done")
    except (SystemExit, ValueError) as error:
        told.write(str(error))
    print(json.dumps(told.getvalue()))
"""


def outputs(module: str, runs: list[list[str]]) -> list[str]:
    """What each run of `python -m module` with these options printed, with "done" or its error at the end."""
    found = subprocess.run(
        [sys.executable, "-c", DRIVER, module, json.dumps(runs)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert found.returncode == 0, found.stderr[-3000:]
    return [json.loads(line) for line in found.stdout.splitlines() if line.startswith('"')]

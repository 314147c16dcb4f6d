"""Runs the pack on recorded data of the authors' code: `python tests/conformance.py DIR...`.

One line per output tensor: file, tensor, greatest absolute error, tolerance, ok or FAIL. A contrast tensor is a known
wrong result: its line gives the distance that must be kept. Exit 1 on any FAIL and on any file no runner covers.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import loading  # noqa: E402, F401  isort: skip  (loads the pack and ComfyUI, which the runners import)
import conformance_consistent  # noqa: E402
import conformance_magdiff  # noqa: E402
import conformance_masked  # noqa: E402
import conformance_mm_diffusion  # noqa: E402
import conformance_mm_samplers  # noqa: E402
import conformance_motion  # noqa: E402
import conformance_sound  # noqa: E402
import conformance_story_gen  # noqa: E402
import conformance_story_imager  # noqa: E402
import conformance_style  # noqa: E402

RUNNERS = {
    **conformance_consistent.RUNNERS,
    **conformance_magdiff.RUNNERS,
    **conformance_masked.RUNNERS,
    **conformance_mm_diffusion.RUNNERS,
    **conformance_mm_samplers.RUNNERS,
    **conformance_motion.RUNNERS,
    **conformance_story_gen.RUNNERS,
    **conformance_sound.RUNNERS,
    **conformance_story_imager.RUNNERS,
    **conformance_style.RUNNERS,
}


class Report:
    """Collects comparisons and prints each as it comes."""

    def __init__(self):
        self.failed = 0
        self.compared = 0

    def line(self, file: str, tensor: str, error: float, bound: str, ok: bool) -> None:
        self.compared += 1
        self.failed += not ok
        print(f"{file:36} {tensor:28} {error:10.3g}  {bound:>10}  {'ok' if ok else 'FAIL'}", flush=True)

    def close(self, file: str, tensor: str, got, want, tolerance: float) -> None:
        if got.shape != want.shape:
            self.line(file, f"{tensor} {tuple(got.shape)}", float("inf"), f"{tuple(want.shape)}", False)
            return
        error = (got.double() - want.double()).abs().max().item() if want.numel() else 0.0
        self.line(file, tensor, error, f"<= {tolerance:g}", error <= tolerance)

    def apart(self, file: str, tensor: str, got, wrong, distance: float) -> None:
        error = (got.double() - wrong.double()).abs().max().item()
        self.line(file, tensor, error, f"> {distance:g}", error > distance)


def run(folders: list[str]) -> int:
    report = Report()
    for folder in folders:
        for path in sorted(Path(folder).glob("*.safetensors")):
            kind = path.stem.split("_", 1)[1]
            runner = RUNNERS.get((path.parent.name, kind)) or RUNNERS.get(kind)
            if runner is None:
                report.line(path.name, "no runner", float("nan"), "", False)
                continue
            runner(path, report)
    print(f"conformance: {report.compared - report.failed} passed, {report.failed} failed")
    return 1 if report.failed or not report.compared else 0


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))

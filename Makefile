# Storyweft: `make demo` draws a story on a fresh machine, `make test` proves the pack right.
PYTHON3 ?= python3
RUN = $(shell $(PYTHON3) tools/environment.py which-python)
export OMP_NUM_THREADS ?= 2

.PHONY: demo test serve effects bench env which-python chromium

demo: env
	@$(RUN) tools/demo.py
	@$(RUN) -m benchmarks.scores

serve: env
	@$(RUN) tools/serve.py

env:
	@$(PYTHON3) tools/environment.py

which-python:
	@$(PYTHON3) tools/environment.py which-python

chromium:
	@sh tools/chromium.sh

test: env chromium
	$(RUN) -m ruff check .
	$(RUN) tests/conformance.py tests/golden/*
	$(RUN) -m pytest -q tests

effects: env
	for report in effects style_effects box_effects box_video_effects board_effects board_trained_effects subject_effects \
	    magdiff_effects motion_effects story_gen_effects sound_effects sound_noisy_effects joint_av_effects video; do \
	    $(RUN) -m benchmarks.$$report || exit 1; done

bench: env
	for report in consistent style masked board story_gen joint_av; do $(RUN) -m benchmarks.$$report || exit 1; done

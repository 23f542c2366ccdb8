# `make help` lists the targets. Works with the old make of macOS (3.81) too.
PYTHON = python3
LAB_ARGS =
ARGS =

VENV_PYTHON = .venv/bin/python
READY = .venv/ready
BROWSER = .venv/browser
PEERS = .venv/peers
SITE = .venv/site
AXE = axe-core@4.14.1
KATEX = katex@0.16.47
# Our modules are found from here, and tools run as `python -m`: a moved folder still works.
export PYTHONPATH = $(CURDIR)
# One thread adds the numbers of a sum in one order, so stored outputs and tests do not vary; what a
# learner has guessed and answered is neither read nor changed.
ONE_THREAD = OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 NSA_LITE_PROGRESS=off
NBVAL = $(VENV_PYTHON) -m pytest --nbval --nbval-current-env
# With the notebooks these tests take about as long as all the others: one half for each of 2 cores.
HALF = tests/exercises tests/kernels/test_compiled.py

.PHONY: help lab test test-browser site notebooks assignment train train-long experiments bench test-gpu force

help:
	@echo "make lab            install into .venv and open the course (LAB_ARGS=--no-browser)"
	@echo "make test           install into .venv, check style and types, run the tests and the notebooks"
	@echo "make test-browser   try the explorers and the site in a real browser (Chromium)"
	@echo "make site           make the course's pages from the stored outputs: build/site/index.html"
	@echo "make notebooks      run every notebook anew and store its outputs and counts"
	@echo "make assignment     pack an exercise set for a class: SET=03 makes build/exercises_03.zip"
	@echo "make train          train NSA, dense and window attention on recall (ARGS=...)"
	@echo "make train-long     the same on haystacks of up to 16,384 tokens (ARGS=...)"
	@echo "make experiments    do the long runs behind the recorded figures, or what is left of them"
	@echo "make bench          on a GPU: time the kernels beside public peers, record and draw"
	@echo "make test-gpu       on a GPU: the kernels' tests compiled, and compute-sanitizer; recorded"
	@echo "Add PYTHON=python3.12, say, to install with another Python than python3."

# Jupyter's root is this folder, so that the README and the exercises are in its file list too.
# .jupyter hides nbgrader's menus, which are for teachers (exercises/INSTRUCTOR.md starts it with them),
# and has JupyterLab save widgets with a notebook: opened again, an explorer lives without a kernel.
lab: $(READY)
	@JUPYTER_CONFIG_PATH="$(CURDIR)/.jupyter$${JUPYTER_CONFIG_PATH:+:$$JUPYTER_CONFIG_PATH}" \
		$(VENV_PYTHON) -m jupyterlab --ServerApp.root_dir="$(CURDIR)" \
		--LabApp.default_url=/lab/tree/notebooks/00_start_here.ipynb \
		$(if $(filter 0,$(shell id -u)),--allow-root) $(LAB_ARGS)

test: $(READY)
	$(VENV_PYTHON) -m ruff check .
	$(VENV_PYTHON) -m ruff format --check .
	$(VENV_PYTHON) -m pyright --pythonpath $(VENV_PYTHON)
	@echo "Half of it runs beside the other; what that half says comes after."
	@{ $(ONE_THREAD) $(NBVAL) notebooks exercises; notebooks=$$?; \
		$(ONE_THREAD) $(VENV_PYTHON) -m pytest $(HALF) && exit $$notebooks; \
		} >.venv/half.log 2>&1 & half=$$!; \
		$(ONE_THREAD) $(VENV_PYTHON) -m pytest $(HALF:%=--ignore=%); tests=$$?; \
		wait $$half; half=$$?; cat .venv/half.log; \
		exit $$((tests > half ? tests : half))

test-browser: $(BROWSER) site
	NSA_LITE_BROWSER=1 $(ONE_THREAD) $(VENV_PYTHON) -m pytest tests/browser

# Static pages that need no server and no network; site/ says how they are made.
site: $(SITE)
	@$(ONE_THREAD) $(VENV_PYTHON) site/build.py

notebooks: $(READY)
	$(ONE_THREAD) $(VENV_PYTHON) -m nbconvert --to notebook --execute --inplace \
		--ExecutePreprocessor.record_timing=False --ExecutePreprocessor.timeout=600 \
		--ExecutePreprocessor.store_widget_state=False \
		notebooks/*.ipynb
	@$(ONE_THREAD) $(VENV_PYTHON) -m exercises.release
	@$(VENV_PYTHON) notebooks/finish.py

# SET=03, say: the student's files of one exercise set, without its solutions, in build/.
assignment: $(READY)
	@test "$(SET)" || { echo "name a set: make assignment SET=03" >&2; exit 1; }
	@$(VENV_PYTHON) -m exercises.release $(SET) --zip

train: $(READY)
	$(VENV_PYTHON) -m nsa_lite.lab.train --task recall \
		--attention nsa --attention dense --attention window $(ARGS)

train-long: $(READY)
	$(VENV_PYTHON) -m nsa_lite.lab.train --task haystack \
		--attention dense --attention nsa-kl --attention window $(ARGS)

# Long on a CPU (it says how long first); Ctrl-C stops, the same command goes on. All of
# notebooks/recorded, or a part: ARGS="recall_controls", ARGS="rules --only '*-seed0'".
experiments: $(READY)
	$(ONE_THREAD) $(VENV_PYTHON) -m nsa_lite.lab.experiments $(ARGS)

# Both need a CUDA device and leave their records in benchmarks/results. GPU_PYTHON may name another
# Python that has torch with CUDA, triton, pytest, hypothesis and, for the peers, fla-core.
GPU_PYTHON = $(VENV_PYTHON)

bench: $(if $(filter $(VENV_PYTHON),$(GPU_PYTHON)),$(PEERS))
	$(GPU_PYTHON) -m benchmarks.bench $(ARGS)
	$(GPU_PYTHON) -m benchmarks.draw

test-gpu: $(if $(filter $(VENV_PYTHON),$(GPU_PYTHON)),$(READY))
	$(GPU_PYTHON) -m benchmarks.gpu_tests

# The stamp .venv/ready says that the set-up came to its end, .venv/made that this file began it: a
# .venv with the second alone is half made, and is made anew; one with neither is somebody's own, and
# stays. `force` is for a .venv whose Python has gone, as after an upgrade of the system.
$(READY): pyproject.toml constraints.txt $(shell test -x $(VENV_PYTHON) || echo force)
	@command -v "$(PYTHON)" >/dev/null || { echo "There is no $(PYTHON) here:" \
		"install Python 3.11 or newer, then run make again." >&2; exit 1; }
	@"$(PYTHON)" -c "import sys; sys.exit(sys.version_info < (3, 11))" || { \
		echo "$(PYTHON) is $$("$(PYTHON)" --version 2>&1), but 3.11 or newer is needed:" \
		"install one and name it, as in 'make $(MAKECMDGOALS) PYTHON=python3.12'." >&2; exit 1; }
	@test ! -e .venv || test -e $(READY) || test -e .venv/made || { \
		echo "There is a .venv here that make did not make: move it away, then run make again." >&2; \
		exit 1; }
	@test -x $(VENV_PYTHON) && test -e $(READY) || rm -rf .venv
	@test -e .venv || { mkdir .venv && touch .venv/made && \
		"$(PYTHON)" -m venv .venv >/dev/null 2>&1; } || { rm -rf .venv; \
		echo "$(PYTHON) cannot make the folder .venv: install its venv module (on Debian and" \
		"Ubuntu: apt install python3-venv) or free some disk space, then run make again." >&2; \
		exit 1; }
	@$(VENV_PYTHON) -m pip install --disable-pip-version-check \
		-c constraints.txt -e ".[lab,test]" || { \
		echo "pip could not install the packages, for the reason above: no network, or no build" \
		"of a package for this Python and system. Mend that, then run make again." >&2; exit 1; }
	@touch $(READY)

# The public kernels that the benchmark holds ours beside.
$(PEERS): $(READY)
	@$(VENV_PYTHON) -m pip install --disable-pip-version-check \
		-c constraints.txt -e ".[bench]" || { \
		echo "pip could not install fla-core, for the reason above: no network, or no build of it" \
		"for this Python and system. Mend that, then run make bench again." >&2; exit 1; }
	@touch $(PEERS)

# What only the browser tests need: playwright, which drives Chromium, and axe-core, which looks
# for what a person could not see, reach or hear.
$(BROWSER): $(READY)
	@$(VENV_PYTHON) -m pip install --disable-pip-version-check \
		-c constraints.txt -e ".[browser]" || { \
		echo "pip could not install playwright, for the reason above: check the network" \
		"connection, then run make test-browser again." >&2; exit 1; }
	@npm install --prefix .venv/axe --no-save --no-audit --no-fund $(AXE) || { \
		echo "npm could not install axe-core, for the reason above: install Node.js (on Debian:" \
		"apt install npm) or check the network, then run make test-browser again." >&2; exit 1; }
	@touch $(BROWSER)

# What only the site needs: Sphinx, which makes the pages, and KaTeX, which sets their equations.
$(SITE): $(READY)
	@$(VENV_PYTHON) -m pip install --disable-pip-version-check \
		-c constraints.txt -e ".[site]" || { \
		echo "pip could not install Sphinx and its theme, for the reason above: check the network" \
		"connection, then run make site again." >&2; exit 1; }
	@npm install --prefix .venv/katex --no-save --no-audit --no-fund $(KATEX) || { \
		echo "npm could not install KaTeX, for the reason above: install Node.js (on Debian:" \
		"apt install npm) or check the network, then run make site again." >&2; exit 1; }
	@touch $(SITE)

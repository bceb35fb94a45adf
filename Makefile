# `make` lists the targets. Each creates .venv and installs what it needs by itself.
PYTHON ?= python3
BIN := .venv/bin
# Where Python may not keep what it compiled, each of many processes compiles PyTorch anew.
unexport PYTHONDONTWRITEBYTECODE
SETUP := settings.ini pyproject.toml setup.py constraints.txt
# Triton's kernels run in its interpreter where there is no NVIDIA GPU.
INTERPRET = $(if $(shell nvidia-smi -L 2>/dev/null),,TRITON_INTERPRET=1)

# Two processes, each with whole files, in the order of tests/conftest.py: the longest first.
TWO = -n 2 --dist loadfile --no-loadscope-reorder

help:
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' Makefile | expand -t 18

quickstart: $(BIN)/.runtime  ## attention in a few lines: the code of README.md, and what it prints (installs the runtime alone)
	$(BIN)/python examples/quickstart.py

demo: $(BIN)/.demo  ## attention along five curves on a photo: a table, pictures and out/demo/report.html (PHOTO=path for yours)
	$(BIN)/hilbert-attn demo $(if $(PHOTO),"$(PHOTO)")

test: $(BIN)/.all  ## run the tests (ARGS="-k curves -x" goes to pytest); those of the site need Chromium, and skip without
	$(BIN)/python -m pytest $(TWO) $(ARGS)

full: $(BIN)/.all  ## run the long grids too (ARGS as for test)
	FULL=1 $(BIN)/python -m pytest $(TWO) $(ARGS)

lint: $(BIN)/.all  ## ruff on notebooks, tests and tools, and how the code looks to a reader in figures
	$(BIN)/ruff check nbs tests tools --exit-zero --statistics
	$(BIN)/python tools/readable.py

mutate: $(BIN)/.all  ## plant mistakes one at a time, and see which of them no test notices (ARGS="-k ring" for some)
	$(BIN)/python tools/mutate.py $(ARGS)

lab: $(BIN)/.all  ## open the notebooks in JupyterLab
	$(INTERPRET) $(BIN)/jupyter lab --notebook-dir=nbs $(if $(filter 0,$(shell id -u)),--allow-root) $(ARGS)

docs: $(BIN)/.docs  ## build the site into _docs/
	$(BIN)/python tools/build_site.py

export: $(BIN)/.all  ## notebooks to package, tables of 30_contributing, notebooks cleaned, and all that `make readme` writes
	$(BIN)/nbdev_export
	$(BIN)/python tools/make_overloads.py
	$(BIN)/jupyter nbconvert --log-level=ERROR --to notebook --execute --inplace nbs/30_contributing.ipynb  # its tables describe the sources
	$(BIN)/nbdev_clean
	$(BIN)/python tools/make_readme.py

readme: $(BIN)/.all  ## write README.md, examples/quickstart.py and CONTRIBUTING.md from their notebooks
	$(BIN)/python tools/make_readme.py

wheel: $(BIN)/.all  ## build source distribution and wheel into dist/
	$(BIN)/python -m build

release: $(BIN)/.all  ## build, check and try what is uploaded, with Python 3.11 to 3.13 (ARGS=--rehearse for a version without a date)
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt -e ".[release]"
	$(BIN)/python tools/release.py $(ARGS)

newcomer: $(BIN)/.runtime  ## time the path from a fresh clone to attention, pictures and site, into nbs/results/ (ARGS=--worktree to try uncommitted files)
	$(BIN)/python tools/newcomer.py $(ARGS)

PART ?= 1
gpu:  ## correctness, then speed, on an NVIDIA GPU: PART=1, 2 or 3, nine minutes each (needs only a python3 with torch, triton and numpy)
	$(PYTHON) tools/gpu_run.py --part $(PART) $(ARGS)

study: $(BIN)/.all  ## train what the reference study has not stored yet; goes on where it stopped (ARGS="--only photos/hilbert", "--status")
	$(BIN)/python tools/run_study.py $(ARGS)

clean:  ## remove what was built, keep .venv
	rm -rf _docs _proc _site build dist out *.egg-info .pytest_cache .hypothesis nbs/nbdev.yml
	find . -name .venv -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +

distclean: clean  ## remove .venv too
	rm -rf .venv

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit(f"hilbert_attn needs Python 3.11 or newer, and $(PYTHON) is {v[0]}.{v[1]}: name another one with `make PYTHON=python3.12 ...`")'
	$(PYTHON) -m venv .venv || (rm -rf .venv; exit 1)

$(BIN)/.runtime: $(SETUP) | $(BIN)/python
	@echo "Installing hilbert_attn and what it needs to run into .venv: this takes a few minutes once."
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt -e .
	@touch $@

$(BIN)/.demo: $(SETUP) | $(BIN)/python
	@echo "Installing hilbert_attn and what the demo needs into .venv: this takes a few minutes once."
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt -e ".[demo]"
	@touch $(BIN)/.runtime $@

$(BIN)/.docs: $(SETUP) | $(BIN)/python
	@echo "Installing hilbert_attn and what its site is built with into .venv: this takes a few minutes once."
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt -e ".[docs]"
	@touch $(BIN)/.runtime $@

$(BIN)/.all: $(SETUP) | $(BIN)/python
	@echo "Installing hilbert_attn and everything that its notebooks, tests and site need into .venv: this takes a few minutes once."
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt -e ".[all]"
	@touch $(BIN)/.runtime $(BIN)/.demo $(BIN)/.docs $@

.PHONY: help quickstart demo test full lint mutate lab docs export readme wheel release newcomer gpu study clean distclean

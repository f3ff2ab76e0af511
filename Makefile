# make demo test test-slow test-faults test-ci-faults test-cluster test-scale bench check format docs clean: the same commands for people and for CI.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin

# The others take many minutes, and their short forms only show that they run: a cluster that loses nodes (scale.spot),
# costs that other figures are computed from (scale.scaling, scale.simulation_check), and whole fits (quality).
BENCHMARKS := speed.throughput speed.waves speed.decode speed.fetch speed.fetch_tars speed.plan speed.index speed.fit \
	speed.startup speed.first_benefit speed.manifest scale.simulate

# Slow tests that are of another target than their folder's, so that CI takes less than an hour.
FAULTS := tests/crashes tests/e2e/test_kill.py tests/e2e/test_own_code.py tests/e2e/test_cifar100_s3.py
LONG_SEARCH := tests/pipeline/index/test_commit_protocol.py::test_any_order_of_requests_with_any_fault_keeps_the_protocol_in_a_long_search
MEMORY := tests/pipeline/evaluation/test_metrics.py::test_memory_stays_below_a_gigabyte_at_50_000_by_50_000

# The part of test-faults that CI runs: of the kill matrix one victim, the driver.
KILLED_DRIVER := tests/faults/test_kill_matrix.py::test_a_kill_at_every_step_changes_nothing_that_is_published[driver]
CI_FAULTS := tests/faults/test_drivers.py tests/faults/test_faulty_store.py '$(KILLED_DRIVER)'

.PHONY: demo test test-slow test-faults test-ci-faults test-cluster test-scale bench check format docs clean

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(VENV)/installed  ## a whole backfill on real images, in minutes
	$(BIN)/fastfill demo

test: $(VENV)/installed  ## the default suite: under ten minutes on two cores
	$(BIN)/python -m pytest -n 2 --dist loadfile -m 'not slow' --durations 15

test-slow: $(VENV)/installed  ## what takes minutes: whole CIFAR-100 and small runs by command, the gate
	$(BIN)/python -m pytest -m slow --durations 15 --ignore tests/cluster --ignore tests/faults --ignore tests/scale \
		$(addprefix --ignore ,$(FAULTS)) $(addprefix --deselect ,$(LONG_SEARCH) $(MEMORY))

test-faults: $(VENV)/installed  ## kills, drivers, errors at any operation, CIFAR-100 on S3: over half an hour
	$(BIN)/python -m pytest -m slow tests/faults $(FAULTS) $(LONG_SEARCH)

test-ci-faults: $(VENV)/installed  ## two drivers, a faulty store, a killed driver: ten minutes, also part of test-faults
	$(BIN)/python -m pytest -m slow --durations 15 $(CI_FAULTS)

bench: $(VENV)/installed  ## the short form of every benchmark: a quarter of an hour
	for name in $(BENCHMARKS); do $(BIN)/python -m benchmarks.$$name --short || exit 1; echo; done

test-cluster: $(VENV)/installed  ## jobs, CIFAR-100 as a job, lost nodes, Prometheus, an autoscaler, a cable pulled: over half an hour
	$(BIN)/python -m pytest -m slow tests/cluster

test-scale: $(VENV)/installed  ## a million images listed, indexed, planned: ten minutes
	$(BIN)/python -m pytest -m slow tests/scale $(MEMORY)

check: $(VENV)/installed  ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(VENV)/installed  ## docs/configuration.md, from the docstrings of the config
	$(BIN)/python -m docs.make_configuration

clean:
	rm -rf runs .mypy_cache .pytest_cache .ruff_cache build *.egg-info

# Every target sets up what it needs: a virtual environment in .venv, made by uv (fetched if missing).
PY := .venv/bin/python
UV = $(shell command -v uv 2>/dev/null || echo .uv/bin/uv)
export OMP_NUM_THREADS := 1
export UV_PYTHON_DOWNLOADS := never

.PHONY: help demo page reproduce smoke test export lint lab bench figures clean
help:
	@echo "make demo     repair a spurious classifier; five to six minutes on two cores"
	@echo "make reproduce  every table and figure of the paper, on the demo; about half an hour on two cores"
	@echo "make smoke    the same with one seed and a handful of pictures: does everything run?"
	@echo "make test     export, notebooks, tests and lint"
	@echo "make export   write cft/ from nbs/ and clean the notebooks"
	@echo "make lint     ruff over notebooks, tests and benchmarks"
	@echo "make lab      read the book in JupyterLab"
	@echo "make bench    measure speed into figures/bench.csv"
	@echo "make figures  draw page and README again from saved results"

.venv/.ready: settings.ini setup.py constraints.txt pyproject.toml
	@command -v uv >/dev/null || test -x .uv/bin/uv || { python3 -m venv .uv && .uv/bin/python -m pip install --quiet uv; }
	@$(UV) venv --quiet --allow-existing --python '>=3.11' .venv
	$(UV) pip install --quiet --compile-bytecode --python $(PY) --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: .venv/.ready
	.venv/bin/cft demo --out figures/demo --work runs/demo
	@$(MAKE) --no-print-directory page

page: .venv/.ready
	@mkdir -p runs
	@$(PY) -m papermill --no-progress-bar nbs/24_demo.ipynb runs/demo.ipynb -p results $(CURDIR)/figures/demo >runs/demo.log 2>&1 || { tail -30 runs/demo.log; exit 1; }
	@echo "The page, executed: runs/demo.ipynb"

reproduce: .venv/.ready
	.venv/bin/cft reproduce --profile demo --out runs/reproduce-demo --publish figures/reproduce-demo

smoke: .venv/.ready
	.venv/bin/cft reproduce --profile smoke --out runs/smoke

figures: page
	$(PY) -c "from cft.demo.experiment import write_readme; write_readme('README.md', 'figures/full')"
	$(PY) -c "from cft.reproduce.pages import write_scoreboard; write_scoreboard('README.md', 'figures/reproduce-demo')"

test: .venv/.ready
	$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations 25

export: .venv/.ready
	.venv/bin/nbdev_export
	.venv/bin/nbdev_clean

lint: .venv/.ready
	$(PY) -m ruff check nbs tests benchmarks setup.py

lab: .venv/.ready
	.venv/bin/jupyter lab nbs/index.ipynb

bench: .venv/.ready
	$(PY) benchmarks/run.py --out figures/bench.csv

clean:
	rm -rf runs build dist *.egg-info .pytest_cache .ruff_cache

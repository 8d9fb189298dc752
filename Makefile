# Every target sets up what it needs: a virtual environment in .venv, made by uv (fetched if missing).
PY := .venv/bin/python
UV = $(shell command -v uv 2>/dev/null || echo .uv/bin/uv)
export OMP_NUM_THREADS := 1
unexport PYTHONDONTWRITEBYTECODE
export UV_PYTHON_DOWNLOADS := never

.PHONY: help demo reproduce related smoke publish test quick fast export format lint lab pages site bench torture clean
help:
	@echo "make demo       repair a spurious classifier; some minutes on two cores"
	@echo "make reproduce  every table and figure of the paper, on the demo; some twenty minutes on two cores"
	@echo "make related    SEG-MIL-CBM, DEAL and the comparison; about half an hour"
	@echo "make publish    what these left in runs/demo becomes figures/demo and the tables of the README"
	@echo "make smoke      the reproduction with one seed and a handful of pictures: does everything run?"
	@echo "make quick      lint, types and the fast tests: a minute and a half"
	@echo "make test       all tests, the notebooks included"
	@echo "make export     write cft/ from nbs/, clean the notebooks and fold their long cells"
	@echo "make format     yapf over the notebooks"
	@echo "make lint       ruff over notebooks, tests and benchmarks; basedpyright over cft/ and benchmarks/"
	@echo "make lab        read the book in JupyterLab"
	@echo "make pages      run all notebooks and save what they show; about half an hour"
	@echo "make site       the book as static pages in build/site; some minutes"
	@echo "make bench      measure speed into figures/bench.csv"
	@echo "make torture    kills, bad inputs, full disks: good answers are counted in figures/reliability.csv"

.venv/.ready: settings.ini setup.py constraints.txt pyproject.toml
	@command -v uv >/dev/null || test -x .uv/bin/uv || { python3 -m venv .uv && .uv/bin/python -m pip install --quiet uv; }
	@$(UV) venv --quiet --allow-existing --python '>=3.11' .venv
	$(UV) pip install --quiet --compile-bytecode --python $(PY) --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: .venv/.ready
	.venv/bin/cft demo --out runs/demo

reproduce: .venv/.ready
	.venv/bin/cft reproduce --profile demo --out runs/demo

related: .venv/.ready
	.venv/bin/cft reproduce --profile demo --only segmil,deal,comparison --out runs/demo

smoke: .venv/.ready
	.venv/bin/cft reproduce --profile smoke --out runs/smoke

publish: .venv/.ready
	$(PY) -c "from cft.reproduce.publish import publish, write_readme; publish('runs/demo', 'figures/demo'); write_readme('README.md')"

test: .venv/.ready
	$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations 25

quick: .venv/.ready
	@$(MAKE) --no-print-directory -j 2 lint fast

fast: .venv/.ready
	$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

export: .venv/.ready
	.venv/bin/nbdev_export
	.venv/bin/nbdev_clean
	$(PY) nbs/site/fold.py

format: .venv/.ready
	$(PY) -m nbqa yapf --in-place nbs
	@$(MAKE) --no-print-directory export

lint: .venv/.ready
	$(PY) -m ruff check nbs tests benchmarks setup.py
	.venv/bin/basedpyright

lab: .venv/.ready
	.venv/bin/jupyter lab nbs/index.ipynb

pages: .venv/.ready
	$(PY) -m jupyter nbconvert --log-level WARN --to notebook --execute --inplace \
		--ExecutePreprocessor.store_widget_state=False nbs/*.ipynb nbs/*/*.ipynb
	@$(MAKE) --no-print-directory export

site: .venv/.ready
	$(PY) -m sphinx -q -W --keep-going -b html -c nbs/site . build/site

bench: .venv/.ready
	$(PY) benchmarks/run.py --out figures/bench.csv
	$(PY) benchmarks/phases.py

torture: .venv/.ready
	$(PY) benchmarks/torture.py --out figures/reliability.csv --list-bad runs/torture.txt

clean:
	rm -rf runs build dist *.egg-info .pytest_cache .ruff_cache

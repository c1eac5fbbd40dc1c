PYTHON = .venv/bin/python

demo: .venv/installed  ## train, generate and evaluate under demo/: a few minutes on a CPU
	$(PYTHON) src/train.py --root demo --n_epochs 3 --save_every 1 --batch_size 64 --overwrite
	$(PYTHON) src/generate.py --root demo --labels 0-9 --n_samples 100
	$(PYTHON) src/test.py --root demo
	@echo "digits:  demo/generated_samples/generated_samples_3.png"
	@echo "metrics: demo/datas/metrics.png"

test: .venv/installed-dev  ## run the test suite
	.venv/bin/ruff check
	$(PYTHON) -m pytest

.venv/bin/python:
	python3 -m venv .venv

.venv/installed: requirements.txt | .venv/bin/python
	$(PYTHON) -m pip install -r requirements.txt
	touch $@

.venv/installed-dev: requirements-dev.txt .venv/installed
	$(PYTHON) -m pip install -r requirements-dev.txt
	touch $@

.PHONY: demo test

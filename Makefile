PYTHON = .venv/bin/python

demo: .venv/installed
	rm -rf demo
	$(PYTHON) src/train.py --root demo --n_epochs 2 --save_every 1 --batch_size 64
	$(PYTHON) src/generate.py --root demo --labels 0 1 2 3 4 5 6 7 8 9 --n_samples 100
	$(PYTHON) src/test.py --root demo --n_samples 2000
	@echo "digits:  demo/generated_samples/generated_samples_2.png"
	@echo "metrics: demo/datas/metrics.png"

test: .venv/installed-dev
	$(PYTHON) -m pytest
	.venv/bin/ruff check

.venv/bin/python:
	python3 -m venv .venv

.venv/installed: requirements.txt | .venv/bin/python
	$(PYTHON) -m pip install -r requirements.txt
	touch $@

.venv/installed-dev: requirements-dev.txt .venv/installed
	$(PYTHON) -m pip install -r requirements-dev.txt
	touch $@

.DELETE_ON_ERROR:  # no half-made .venv
.PHONY: demo test

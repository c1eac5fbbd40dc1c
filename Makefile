PYTHON = .venv/bin/python

demo: .venv/installed
	rm -rf demo
	$(PYTHON) src/train.py --root demo --n_epochs 2 --save_every 1 --batch_size 64
	$(PYTHON) src/generate.py --root demo --labels 0 1 2 3 4 5 6 7 8 9 --n_samples 100
	$(PYTHON) src/test.py --root demo
	@echo "digits:  demo/generated_samples/generated_samples_2.png"
	@echo "metrics: demo/datas/metrics.png"

test: .venv/installed-dev
	$(PYTHON) -m pytest
	.venv/bin/ruff check

RUN = runs/released

release: .venv/installed  # an hour or two: checkpoints/pretrained.pth, and all that shows it
	$(PYTHON) src/train.py --root $(RUN) --n_epochs 100 --batch_size 128
	$(PYTHON) src/test.py --root $(RUN) --every 2 --seeds 3
	cp $(RUN)/checkpoints/diffusion_epoch_100.pth checkpoints/pretrained.pth
	set -e; for file in train_log.csv train_log.png metrics.csv metrics.png; do \
		cp $(RUN)/datas/$$file datas/released_$$file; done
	cp $(RUN)/datas/metrics_closest_100.png datas/released_closest.png
	$(PYTHON) docs/figures.py

TABLES = training sampling released floors guidance samplers usefulness told_apart time recipe

tables: runs $(TABLES:%=docs/tables/%.md)  # hours; one alone: make docs/tables/NAME.md

runs: .venv/installed  # hours, too: docs/tables/runs.csv, of which the last two tables are made
	$(PYTHON) docs/runs.py

# docs/tables/training-avx2.md is the table "training" of another machine than training.md.
docs/tables/%.md: .venv/installed always
	mkdir -p docs/tables
	$(PYTHON) docs/benchmark.py $(firstword $(subst -, ,$*)) > $@.tmp
	mv $@.tmp $@

figures: .venv/installed
	$(PYTHON) docs/figures.py

.venv/bin/python:
	python3 -m venv .venv

.venv/installed: requirements.txt | .venv/bin/python
	$(PYTHON) -m pip install -r requirements.txt
	touch $@

.venv/installed-dev: requirements-dev.txt .venv/installed
	$(PYTHON) -m pip install -r requirements-dev.txt
	touch $@

.DELETE_ON_ERROR:  # no half-made .venv
.PHONY: demo test release tables runs figures always

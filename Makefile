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
WEIGHTS = $(RUN)/checkpoints/diffusion_epoch_100.pth

$(WEIGHTS): | .venv/installed
	$(PYTHON) src/train.py --root $(RUN) --n_epochs 100 --batch_size 128 \
		$(if $(wildcard $(RUN)/checkpoints/latest.pth),--resume)

release: $(WEIGHTS)  # two hours: checkpoints/pretrained.pth, and the files that the pages show
	$(PYTHON) src/test.py --root $(RUN) --checkpoint_path $(WEIGHTS) --seeds 3
	cp $(WEIGHTS) checkpoints/pretrained.pth
	cp $(RUN)/datas/train_log.csv datas/released_train_log.csv
	cp $(RUN)/datas/train_log.png datas/released_train_log.png
	cp $(RUN)/datas/metrics.csv datas/released_metrics.csv
	cp $(RUN)/datas/metrics_closest_100.png datas/released_closest.png
	$(PYTHON) docs/figures.py

TABLES = training sampling released floors guidance samplers told_apart baselines recipe trials

tables: runs $(TABLES:%=docs/tables/%.md)  # hours; one alone: make docs/tables/NAME.md

runs: .venv/installed  # hours, too: docs/tables/runs.csv and trials.csv, for the last three tables
	$(PYTHON) docs/runs.py
	$(PYTHON) docs/runs.py trials

# training-avx2.md is the table "training", printed on another machine than training.md.
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

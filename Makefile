# setup demo test test-all serve lint types bench embedded: each makes .venv first, if pyproject.toml or constraints.txt changed since.
PYTHON ?= python3
ARGS ?=
QUARTER ?= 0
VENV := .venv
PYTEST := python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=10
STAMP := $(VENV)/.installed
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: setup demo test test-all test-slow serve lint format types bench docs embedded

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "error: Python 3.11 or newer is needed; name one with make PYTHON=python3.12 …"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	pip install --quiet --no-compile -c constraints.txt -e '.[dev]'
	@# pip would compile thirty thousand files one after another. Some are templates and no Python: it says so, and fails.
	@python -m compileall -q -j 0 $(VENV)/lib ray_sd > /dev/null 2>&1 || true
	@touch $@

demo: $(STAMP)
	python jobs/demo.py $(ARGS)

# All tests but the slow ones, whole files to each of two processes.
test: $(STAMP)
	$(PYTEST) $(ARGS)

test-all: $(STAMP)
	$(PYTEST) -m 'not gpu' $(ARGS)

# A quarter of the slow tests (0 to 3): make test-slow QUARTER=2
test-slow: $(STAMP)
	$(PYTEST) -m 'slow and not gpu' --quarter=$(QUARTER) $(ARGS)

# The embedded model at http://localhost:8000, until Ctrl-C; another by ARGS='serve=sdxl'.
serve: $(STAMP)
	python jobs/serve.py $(ARGS)

lint: $(STAMP)
	ruff check .
	ruff format --check .

format: $(STAMP)
	ruff check --fix .
	ruff format .

types: $(STAMP)
	mypy

# In hours. Needs npm, which fetches the pictures that some compare with. svd_gpu.py does nothing without a GPU.
bench: $(STAMP)
	@failed=0; for program in $$(ls benchmarks/*.py | grep -v -e report.py -e sweep_pages.py -e serve_baselines.py -e bare_lora.py); do \
	    echo "== $$program"; python $$program || failed=1; done; exit $$failed

docs: $(STAMP)
	python -m ray_sd.config.documentation

# The embedded models, trained again from nothing, in hours on two cores. Replaces what lies in ray_sd/embedded.
embedded: $(STAMP)
	python jobs/prepare_emoji.py selection=autoencoder out=runs/data/emoji_vae
	python jobs/prepare_emoji.py selection=two_core out=runs/data/emoji
	python jobs/prepare_emoji.py selection=clips out=runs/data/emoji_clips
	python jobs/prepare_emoji.py selection=spin out=ray_sd/embedded/clips/spin
	python -m ray_sd.embedded.clip
	python -m ray_sd.embedded.autoencoder runs/emoji_vae_start
	python jobs/train.py experiment=train_vae_emoji
	python jobs/train.py experiment=finish_vae_emoji
	python jobs/release_emoji.py runs/finish_vae_emoji/adapter
	python jobs/train.py experiment=pretrain_emoji
	python jobs/release_emoji.py runs/pretrain_emoji/adapter
	python jobs/train.py experiment=dreambooth name=owl
	python jobs/release_emoji.py runs/owl/adapter
	python jobs/train.py experiment=textual_inversion name=owl-word
	python jobs/release_emoji.py runs/owl-word/adapter
	python -m ray_sd.embedded.autoencoder runs/emoji_video_vae_start video
	python jobs/train.py experiment=train_vae_emoji_video
	python jobs/train.py experiment=finish_vae_emoji_video
	python jobs/release_emoji.py runs/finish_vae_emoji_video/adapter
	python jobs/train.py experiment=inflate_emoji
	python jobs/release_emoji.py runs/inflate_emoji/adapter
	python jobs/train.py experiment=temporal_emoji
	python jobs/release_emoji.py runs/temporal_emoji/adapter
	python jobs/train.py experiment=train_decoder_emoji_video
	python jobs/release_emoji.py runs/train_decoder_emoji_video/adapter
	python jobs/train.py experiment=train_interpolation_emoji
	python jobs/release_emoji.py runs/train_interpolation_emoji/adapter
	python jobs/prepare_emoji.py selection=large out=runs/data/emoji_large
	python -m ray_sd.embedded.autoencoder runs/emoji_upscaler_vae_start upscaler
	python jobs/train.py experiment=train_upscaler_vae_emoji
	python jobs/release_emoji.py runs/train_upscaler_vae_emoji/adapter
	python -m ray_sd.embedded.upscaler runs/emoji_upscaler_unet_start
	python jobs/train.py experiment=train_upscaler_emoji
	python jobs/release_emoji.py runs/train_upscaler_emoji/adapter
	python benchmarks/embedded_quality.py
	python benchmarks/embedded_video_quality.py
	python benchmarks/motion_learning.py

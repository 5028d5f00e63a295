# `make` builds build/pith. Quiet unless something fails. Every target installs and builds what it needs.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.PHONY: build setup demo test asan build-times clean

# Compiler output, not the small talk of ninja and cmake.
quiet_ninja = ninja -C $(1) --quiet $(2) | { grep -vE '^(ninja: no work to do|-- )' || true; }

build: build/build.ninja
	@$(call quiet_ninja,build)

setup:
	@tools/setup.sh

# From an empty machine to a trained model and a sample of its writing, in minutes.
demo: build/build.ninja
	@$(call quiet_ninja,build,pith)
	@examples/tiny/demo.sh

test: build
	@tools/run_tests.sh build/pith_tests

# The tests under AddressSanitizer and UndefinedBehaviorSanitizer.
asan: build-asan/build.ninja
	@$(call quiet_ninja,build-asan)
	@tools/run_tests.sh build-asan/pith_tests

# Seconds that each file takes to compile, without ccache.
build-times: build-times/build.ninja
	@tools/build_times.sh build-times

build/build.ninja: | setup
	@cmake -S . -B build -G Ninja >/dev/null
build-asan/build.ninja: | setup
	@cmake -S . -B build-asan -G Ninja -DPITH_SANITIZE=ON >/dev/null
build-times/build.ninja: | setup
	@cmake -S . -B build-times -G Ninja -DCCACHE= >/dev/null

clean:
	@rm -rf build build-asan build-times

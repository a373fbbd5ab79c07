# Two doors to CMake for a newcomer. Each installs what it lacks from the distribution (as root, or through sudo) and
# says so.
BUILD ?= build
JOBS ?= $(shell nproc 2>/dev/null || echo 2)

.PHONY: demo test build install clean

demo: build
	@scripts/demo $(BUILD)

test:
	@scripts/setup test
	@cmake -S . -B $(BUILD) -DNBHD_TESTS=ON >/dev/null
	@cmake --build $(BUILD) --parallel $(JOBS)
	@scripts/fetch-nvrtc $(BUILD)
	@ctest --test-dir $(BUILD) -L quick --output-on-failure --parallel $(JOBS)

build:
	@scripts/setup build
	@cmake -S . -B $(BUILD) -DNBHD_TESTS=OFF >/dev/null
	@cmake --build $(BUILD) --parallel $(JOBS)

# To /usr/local, or to PREFIX. The dynamic linker finds what root installs there once ldconfig has seen it.
install: build
	@cmake --install $(BUILD) $(if $(PREFIX),--prefix "$(PREFIX)")
	@if [ "$$(id -u)" = 0 ] && [ -z "$(PREFIX)$(DESTDIR)" ]; then ldconfig; fi

clean:
	@rm -rf $(BUILD)

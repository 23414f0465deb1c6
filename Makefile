# One line each: what happens is in the scripts.
.PHONY: run test test-backends bench fuzz lint build clean

run: build     ; @tests/lab/demo
test:          ; @tests/all
test-backends: ; @tests/backends/run
bench: build   ; @tests/benches/run
fuzz:          ; @tests/fuzz/run
lint:          ; @tests/lint
build:         ; @tests/build
clean:         ; @cargo clean

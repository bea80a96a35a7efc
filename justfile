# Everything there is to do with this project. Each recipe also works as the
# plain command that it shows.

# List the recipes.
default:
    @just --list

# Build the example and serve it on http://127.0.0.1:8000.
run *args='examples/flask':
    cargo run --release -- serve {{args}}

# All tests: of the host, of the adapter, and of both through the real binary.
test *args:
    cargo test --release {{args}}

# Random input for what stands between the network and an app; with so many cases of each property.
fuzz cases='300000':
    PROPTEST_CASES={{cases}} cargo test --release --bin wsgi-wasm fuzz:: -- --test-threads 1

# The adapter's own tests, on this machine's Python.
test-python:
    python3 -W error -m unittest discover -s guest-python/tests -t guest-python

# Formatting and lints.
check:
    cargo fmt --all --check
    cargo clippy --release --all-targets -- -D warnings

# Formats the Rust code.
fmt:
    cargo fmt --all

# The documentation of the code, private items included.
doc:
    RUSTDOCFLAGS="-D warnings" cargo doc --release --no-deps --document-private-items

# Licences, advisories and sources of the dependencies (needs cargo-deny).
deny:
    cargo deny check

# Measures the server beside others; see bench/README.md.
bench *args:
    python3 bench/bench.py {{args}}

# The same in less than three minutes, with less to say.
bench-quick:
    python3 bench/bench.py --quick

# What the continuous integration runs.
ci: check test doc

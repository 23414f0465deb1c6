//! Programs of others to test against: whether they are here, and when they listen.

use std::env;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::eventually;

/// A program that `tests/backends/fetch` brings, by `OUTBOARD_BACKEND_NAME`; `None`, with a printed reason, where it is not here.
/// A failure with `OUTBOARD_BACKENDS_REQUIRED`, as `make test-backends` has it.
pub fn fetched(name: &str) -> Option<PathBuf> {
    let variable = format!("OUTBOARD_BACKEND_{}", name.to_uppercase().replace('-', "_"));
    let found = env::var_os(&variable).map(PathBuf::from);
    if found.is_none() {
        let why = format!("no {name} here ({variable}; tests/backends/fetch brings it)");
        assert!(env::var_os("OUTBOARD_BACKENDS_REQUIRED").is_none(), "cannot be skipped here: {why}");
        skipped(&why);
    }
    found
}

/// Says past the test runner's capture why this test is left out.
pub fn skipped(why: &str) {
    let line = format!("skipped {}: {why}\n", std::thread::current().name().unwrap_or("test"));
    std::io::stderr().write_all(line.as_bytes()).unwrap_or_default();
}

/// Waits until a server listens.
pub fn until_listening(socket: &Path, limit: Duration) {
    eventually(&format!("a server listens on {}", socket.display()), limit, || is_listening(socket));
}

/// Whether a server listens: its socket has a name from bind() on, and refuses connections until listen().
pub fn is_listening(socket: &Path) -> bool {
    let table = std::fs::read_to_string("/proc/net/unix").unwrap();
    table.lines().any(|line| line.contains(" 00010000 ") && line.ends_with(socket.to_str().unwrap()))
}

//! What this host has: a KVM, the program under test, stock kernels. A test that lacks something says so and
//! is skipped; inside the lab, where nothing may be lacking, it fails.

use std::env;
use std::fs::OpenOptions;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// Why a test cannot run here.
#[derive(Debug)]
pub struct Missing(String);

impl Missing {
    /// `why` is a clause such as `no /dev/kvm`.
    ///
    /// # Panics
    /// Inside the lab, or with `OUTBOARD_REQUIRE` set.
    #[must_use]
    pub fn new(why: impl Into<String>) -> Self {
        let why = why.into();
        assert!(!in_lab() && env::var_os("OUTBOARD_REQUIRE").is_none(), "cannot be skipped here: {why}");
        Self(why)
    }

    /// As [`Missing::new`], of something that only `make test-backends` brings: others may lack it inside the
    /// lab, too.
    ///
    /// # Panics
    /// With `OUTBOARD_BACKENDS_REQUIRED` set, as `make test-backends` does.
    #[must_use]
    pub fn optional(why: impl Into<String>) -> Self {
        let why = why.into();
        assert!(env::var_os("OUTBOARD_BACKENDS_REQUIRED").is_none(), "cannot be skipped here: {why}");
        Self(why)
    }

    /// Says that a test is left out on purpose, also inside the lab.
    pub fn skipped(test: &str, why: &str) {
        Self(why.to_owned()).print(test);
    }

    /// Prints the reason past the test runner's capture.
    pub fn print(&self, test: &str) {
        let line = format!("skipped {test}: {}\n", self.0);
        std::io::stderr().write_all(line.as_bytes()).unwrap_or_default();
    }
}

/// What `$found` holds, or the end of this test with a printed reason.
#[macro_export]
macro_rules! need {
    ($found:expr) => {
        match $found {
            Ok(found) => found,
            Err(missing) => {
                let missing: $crate::place::Missing = missing;
                missing.print(std::thread::current().name().unwrap_or("test"));
                return;
            }
        }
    };
}

/// True inside `tests/lab`.
#[must_use]
pub fn in_lab() -> bool {
    env::var_os("OUTBOARD_IN_LAB").is_some()
}

/// True for the long rounds: `OUTBOARD_SOAK=1`.
#[must_use]
pub fn soak() -> bool {
    env::var_os("OUTBOARD_SOAK").is_some_and(|value| value != "0")
}

/// A KVM of whatever kind.
///
/// # Errors
/// When `/dev/kvm` cannot be opened.
pub fn kvm() -> Result<(), Missing> {
    match OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        Ok(_) => Ok(()),
        Err(error) => Err(Missing::new(format!("/dev/kvm: {error}"))),
    }
}

/// The program under test: `OUTBOARD_BIN`, else the one that this cargo builds beside the tests.
///
/// # Panics
/// When there is none, or it does not build.
pub fn outboard() -> &'static Path {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    PATH.get_or_init(|| program("OUTBOARD_BIN", "vmm", "outboard"))
}

/// A vfio-user server of `tests/servers`, `nvme` or `engine`: `OUTBOARD_SERVER_NAME`, else the one that this
/// cargo builds.
///
/// # Panics
/// When there is none, or it does not build.
#[must_use]
pub fn server(name: &str) -> &'static Path {
    static NVME: OnceLock<PathBuf> = OnceLock::new();
    static ENGINE: OnceLock<PathBuf> = OnceLock::new();
    let (place, variable) = match name {
        "nvme" => (&NVME, "OUTBOARD_SERVER_NVME"),
        "engine" => (&ENGINE, "OUTBOARD_SERVER_ENGINE"),
        _ => panic!("no server {name}"),
    };
    place.get_or_init(|| program(variable, "outboard-servers", &format!("vfio-user-{name}")))
}

fn program(variable: &str, package: &str, name: &str) -> PathBuf {
    if let Some(path) = env::var_os(variable) {
        let path = PathBuf::from(path);
        assert!(path.exists(), "{variable}: there is no {}", path.display());
        return path;
    }
    let test = env::current_exe().expect("this test has a path");
    let folder = test.ancestors().nth(2).expect("a test lies in target/PROFILE/deps");
    // cargo builds what a test links, not the programs that it starts; a stale one would be tested in
    // silence.
    let Some(cargo) = env::var_os("CARGO") else { return folder.join(name) };
    let mut build = Command::new(cargo);
    build.args(["build", "--quiet", "--package", package, "--bin", name]);
    build.current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."));
    if folder.ends_with("release") {
        build.arg("--release");
    }
    let status = build.status().expect("cargo starts");
    assert!(status.success(), "{name} does not build");
    folder.join(name)
}

/// Debian's storage daemon.
///
/// # Errors
/// When it is not installed.
pub fn storage_daemon() -> Result<PathBuf, Missing> {
    let named = env::var_os("OUTBOARD_STORAGE_DAEMON").map(PathBuf::from);
    let search = env::var_os("PATH").unwrap_or_default();
    let candidates =
        named.into_iter().chain(env::split_paths(&search).map(|dir| dir.join("qemu-storage-daemon")));
    let found = candidates.into_iter().find(|path| path.is_file());
    found.ok_or_else(|| Missing::new("no qemu-storage-daemon (Debian: qemu-system-common)"))
}

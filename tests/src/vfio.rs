//! The vfio-user servers of `tests/servers`, and those on libvfio-user that `tests/backends/fetch` builds,
//! each in a process of its own; and guests with the program that drives the engine.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use crate::backends::{self, archive, cpio_entry};
use crate::capture::{Capture, tail};
use crate::daemon::is_listening;
use crate::launch::Launch;
use crate::place::{self, Missing};
use crate::scratch::Scratch;
use crate::wait;

const STARTS: Duration = Duration::from_secs(10);

/// Shell functions for guests: `function_of 0x0b0e` prints a function's name as in sysfs, `wait_for COMMAND`
/// waits.
pub const SHELL: &str = r#"function_of() { for d in /sys/bus/pci/devices/*; do [ $(cat $d/device) = $1 ] && echo ${d##*/}; done; }
wait_for() { for n in $(seq 200); do "$@" && return; usleep 50000; done; echo "waited in vain: $*"; exit 1; }
"#;

/// What serves the engine: the same registers, on one library and on the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Library {
    /// The crate `vfio_user`, in `tests/servers`.
    Crate,
    /// The one with which SPDK and QEMU serve devices, in `tests/backends/engine.c`. No MSI.
    LibvfioUser,
}

impl Library {
    /// Those that are here. Says so when libvfio-user is not.
    ///
    /// # Panics
    /// When it is not although all backends are wanted.
    #[must_use]
    pub fn all() -> Vec<Self> {
        let second = backends::program("libvfio-user-engine").map(|_| Self::LibvfioUser);
        let all: Vec<_> = std::iter::once(Self::Crate).chain(second).collect();
        println!("engines on {all:?}");
        all
    }

    /// An engine with arguments of its own. That of the crate has doorbells without messages with `--wire
    /// extended` alone, and takes no messages for DMA otherwise; the other one always.
    ///
    /// # Panics
    /// When it does not start.
    #[must_use]
    pub fn engine(self, arguments: &[&str]) -> Server {
        match self {
            Self::Crate => Server::engine(arguments),
            Self::LibvfioUser => {
                let program = backends::program("libvfio-user-engine").expect("it was there before");
                let arguments = if arguments.contains(&"--wire") { &[] } else { arguments };
                Server::start(&program, Scratch::new(), arguments)
            }
        }
    }
}

/// A sample of libvfio-user: `gpio`, `server`. Says so when it is not here.
///
/// # Panics
/// When it does not start, or is not here although all backends are wanted.
#[must_use]
pub fn sample(name: &str) -> Option<Server> {
    let program = backends::program(&format!("libvfio-user-{name}"))?;
    let scratch = Scratch::new();
    let socket = scratch.path("socket").to_str().unwrap().to_owned();
    Some(Server::start_with(&program, scratch, vec!["-v".to_owned(), socket]))
}

/// A running server. Killed when dropped; a test that panics meanwhile prints the end of what it said.
#[derive(Debug)]
pub struct Server {
    program: PathBuf,
    arguments: Vec<String>,
    child: Child,
    log: Capture,
    scratch: Scratch,
}

impl Server {
    /// An NVMe controller for a disk with these bytes.
    ///
    /// # Panics
    /// When it does not start.
    #[must_use]
    pub fn nvme(disk: &[u8], arguments: &[&str]) -> Self {
        let scratch = Scratch::new();
        let disk = scratch.file("disk", disk);
        let arguments = [&["--disk", disk.to_str().unwrap()], arguments].concat();
        Self::start(place::server("nvme"), scratch, &arguments)
    }

    /// A DMA engine.
    ///
    /// # Panics
    /// When it does not start.
    #[must_use]
    pub fn engine(arguments: &[&str]) -> Self {
        Self::start(place::server("engine"), Scratch::new(), arguments)
    }

    fn start(program: &Path, scratch: Scratch, arguments: &[&str]) -> Self {
        let socket = scratch.path("socket").to_str().unwrap().to_owned();
        let own = arguments.iter().map(|&argument| argument.to_owned());
        Self::start_with(
            program,
            scratch,
            ["--socket".to_owned(), socket, "-v".to_owned()].into_iter().chain(own).collect(),
        )
    }

    fn start_with(program: &Path, scratch: Scratch, arguments: Vec<String>) -> Self {
        let (child, log) = spawn(program, &arguments);
        let mut server = Self { program: program.to_owned(), arguments, child, log, scratch };
        server.wait_listening();
        server
    }

    fn wait_listening(&mut self) {
        let what = format!("{} listens", self.program.display());
        wait::until(&what, STARTS, || {
            if let Some(status) = self.child.try_wait().unwrap() {
                panic!("{} ended: {status}\n{}", self.program.display(), self.log.text());
            }
            is_listening(&self.socket()).then_some(())
        });
    }

    /// Its socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.scratch.path("socket")
    }

    /// What stands for it on the command line, with more of it such as `,deadline=500`.
    #[must_use]
    pub fn device(&self, more: &str) -> String {
        format!("socket={}{more}", self.socket().display())
    }

    /// The disk's bytes now.
    ///
    /// # Panics
    /// When it has none.
    #[must_use]
    pub fn disk(&self) -> Vec<u8> {
        fs::read(self.scratch.path("disk")).unwrap()
    }

    /// What it said.
    #[must_use]
    pub fn log(&self) -> String {
        self.log.text()
    }

    /// Kills it on the spot, as a crash would.
    ///
    /// # Panics
    /// When it has gone already.
    pub fn kill(&mut self) {
        assert!(self.is_running(), "{} has gone:\n{}", self.program.display(), self.log.text());
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Starts another one in the place of one that was killed.
    ///
    /// # Panics
    /// When it does not start.
    pub fn restart(&mut self) {
        fs::remove_file(self.socket()).unwrap_or_default();
        (self.child, self.log) = spawn(&self.program, &self.arguments);
        self.wait_listening();
    }

    /// True while it has not ended.
    ///
    /// # Panics
    /// When the host does not tell.
    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Sends it a signal.
    ///
    /// # Panics
    /// When it has gone.
    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// Makes the file behind the memory called `name` empty.
    ///
    /// # Panics
    /// When it has no such file.
    pub fn truncate(&self, name: &str) {
        let folder = format!("/proc/{}/fd", self.child.id());
        let named = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
        let mut named =
            named.filter(|path| fs::read_link(path).is_ok_and(|to| to.to_string_lossy().contains(name)));
        let path = named.next().unwrap_or_else(|| panic!("no file {name}"));
        fs::OpenOptions::new().write(true).open(path).unwrap().set_len(0).unwrap();
    }

    /// How many descriptors it holds.
    ///
    /// # Panics
    /// When it has gone.
    #[must_use]
    pub fn descriptors(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.child.id())).unwrap().count()
    }

    /// Waits until it holds as many descriptors as `before` its clients: it closes theirs some time after
    /// they have gone.
    ///
    /// # Panics
    /// When it does not.
    pub fn lets_go(&self, before: usize) {
        let what = format!("{} lets go of its clients' descriptors", self.program.display());
        wait::until(&what, STARTS, || (self.descriptors() == before).then_some(()));
    }
}

fn spawn(program: &Path, arguments: &[String]) -> (Child, Capture) {
    let child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn();
    let mut child = child.unwrap_or_else(|error| panic!("cannot start {}: {error}", program.display()));
    let log = Capture::new(child.stderr.take().unwrap());
    (child, log)
}

impl Drop for Server {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- {}\n{}\n---", self.program.display(), tail(&self.log.text(), 30));
        }
        // One that a test killed before is gone already.
        self.child.kill().unwrap_or_default();
        self.child.wait().map(|_| ()).unwrap_or_default();
    }
}

/// A stock guest that loads these drivers (by commas) and has `/bin/engine` (`tests/servers/guest.c`) and the
/// functions of
/// [`SHELL`]. With a script it runs that and ends; without, it waits for commands (`. /functions` brings the functions).
///
/// # Errors
/// When the variables of the lab are not set.
///
/// # Panics
/// When the lab's files cannot be read.
pub fn guest(drivers: &str, words: &str, script: Option<&str>) -> Result<Launch, Missing> {
    guest_of("6.12", drivers, words, script)
}

/// The same with the Debian kernel of a series.
///
/// # Errors
/// When the variables of the lab are not set.
///
/// # Panics
/// When the lab's files cannot be read.
pub fn guest_of(series: &str, drivers: &str, words: &str, script: Option<&str>) -> Result<Launch, Missing> {
    let number = series.replace('.', "_");
    let initramfs = initramfs(&number, script)?;
    let kernel = variable(&format!("OUTBOARD_KERNEL_{number}_ELF"))?;
    let mode = if script.is_none() { " outboard.mode=exec" } else { "" };
    let drivers = if drivers.is_empty() { String::new() } else { format!(" outboard.modules={drivers}") };
    let line = format!("console=ttyS0 quiet panic=-1{mode}{drivers} {words}");
    let launch = Launch::kernel(&kernel, &line);
    let initramfs = launch.scratch().file("initramfs", &initramfs);
    Ok(launch.arg("--initramfs").arg(initramfs))
}

fn variable(name: &str) -> Result<PathBuf, Missing> {
    let found = env::var_os(name).map(PathBuf::from);
    found.ok_or_else(|| Missing::new(format!("{name} is not set: run by tests/lab/runner")))
}

/// The kernel (bzImage) and the initramfs of such a guest.
///
/// # Errors
/// When the variables of the lab are not set.
///
/// # Panics
/// When the lab's files cannot be read.
pub fn files(script: Option<&str>) -> Result<(PathBuf, Vec<u8>), Missing> {
    Ok((variable("OUTBOARD_KERNEL_6_12_BZIMAGE")?, initramfs("6_12", script)?))
}

fn initramfs(number: &str, script: Option<&str>) -> Result<Vec<u8>, Missing> {
    let parts = ["INITRAMFS", "DRIVERS"].map(|part| variable(&format!("OUTBOARD_GUEST_{part}_{number}")));
    let [base, drivers] = parts;
    let mut image = archive(&[base?, drivers?]);
    const PROGRAM: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/engine-program"));
    cpio_entry(&mut image, "bin/engine", 0o100_755, PROGRAM);
    cpio_entry(&mut image, "functions", 0o100_644, SHELL.as_bytes());
    if let Some(script) = script {
        cpio_entry(&mut image, "guest.sh", 0o100_644, format!("{SHELL}{script}").as_bytes());
    }
    cpio_entry(&mut image, "TRAILER!!!", 0, &[]);
    Ok(image)
}

//! Backends that others wrote, as `tests/backends/fetch` brings them, each in a process of its own; and stock
//! guests with the drivers for them. Knows how to start a backend, not what it must do: that is in the tests.

use std::env;
use std::fs;
use std::io;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::capture::{Capture, tail};
use crate::daemon::is_listening;
use crate::launch::{Ended, Launch};
use crate::place::{self, Missing};
use crate::scratch::Scratch;
use crate::wait;

/// How long a machine with a script may take on a quiet host, the guest's boot included.
pub const SCRIPT: Duration = Duration::from_secs(60);
/// How long a backend may take until it listens.
const STARTS: Duration = Duration::from_secs(20);

/// The path of a backend: `OUTBOARD_BACKEND_NAME`, which `tests/backends/fetch env` prints. Says so when it
/// is not there.
///
/// # Panics
/// When it is not there although `OUTBOARD_BACKENDS_REQUIRED` is set, as `make test-backends` does.
#[must_use]
pub fn program(name: &str) -> Option<PathBuf> {
    let found = optional_program(name);
    let required = env::var_os("OUTBOARD_BACKENDS_REQUIRED").is_some();
    assert!(found.is_some() || !required, "no {name} here, and tests/backends/fetch should have brought it");
    found
}

/// As [`program`], of one that may be missing everywhere: it takes long to build.
#[must_use]
pub fn optional_program(name: &str) -> Option<PathBuf> {
    let variable = format!("OUTBOARD_BACKEND_{}", name.to_uppercase().replace('-', "_"));
    let found = env::var_os(&variable).map(PathBuf::from).filter(|path| path.is_file());
    if found.is_none() {
        let why = format!("no {name} here ({variable}; tests/backends/fetch brings it)");
        Missing::skipped(thread::current().name().unwrap_or("test"), &why);
    }
    found
}

/// A module of the generic kernel, for guests ([`guest_with_modules`]) or for the lab. It may be missing
/// everywhere.
#[must_use]
pub fn module(name: &str) -> Option<PathBuf> {
    optional_program(name)
}

/// Loads a module into the kernel that the tests run on, which must be the lab's, and the generic one.
///
/// # Errors
/// When it is another one.
///
/// # Panics
/// When the module cannot be loaded there.
pub fn load(module: &Path, arguments: &[&str]) -> Result<(), Missing> {
    hardware((place::in_lab() && Path::new("/dev/uinput").exists()).then_some(()), "generic kernel")?;
    let done = Command::new("insmod").arg(module).args(arguments).output().unwrap();
    let said = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success() || said.contains("File exists"), "{}: {said}", module.display());
    Ok(())
}

/// What stands in for hardware beside a backend, when it was `found`: a lab whose own kernel is the generic
/// one has it.
///
/// # Errors
/// When it is not here, with the reason.
///
/// # Panics
/// When it is not here although this is a lab that `make test-backends` made for it.
pub fn hardware<T>(found: Option<T>, what: &str) -> Result<T, Missing> {
    let missing = if place::in_lab() { Missing::optional } else { Missing::new };
    found.ok_or_else(|| missing(format!("no {what} here: OUTBOARD_LAB_KERNEL=generic")))
}

/// A running backend. Killed when dropped; a test that panics meanwhile prints the end of what it said.
#[derive(Debug)]
pub struct Backend {
    name: String,
    command: Command,
    child: Child,
    output: Capture,
    log: Capture,
    stdin: Option<ChildStdin>,
    socket: PathBuf,
    scratch: Scratch,
}

impl Backend {
    /// Starts a program whose files are in `scratch`, and waits until it listens on `socket` there.
    ///
    /// # Panics
    /// When it does not start.
    #[must_use]
    pub fn start(program: &Path, scratch: Scratch, socket: &str, arguments: &[String]) -> Self {
        let mut backend = Self::start_only(program, scratch, socket, arguments);
        backend.wait();
        backend
    }

    fn wait(&mut self) {
        let what = format!("{} listens on {}", self.name, self.socket.display());
        wait::until(&what, STARTS, || {
            if let Some(status) = self.child.try_wait().unwrap() {
                panic!("{} ended: {status}", self.name);
            }
            is_listening(&self.socket).then_some(())
        });
    }

    /// As [`Backend::start`], without waiting: it connects to us, or takes its time.
    ///
    /// # Panics
    /// When it does not start.
    #[must_use]
    pub fn start_only(program: &Path, scratch: Scratch, socket: &str, arguments: &[String]) -> Self {
        let name = program.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let mut command = Command::new(program);
        command
            .args(arguments)
            // Drivers that lie beside it are named without their path: DPDK takes none from below a folder
            // that everybody may write to, as /tmp is.
            .env("LD_LIBRARY_PATH", program.parent().unwrap_or(Path::new("/")))
            // The lab has OpenSSL's library, but not its modules.
            .env("OPENSSL_MODULES", program.parent().unwrap_or(Path::new("/")))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child =
            command.spawn().unwrap_or_else(|error| panic!("cannot start {}: {error}", program.display()));
        Self {
            name,
            command,
            output: Capture::new(child.stdout.take().unwrap()),
            log: Capture::new(child.stderr.take().unwrap()),
            stdin: child.stdin.take(),
            child,
            socket: scratch.path(socket),
            scratch,
        }
    }

    /// Kills it with SIGKILL, and starts it again with the same arguments, among the same files.
    ///
    /// # Panics
    /// When it does not start.
    pub fn kill_and_restart(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        self.child = self.command.spawn().unwrap();
        self.output = Capture::new(self.child.stdout.take().unwrap());
        self.log = Capture::new(self.child.stderr.take().unwrap());
        self.stdin = self.child.stdin.take();
        self.wait();
    }

    /// A `vhost-device-rng` whose random numbers are the bytes of `source`, so that a guest can tell whose
    /// they are.
    ///
    /// # Panics
    /// When it does not start.
    #[must_use]
    pub fn rng(program: &Path, source: &[u8]) -> Self {
        let scratch = Scratch::new();
        let arguments = [
            format!("--socket-path={}", scratch.path("rng").display()),
            format!("--rng-source={}", scratch.file("source", source).display()),
        ];
        // It numbers its sockets.
        Self::start(program, scratch, "rng0", &arguments)
    }

    /// A passt with `more` of its options, separated by spaces.
    ///
    /// # Panics
    /// When it does not start.
    #[must_use]
    pub fn passt(program: &Path, more: &str) -> Self {
        /// passt moves into an empty folder by pivot_root(), which nothing can do whose root is the first one
        /// of all, as the lab's is.
        const ON_A_ROOT_OF_ITS_OWN: &str = r#"exec unshare -m sh -c 'mkdir -p /passt && mount --rbind / /passt && cd /passt &&
            mount --move . / && exec chroot . "$0" --runas 65534:65534 "$@"' "$0" "$@""#;
        let scratch = Scratch::new();
        let text = format!("--foreground --vhost-user --socket {} {more}", scratch.path("net").display());
        let arguments = text.split_whitespace().map(str::to_owned);
        if place::in_lab() {
            let shell = ["-c", ON_A_ROOT_OF_ITS_OWN, program.to_str().unwrap()].map(str::to_owned);
            let arguments: Vec<_> = shell.into_iter().chain(arguments).collect();
            Self::start(Path::new("/bin/sh"), scratch, "net", &arguments)
        } else {
            Self::start(program, scratch, "net", &arguments.collect::<Vec<_>>())
        }
    }

    /// Its vhost-user socket.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Its files.
    #[must_use]
    pub fn scratch(&self) -> &Scratch {
        &self.scratch
    }

    /// What it printed.
    #[must_use]
    pub fn output(&self) -> &Capture {
        &self.output
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        self.stdin = None;
        if thread::panicking() {
            eprintln!(
                "--- {}\n{}\n{}\n---",
                self.name,
                tail(&self.output.text(), 30),
                tail(&self.log.text(), 60)
            );
        }
        // Some end with the connection.
        self.child.kill().unwrap_or_default();
        self.child.wait().map(|_| ()).unwrap_or_default();
    }
}

/// Sends back what the first client of `listener` says, in another thread, until it has gone; gives the
/// bytes.
///
/// # Panics
/// In that thread, when nobody can be heard.
#[must_use]
pub fn echo(listener: UnixListener) -> JoinHandle<u64> {
    thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        io::copy(&mut stream.try_clone().unwrap(), &mut stream).unwrap()
    })
}

/// A stock guest that loads these drivers (by commas), runs the script and ends. `/bin/guest` is
/// `tests/backends/guest.c`.
///
/// # Errors
/// When the variables of the lab are not set.
///
/// # Panics
/// When the lab's files cannot be read.
pub fn guest(drivers: &str, script: &str) -> Result<Launch, Missing> {
    let files = ["OUTBOARD_KERNEL_6_12_ELF", "OUTBOARD_GUEST_INITRAMFS_6_12", "OUTBOARD_GUEST_DRIVERS_6_12"];
    guest_with(files, drivers, &[], script, |name| {
        Missing::new(format!("{name} is not set: run by tests/lab/runner"))
    })
}

/// As [`guest`], with Debian's generic kernel, which has drivers that its cloud kernels leave out.
///
/// # Errors
/// When `tests/backends/run` did not fetch it.
///
/// # Panics
/// When its files cannot be read.
pub fn generic_guest(drivers: &str, script: &str) -> Result<Launch, Missing> {
    guest_with_modules(&[], drivers, script)
}

/// As [`generic_guest`], with these modules besides, which are loaded last.
///
/// # Errors
/// When `tests/backends/run` did not fetch it.
///
/// # Panics
/// When its files cannot be read.
pub fn guest_with_modules(modules: &[PathBuf], drivers: &str, script: &str) -> Result<Launch, Missing> {
    let files = ["OUTBOARD_GENERIC_KERNEL", "OUTBOARD_GENERIC_INITRAMFS", "OUTBOARD_GENERIC_DRIVERS"];
    guest_with(files, drivers, modules, script, |name| {
        Missing::optional(format!("{name} is not set: it comes with make test-backends"))
    })
}

/// `files` are the variables of a kernel, its initramfs and the archive of its drivers.
fn guest_with(
    files: [&str; 3],
    drivers: &str,
    modules: &[PathBuf],
    script: &str,
    missing: fn(&str) -> Missing,
) -> Result<Launch, Missing> {
    let variable = |name| env::var_os(name).map(PathBuf::from).ok_or_else(|| missing(name));
    let [kernel, initramfs, more] = files;
    let kernel = variable(kernel)?;
    let mut image = archive(&[variable(initramfs)?, variable(more)?]);
    const PROGRAM: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/guest-program"));
    cpio_entry(&mut image, "bin/guest", 0o100_755, PROGRAM);
    cpio_entry(&mut image, "guest.sh", 0o100_644, script.as_bytes());
    let mut drivers = drivers.to_owned();
    for module in modules {
        let name = module.file_stem().unwrap().to_string_lossy();
        cpio_entry(&mut image, &format!("modules/more/{name}.ko"), 0o100_644, &fs::read(module).unwrap());
        cpio_entry(
            &mut image,
            &format!("modules/more/{name}.order"),
            0o100_644,
            format!("{name}\n").as_bytes(),
        );
        drivers = if drivers.is_empty() { name.into_owned() } else { format!("{drivers},{name}") };
    }
    cpio_entry(&mut image, "TRAILER!!!", 0, &[]);
    let line = format!("console=ttyS0 quiet panic=-1 cryptomgr.notests outboard.modules={drivers}");
    let launch = Launch::kernel(&kernel, &line);
    let initramfs = launch.scratch().file("initramfs", &image);
    Ok(launch.arg("--initramfs").arg(initramfs))
}

/// Archives one after another, which a kernel takes as one.
pub(crate) fn archive(parts: &[PathBuf]) -> Vec<u8> {
    let mut image = Vec::new();
    for part in parts {
        image.extend(fs::read(part).unwrap());
        image.resize(image.len().next_multiple_of(4), 0);
    }
    image
}

/// One file of the newc format, as the kernel's `driver-api/early-userspace/buffer-format` has it.
pub(crate) fn cpio_entry(archive: &mut Vec<u8>, name: &str, mode: u32, contents: &[u8]) {
    let (size, name_size) = (contents.len(), name.len() + 1);
    // ino mode uid gid nlink mtime filesize devmajor devminor rdevmajor rdevminor namesize check
    let header = format!(
        "070701{0:08x}{mode:08x}{0:08x}{0:08x}{1:08x}{0:08x}{size:08x}{0:08x}{0:08x}{0:08x}{0:08x}{name_size:08x}{0:08x}",
        0, 1
    );
    archive.extend(header.as_bytes());
    archive.extend(name.as_bytes());
    archive.push(0);
    archive.resize(archive.len().next_multiple_of(4), 0);
    archive.extend(contents);
    archive.resize(archive.len().next_multiple_of(4), 0);
}

/// Checks how a machine with a script ended: by its own power-off, the script content, the device served
/// without us.
///
/// # Panics
/// When something is not so.
pub fn assert_worked(ended: &Ended) {
    assert!(ended.console.replace('\r', "").contains("@exit 0\n"), "the script failed\n{ended}");
    assert_eq!(ended.code, Some(0), "{ended}");
    assert_eq!(ended.stats().text("/end"), "power-off", "{ended}");
    assert_eq!(ended.stats().number("/devices/0/requests_through_vmm"), 0, "{ended}");
    println!("{:?}, {} exits", ended.took, ended.stats().exits());
}

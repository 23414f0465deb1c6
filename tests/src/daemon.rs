//! Debian's `qemu-storage-daemon`: a vhost-user-blk backend that we did not write.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::capture::{Capture, tail};
use crate::place::{self, Missing};
use crate::qmp::Qmp;
use crate::scratch::Scratch;
use crate::wait;

/// Bytes of a sector.
pub const SECTOR: usize = 512;

/// A running daemon that serves one image. Killed when dropped.
#[derive(Debug)]
pub struct StorageDaemon {
    program: PathBuf,
    queues: u16,
    child: Child,
    log: Capture,
    scratch: Scratch,
}

impl StorageDaemon {
    /// Serves an image of `size` bytes, in which every byte of sector n is n modulo 251.
    ///
    /// # Errors
    /// When the program is not installed.
    ///
    /// # Panics
    /// When it does not start.
    pub fn start(size: usize) -> Result<Self, Missing> {
        Self::with_queues(size, 1)
    }

    /// As [`StorageDaemon::start`], with several queues.
    ///
    /// # Errors
    /// When the program is not installed.
    ///
    /// # Panics
    /// When it does not start.
    pub fn with_queues(size: usize, queues: u16) -> Result<Self, Missing> {
        let image: Vec<u8> = (0..size).map(|byte| pattern(byte / SECTOR)).collect();
        Self::export(&image, queues)
    }

    /// Serves an image with these bytes.
    ///
    /// # Errors
    /// When the program is not installed.
    ///
    /// # Panics
    /// When it does not start.
    pub fn serving(contents: &[u8]) -> Result<Self, Missing> {
        Self::export(contents, 1)
    }

    fn export(contents: &[u8], queues: u16) -> Result<Self, Missing> {
        let program = place::storage_daemon()?;
        let scratch = Scratch::new();
        let _image: PathBuf = scratch.file("disk.img", contents);
        let (child, log) = spawn(&program, &scratch, queues);
        let mut daemon = Self { program, queues, child, log, scratch };
        wait::until("qemu-storage-daemon listens", Duration::from_secs(10), || {
            daemon.listens().then_some(())
        });
        Ok(daemon)
    }

    fn listens(&mut self) -> bool {
        if let Some(status) = self.child.try_wait().unwrap() {
            panic!("qemu-storage-daemon ended: {status}\n{}", self.log.text());
        }
        is_listening(&self.socket())
    }

    /// Its vhost-user socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.scratch.path("blk")
    }

    /// The image that it serves.
    #[must_use]
    pub fn image(&self) -> PathBuf {
        self.scratch.path("disk.img")
    }

    /// The image's bytes now.
    ///
    /// # Panics
    /// When it cannot be read.
    #[must_use]
    pub fn contents(&self) -> Vec<u8> {
        fs::read(self.image()).unwrap()
    }

    /// A connection to its monitor.
    #[must_use]
    pub fn monitor(&self) -> Qmp {
        Qmp::connect(&self.scratch.path("qmp"))
    }

    /// The process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Kills it on the spot, as a crash would.
    ///
    /// # Panics
    /// When it has gone already.
    pub fn kill(&mut self) {
        assert!(
            self.child.try_wait().unwrap().is_none(),
            "qemu-storage-daemon has gone:\n{}",
            self.log.text()
        );
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl StorageDaemon {
    /// Starts another one in the place of one that was killed: same image, same socket.
    ///
    /// # Panics
    /// When it does not start.
    pub fn restart(&mut self) {
        for stale in ["blk", "qmp"] {
            // The daemon that was killed has left them.
            fs::remove_file(self.scratch.path(stale)).unwrap_or_default();
        }
        (self.child, self.log) = spawn(&self.program, &self.scratch, self.queues);
        wait::until("qemu-storage-daemon listens again", Duration::from_secs(10), || {
            self.listens().then_some(())
        });
    }
}

fn spawn(program: &Path, scratch: &Scratch, queues: u16) -> (Child, Capture) {
    let (image, socket, qmp) = (scratch.path("disk.img"), scratch.path("blk"), scratch.path("qmp"));
    let export = format!(
        "type=vhost-user-blk,id=export,node-name=disk,addr.type=unix,addr.path={},writable=on,num-queues={queues}",
        socket.display()
    );
    let child = Command::new(program)
        .args(["--blockdev", &format!("driver=file,node-name=disk,filename={}", image.display())])
        .args(["--export", &export])
        .args(["--chardev", &format!("socket,id=qmp,path={},server=on,wait=off", qmp.display())])
        .args(["--monitor", "chardev=qmp"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn();
    let mut child = child.unwrap_or_else(|error| panic!("cannot start qemu-storage-daemon: {error}"));
    let log = Capture::new(child.stderr.take().unwrap());
    (child, log)
}

impl Drop for StorageDaemon {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- qemu-storage-daemon\n{}\n---", tail(&self.log.text(), 20));
        }
        // One that a test killed before is gone already.
        self.child.kill().unwrap_or_default();
        self.child.wait().map(|_| ()).unwrap_or_default();
    }
}

/// The byte that fills sector `number` at first.
#[must_use]
pub fn pattern(number: usize) -> u8 {
    u8::try_from(number % 251).unwrap_or(0)
}

/// True when somebody listens on the unix socket `path`. Looks, and does not connect: most backends take one
/// connection.
///
/// # Panics
/// When the host has no `/proc/net/unix`.
#[must_use]
pub fn is_listening(path: &Path) -> bool {
    const ACCEPTS: u32 = 0x10000;
    let table = fs::read_to_string("/proc/net/unix").unwrap();
    table.lines().any(|line| {
        let mut words = line.split_whitespace();
        let flags = words.nth(3).and_then(|flags| u32::from_str_radix(flags, 16).ok()).unwrap_or(0);
        flags & ACCEPTS != 0 && words.nth(3).is_some_and(|name| Path::new(name) == path)
    })
}

//! vhost-user-blk backends that we did not write: Debian's `qemu-storage-daemon`, which serves any number of
//! disks, and QEMU's example `vhost-user-blk`, which keeps notes of what is in flight.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

pub use outboard_testkit::disk::{SECTOR, pattern};

pub use outboard_testkit::served::is_listening;

use crate::backends;
use crate::capture::{Capture, tail};
use crate::place::{self, Missing};
use crate::qmp::Qmp;
use crate::scratch::Scratch;
use crate::wait;

/// Which program it is, and what it serves.
#[derive(Clone, Copy, Debug)]
enum Kind {
    /// `qemu-storage-daemon`, without INFLIGHT.
    Qemu { disks: usize, queues: u16 },
    /// QEMU's `vhost-user-blk`, with INFLIGHT: one disk, one machine, and it ends with the connection.
    Example,
}

impl Kind {
    fn disks(self) -> usize {
        match self {
            Self::Qemu { disks, .. } => disks,
            Self::Example => 1,
        }
    }
}

/// A running daemon that serves one image, or several. Killed when dropped.
#[derive(Debug)]
pub struct StorageDaemon {
    program: PathBuf,
    kind: Kind,
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
        Self::start_kind(place::storage_daemon()?, Kind::Qemu { disks: 1, queues }, &[image(size)])
    }

    /// Serves an image with these bytes.
    ///
    /// # Errors
    /// When the program is not installed.
    ///
    /// # Panics
    /// When it does not start.
    pub fn serving(contents: &[u8]) -> Result<Self, Missing> {
        Self::serving_all(&[contents.to_vec()])
    }

    /// Serves several images, each on a socket of its own, from one process.
    ///
    /// # Errors
    /// When the program is not installed.
    ///
    /// # Panics
    /// When it does not start.
    pub fn serving_all(images: &[Vec<u8>]) -> Result<Self, Missing> {
        Self::start_kind(place::storage_daemon()?, Kind::Qemu { disks: images.len(), queues: 1 }, images)
    }

    /// As [`StorageDaemon::start`], with QEMU's `vhost-user-blk`, which has INFLIGHT. Says so when it is not
    /// there.
    ///
    /// # Panics
    /// When it does not start.
    #[must_use]
    pub fn with_notes(size: usize) -> Option<Self> {
        Self::start_kind(backends::program("vhost-user-blk")?, Kind::Example, &[image(size)]).ok()
    }

    /// As [`StorageDaemon::start`], with a daemon of QEMU 10, which tells of a disk that was resized. Says so
    /// when it is not there.
    ///
    /// # Panics
    /// When it does not start.
    #[must_use]
    pub fn of_qemu_10(size: usize) -> Option<Self> {
        let kind = Kind::Qemu { disks: 1, queues: 1 };
        Self::start_kind(backends::program("qemu-storage-daemon-10")?, kind, &[image(size)]).ok()
    }

    fn start_kind(program: PathBuf, kind: Kind, images: &[Vec<u8>]) -> Result<Self, Missing> {
        let scratch = Scratch::new();
        for (n, contents) in images.iter().enumerate() {
            let _image: PathBuf = scratch.file(&image_name(n), contents);
        }
        let (child, log) = spawn(&program, &scratch, kind);
        let mut daemon = Self { program, kind, child, log, scratch };
        wait::until("qemu-storage-daemon listens", Duration::from_secs(10), || {
            daemon.listens().then_some(())
        });
        Ok(daemon)
    }

    fn listens(&mut self) -> bool {
        if let Some(status) = self.child.try_wait().unwrap() {
            panic!("{} ended: {status}\n{}", self.program.display(), self.log.text());
        }
        (0..self.kind.disks()).all(|n| is_listening(&self.socket_of(n)))
    }

    /// Its vhost-user socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.socket_of(0)
    }

    /// The socket of its disk `n`.
    #[must_use]
    pub fn socket_of(&self, n: usize) -> PathBuf {
        self.scratch.path(&socket_name(n))
    }

    /// The image that it serves.
    #[must_use]
    pub fn image(&self) -> PathBuf {
        self.scratch.path(&image_name(0))
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

    /// Sends it a signal.
    ///
    /// # Panics
    /// When it has gone.
    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// Waits until it has ended by itself, as [`StorageDaemon::with_notes`] does when its machine hangs up.
    ///
    /// # Panics
    /// When it does not.
    pub fn wait_for_end(&mut self) {
        let child = &mut self.child;
        wait::until("the daemon ends", Duration::from_secs(10), || child.try_wait().unwrap());
    }

    /// Starts it anew if it has ended, as whoever looks after it would.
    ///
    /// # Panics
    /// When it does not start.
    pub fn look_after(&mut self) {
        if self.child.try_wait().unwrap().is_some() {
            self.restart();
        }
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
        for stale in (0..self.kind.disks()).map(socket_name).chain(["qmp".to_owned()]) {
            // The daemon that was killed has left them.
            fs::remove_file(self.scratch.path(&stale)).unwrap_or_default();
        }
        (self.child, self.log) = spawn(&self.program, &self.scratch, self.kind);
        wait::until("qemu-storage-daemon listens again", Duration::from_secs(10), || {
            self.listens().then_some(())
        });
    }
}

/// The first has no number.
fn socket_name(n: usize) -> String {
    if n == 0 { "blk".to_owned() } else { format!("blk{n}") }
}

fn image_name(n: usize) -> String {
    if n == 0 { "disk.img".to_owned() } else { format!("disk{n}.img") }
}

fn image(size: usize) -> Vec<u8> {
    (0..size).map(|byte| pattern(byte / SECTOR)).collect()
}

fn spawn(program: &Path, scratch: &Scratch, kind: Kind) -> (Child, Capture) {
    let mut command = Command::new(program);
    match kind {
        Kind::Qemu { disks, queues } => {
            // Options are done one after the other: once it serves its disks, its monitor is there.
            let qmp = scratch.path("qmp");
            command.args(["--chardev", &format!("socket,id=qmp,path={},server=on,wait=off", qmp.display())]);
            command.args(["--monitor", "chardev=qmp"]);
            for n in 0..disks {
                let (image, socket) = (scratch.path(&image_name(n)), scratch.path(&socket_name(n)));
                let blockdev =
                    format!("driver=file,node-name=disk{n},discard=unmap,filename={}", image.display());
                let export = format!(
                    "type=vhost-user-blk,id=export{n},node-name=disk{n},addr.type=unix,addr.path={},writable=on,\
                     num-queues={queues}",
                    socket.display()
                );
                command.args(["--blockdev", &blockdev, "--export", &export]);
            }
        }
        Kind::Example => {
            command.arg("-s").arg(scratch.path(&socket_name(0))).arg("-b").arg(scratch.path(&image_name(0)));
        }
    }
    let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn();
    let mut child = child.unwrap_or_else(|error| panic!("cannot start {}: {error}", program.display()));
    let log = Capture::new(child.stderr.take().unwrap());
    (child, log)
}

impl Drop for StorageDaemon {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- {}\n{}", self.program.display(), tail(&self.log.text(), 20));
            // A daemon that hangs, and one that was never asked, are told apart by this.
            let listening = (0..self.kind.disks()).filter(|n| is_listening(&self.socket_of(*n))).count();
            let state =
                |file: &str| fs::read_to_string(format!("/proc/{}/{file}", self.pid())).unwrap_or_default();
            let line =
                state("status").lines().find(|line| line.starts_with("State:")).unwrap_or("gone").to_owned();
            eprintln!("--- {line}, in {}, listens on {listening}\n---", state("wchan"));
        }
        // One that a test killed before is gone already.
        self.child.kill().unwrap_or_default();
        self.child.wait().map(|_| ()).unwrap_or_default();
    }
}

//! QEMU as a vfio-user server of its own devices (`x-vfio-user-server`, on libvfio-user), as
//! `tests/backends/fetch` builds it. Knows how to start one, not what its devices do. It ends with its last
//! connection.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use crate::backends::optional_program;
use crate::capture::{Capture, tail};
use crate::daemon::is_listening;
use crate::scratch::Scratch;
use crate::wait;

const STARTS: Duration = Duration::from_secs(20);

/// A running QEMU. Killed when dropped; a test that panics meanwhile prints the end of what it said.
#[derive(Debug)]
pub struct QemuServer {
    child: Child,
    log: Capture,
    sockets: Vec<PathBuf>,
    scratch: Scratch,
}

impl QemuServer {
    /// One that serves each device whose options hold `id=`, in this order; `None` where there is no such
    /// QEMU. `@` in the options is the folder for its files.
    ///
    /// # Panics
    /// When it does not start.
    #[must_use]
    pub fn start(scratch: Scratch, options: &[&str]) -> Option<Self> {
        let program = optional_program("qemu-server")?;
        let (mut command, mut sockets) = (Command::new(program), Vec::new());
        command.args("-machine x-remote,vfio-user=on -accel tcg -nodefaults -display none".split(' '));
        for option in options {
            let (kind, value) = option.split_once(' ').expect("-device VALUE");
            command.arg(kind).arg(value.replace('@', &scratch.folder().display().to_string()));
            let id = value.split(',').find_map(|word| word.strip_prefix("id="));
            if let Some(id) = id.filter(|_| kind == "-device") {
                let socket = scratch.path(&format!("{id}.socket"));
                let path = socket.display();
                command.arg("-object").arg(format!(
                    r#"{{"qom-type":"x-vfio-user-server","id":"server-{id}","device":"{id}","socket":{{"type":"unix","path":"{path}"}}}}"#
                ));
                sockets.push(socket);
            }
        }
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn();
        let mut child = child.unwrap_or_else(|error| panic!("cannot start QEMU: {error}"));
        let log = Capture::new(child.stderr.take().unwrap());
        let mut server = Self { child, log, sockets, scratch };
        wait::until("QEMU listens", STARTS, || {
            if let Some(status) = server.child.try_wait().unwrap() {
                panic!("QEMU ended: {status}\n{}", server.log.text());
            }
            server.sockets.iter().all(|socket| is_listening(socket)).then_some(())
        });
        Some(server)
    }

    /// One with a disk of these bytes, called `disk`, and these devices.
    ///
    /// # Panics
    /// When it does not start.
    #[must_use]
    pub fn with_disk(bytes: &[u8], devices: &[&str]) -> Option<Self> {
        let scratch = Scratch::new();
        let disk = scratch.file("disk", bytes);
        let drive = format!("-drive if=none,id=disk,format=raw,file={}", disk.display());
        Self::start(scratch, &[&[drive.as_str()], devices].concat())
    }

    /// The socket of the first, second, … device.
    ///
    /// # Panics
    /// When there are fewer.
    #[must_use]
    pub fn socket(&self, device: usize) -> &Path {
        &self.sockets[device]
    }

    /// What stands for a device on the command line, with more of it such as `,deadline=500`.
    #[must_use]
    pub fn device(&self, device: usize, more: &str) -> String {
        format!("socket={}{more}", self.socket(device).display())
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

    /// True while it has not ended.
    ///
    /// # Panics
    /// When the host does not tell.
    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Kills it on the spot, as a crash would.
    ///
    /// # Panics
    /// When it has gone already.
    pub fn kill(&mut self) {
        assert!(self.is_running(), "QEMU has gone:\n{}", self.log.text());
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Sends it a signal.
    ///
    /// # Panics
    /// When it has gone.
    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }
}

impl Drop for QemuServer {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- QEMU\n{}\n---", tail(&self.log.text(), 30));
        }
        // It has gone with its last connection, most often.
        self.child.kill().unwrap_or_default();
        self.child.wait().map(|_| ()).unwrap_or_default();
    }
}

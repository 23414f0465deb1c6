//! A server in a process of its own, and memory for it to reach.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, dead_code)]
#![allow(clippy::cast_possible_truncation, clippy::missing_panics_doc)]

use std::fs::File;
use std::io::Read;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vfio_user::Client;
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};

const LIMIT: Duration = Duration::from_secs(20);

/// Waits for a condition.
pub(crate) fn until<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(found) = condition() {
            return found;
        }
        assert!(begun.elapsed() < LIMIT, "{what} did not happen within {LIMIT:?}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A folder that vanishes.
pub(crate) struct Folder(PathBuf);

impl Folder {
    pub(crate) fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("servers-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.0).unwrap_or_default();
    }
}

/// A running server; killed when dropped.
pub(crate) struct Running {
    child: Child,
    pub(crate) folder: Folder,
}

impl Running {
    pub(crate) fn start(program: &str, folder: Folder, arguments: &[&str]) -> Self {
        let child = Command::new(program)
            .arg("--socket")
            .arg(folder.path("socket"))
            .args(arguments)
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let running = Self { child, folder };
        let socket = running.socket();
        until("listening", || socket.exists().then_some(()));
        running
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.folder.path("socket")
    }

    /// Connects; the socket's file is there a moment before anybody listens.
    pub(crate) fn client(&self) -> Client {
        let socket = self.socket();
        until("a connection", || Client::new(&socket).ok())
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn descriptors(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.pid())).unwrap().count()
    }

    pub(crate) fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.child.kill().unwrap_or_default();
        self.child.wait().map(|_| ()).unwrap_or_default();
    }
}

/// A guest's memory.
pub(crate) struct Memory {
    pub(crate) file: File,
    map: MmapRegion,
    pub(crate) base: u64,
}

impl Memory {
    pub(crate) fn new(base: u64, size: u64) -> Self {
        let file = File::from(memfd_create("guest", MemfdFlags::CLOEXEC).unwrap());
        ftruncate(&file, size).unwrap();
        let size = usize::try_from(size).unwrap();
        let map = MmapRegion::from_file(FileOffset::new(file.try_clone().unwrap(), 0), size).unwrap();
        Self { file, map, base }
    }

    pub(crate) fn give_to(&self, client: &mut Client) {
        let size = self.map.size() as u64;
        client.dma_map(0, self.base, size, self.file.as_raw_fd()).unwrap();
    }

    pub(crate) fn write(&self, address: u64, data: &[u8]) {
        let offset = usize::try_from(address - self.base).unwrap();
        self.map.as_volatile_slice().write_slice(data, offset).unwrap();
    }

    pub(crate) fn read(&self, address: u64, length: usize) -> Vec<u8> {
        let mut data = vec![0; length];
        let offset = usize::try_from(address - self.base).unwrap();
        self.map.as_volatile_slice().read_slice(&mut data, offset).unwrap();
        data
    }
}

/// Memory that a region brought along.
pub(crate) fn map_region(client: &Client, region: u32) -> MmapRegion {
    let region = client.region(region).unwrap();
    let from = region.file_offset.as_ref().expect("a region with a descriptor");
    let size = usize::try_from(region.size).unwrap();
    MmapRegion::from_file(FileOffset::from_arc(from.arc().clone(), from.start()), size).unwrap()
}

/// An interrupt's eventfd.
pub(crate) struct Line(pub(crate) File);

impl Line {
    pub(crate) fn new() -> Self {
        Self(File::from(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap()))
    }

    /// Interrupts since the last look.
    pub(crate) fn count(&self) -> u64 {
        let mut bytes = [0; 8];
        match (&self.0).read_exact(&mut bytes) {
            Ok(()) => u64::from_ne_bytes(bytes),
            Err(_) => 0,
        }
    }
}

/// Some bytes that are not all alike.
pub(crate) fn pattern(length: usize, seed: u8) -> Vec<u8> {
    (0..length).map(|at| (at / 251 + at * 7) as u8 ^ seed).collect()
}

pub(crate) fn disk(folder: &Folder, size: usize) -> PathBuf {
    let path = folder.path("disk");
    std::fs::write(&path, vec![0; size]).unwrap();
    path
}

pub(crate) fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

//! What several tests of this crate need: guest memory in a memfd, fds counted, a directory that goes away.
#![allow(dead_code, unreachable_pub, reason = "each test file uses a part")]

pub mod fetched;
pub mod iommu;
pub mod queue;
pub mod vfio_user;

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use transport::memory::{GuestAddr, MemoryMap, SharedRegion};
use transport::peer::socket::Attempts;
use transport::peer::{Error, Limits};
use transport::testing::{Offer, Script, ScriptedBackend};
use transport::vhost_user::{Call, Connection, Kick, ProtocolFeatures, Ring, RingBase, Session, Wanted};

/// Guest memory of one region at address 0, read and written through its file.
pub struct GuestMemory {
    pub map: MemoryMap,
    file: Arc<OwnedFd>,
}

impl GuestMemory {
    pub fn new(size: u64) -> Self {
        let file = rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&file, size).unwrap();
        let file = Arc::new(file);
        let region = SharedRegion::new(GuestAddr(0), size, Arc::clone(&file), 0);
        Self { map: MemoryMap::new(vec![region]).unwrap(), file }
    }

    pub fn write(&self, at: u64, bytes: &[u8]) {
        assert_eq!(rustix::io::pwrite(self.file.as_fd(), bytes, at).unwrap(), bytes.len());
    }

    pub fn read(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        assert_eq!(rustix::io::pread(self.file.as_fd(), &mut bytes, at).unwrap(), len);
        bytes
    }

    pub fn read_u16(&self, at: u64) -> u16 {
        u16::from_le_bytes(self.read(at, 2).try_into().unwrap())
    }
}

/// Open descriptors of this process. Tests that count run alone in their process.
pub fn open_fds() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// A directory of this test, removed at its end.
pub struct Scratch(pub PathBuf);

impl Scratch {
    pub fn new() -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("outboard-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        drop(std::fs::remove_dir_all(&self.0));
    }
}

/// A process of this test, killed at its end.
pub struct Peer(pub Child);

impl Drop for Peer {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

/// Connects to a backend that may still be starting.
pub fn connect_patiently(socket: &Path, limits: &Limits) -> Connection {
    let mut attempts = Attempts::lasting(Some(Duration::from_secs(20)));
    Connection::connect_patiently(socket, limits, &mut attempts).unwrap()
}

/// Waits until `done`, or fails with what was waited for.
pub fn eventually(what: &str, limit: Duration, mut done: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !done() {
        assert!(begin.elapsed() < limit, "{what}: not within {limit:?}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Eventfds and addresses of rings 0 and 1 in [`GuestMemory`] of 2 MiB.
pub struct Rings {
    pub kicks: [Kick; 2],
    pub calls: [Call; 2],
}

impl Rings {
    pub fn new() -> Self {
        let kicks = [Kick::new().unwrap(), Kick::new().unwrap()];
        Self { kicks, calls: [Call::new().unwrap(), Call::new().unwrap()] }
    }

    /// Ring 0 goes on at `base`, ring 1 begins anew.
    pub fn rings(&self, base: u32) -> Vec<Ring<'_>> {
        let ring = |index: u16| Ring {
            index,
            size: 128,
            descriptor: GuestAddr(0x1_0000 * (1 + u64::from(index))),
            available: GuestAddr(0x1_0000 * (1 + u64::from(index)) + 0x2000),
            used: GuestAddr(0x1_0000 * (1 + u64::from(index)) + 0x3000),
            base: RingBase(if index == 0 { base } else { 0 }),
            kick: &self.kicks[usize::from(index)],
            call: &self.calls[usize::from(index)],
            error: None,
        };
        vec![ring(0), ring(1)]
    }
}

/// Connects, negotiates, reads and writes the configuration, starts two rings, stops them.
pub fn whole_life(stream: UnixStream, limits: &Limits, wanted: &Wanted) -> Result<Session, Error> {
    let memory = GuestMemory::new(2 << 20);
    let rings = Rings::new();
    let mut session = Connection::from_stream(stream, "scripted", limits)?.negotiate(wanted)?;
    if session.protocol().contains(ProtocolFeatures::CONFIG) {
        session.read_config(60)?;
        session.write_config(8, &[1, 2, 3, 4])?;
    }
    let features = session.offered().accept(session.offered().bits()).unwrap();
    let live = session.go_live(features, &memory.map, &rings.rings(0))?;
    let (session, bases) = live.stop()?;
    assert_eq!(bases, [RingBase(0), RingBase(0)]);
    Ok(session)
}

/// Runs a whole life with a backend that follows `script`; the outcome, and how long it took.
pub fn life_with(offer: Offer, script: Script, deadline: Duration) -> (Result<(), Error>, Duration) {
    let (_backend, stream) = ScriptedBackend::pair(offer, script).unwrap();
    let begin = Instant::now();
    let outcome = whole_life(stream, &Limits::new(deadline), &Wanted::default()).map(drop);
    (outcome, begin.elapsed())
}

//! Against a back-end that we did not write: libvhost-user in Debian's qemu-storage-daemon, vhost-user-blk.

#![cfg(test)]

mod support;

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use support::{GuestMemory, Scratch, eventually};
use transport::memory_map::GuestAddr;
use transport::vhost_user::features::bit;
use transport::vhost_user::{
    Call, Connection, Kick, Limits, LiveSession, ProtocolFeatures, Ring, RingBase, Session, Wanted,
};

const SECTORS: u64 = 2048;

struct Daemon {
    child: Child,
    socket: PathBuf,
    _scratch: Scratch,
}

impl Daemon {
    /// `None`, with a printed reason, where the program is not installed.
    fn start() -> Option<Self> {
        let scratch = Scratch::new();
        let (image, socket) = (scratch.path("disk"), scratch.path("s"));
        let pattern: Vec<u8> = (0..SECTORS * 512).map(|n| (n / 512 % 251) as u8).collect();
        std::fs::write(&image, pattern).unwrap();
        let child = Command::new("qemu-storage-daemon")
            .args(["--blockdev", &format!("driver=file,node-name=d,filename={}", image.display())])
            .args([
                "--export",
                &format!(
                    "type=vhost-user-blk,id=e,node-name=d,addr.type=unix,addr.path={},writable=on,num-queues=2",
                    socket.display()
                ),
            ])
            .stderr(Stdio::inherit())
            .spawn();
        let child = match child {
            Ok(child) => child,
            Err(error) => {
                println!("skipped: qemu-storage-daemon does not start: {error}");
                return None;
            }
        };
        let daemon = Self { child, socket, _scratch: scratch };
        eventually("the daemon's socket", Duration::from_secs(10), || daemon.socket.exists());
        Some(daemon)
    }

    fn connect(&self, wanted: &Wanted) -> Session {
        let limits = Limits::new(Duration::from_secs(5));
        let mut connection = None;
        // The socket file appears before the daemon listens on it.
        eventually("a connection", Duration::from_secs(10), || {
            match Connection::connect(&self.socket, &limits) {
                Ok(made) => connection = Some(made),
                Err(error) => assert!(error.is_absent(), "{error:?}"),
            }
            connection.is_some()
        });
        connection.unwrap().negotiate(wanted).unwrap()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

const DESC: u64 = 0x1000;
const AVAIL: u64 = 0x3000;
const USED: u64 = 0x4000;
const REQUEST: u64 = 0x8000;
const SIZE: u16 = 64;

/// The guest's side of one split ring, driven through the memfd.
struct Driver {
    memory: GuestMemory,
    kick: Kick,
    call: Call,
    next: u16,
}

impl Driver {
    fn new() -> Self {
        let memory = GuestMemory::new(2 << 20);
        Self { memory, kick: Kick::new().unwrap(), call: Call::new().unwrap(), next: 0 }
    }

    fn ring(&self, base: RingBase) -> Ring<'_> {
        Ring {
            index: 0,
            size: SIZE,
            descriptor: GuestAddr(DESC),
            available: GuestAddr(AVAIL),
            used: GuestAddr(USED),
            base,
            kick: &self.kick,
            call: &self.call,
            error: None,
        }
    }

    fn go_live(&self, session: Session, base: RingBase) -> LiveSession {
        let features = session.offered().accept(1 << bit::VERSION_1).unwrap();
        session.go_live(features, &self.memory.map, &[self.ring(base)]).unwrap()
    }

    fn descriptor(&self, index: u64, at: u64, len: u32, flags: u16, next: u16) {
        let mut bytes = at.to_le_bytes().to_vec();
        bytes.extend(len.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        self.memory.write(DESC + 16 * index, &bytes);
    }

    /// One virtio-blk request: 0 reads, 1 writes.
    fn request(&mut self, kind: u32, sector: u64, data: &[u8]) -> Vec<u8> {
        let mut head = kind.to_le_bytes().to_vec();
        head.extend([0; 4]);
        head.extend(sector.to_le_bytes());
        self.memory.write(REQUEST, &head);
        self.memory.write(REQUEST + 0x1000, data);
        self.memory.write(REQUEST + 0x100, &[0xff]);
        self.descriptor(0, REQUEST, 16, 1, 1);
        self.descriptor(
            1,
            REQUEST + 0x1000,
            u32::try_from(data.len()).unwrap(),
            if kind == 0 { 3 } else { 1 },
            2,
        );
        self.descriptor(2, REQUEST + 0x100, 1, 2, 0);
        self.memory.write(AVAIL + 4 + 2 * u64::from(self.next % SIZE), &0u16.to_le_bytes());
        self.next = self.next.wrapping_add(1);
        self.memory.write(AVAIL + 2, &self.next.to_le_bytes());
        self.kick.ring().unwrap();
        eventually("the used index", Duration::from_secs(5), || self.memory.read_u16(USED + 2) == self.next);
        assert_eq!(self.memory.read(REQUEST + 0x100, 1), [0], "status of the request");
        self.memory.read(REQUEST + 0x1000, data.len())
    }
}

#[test]
fn blocks_are_read_and_written_and_rings_stop_and_start_again() {
    let Some(daemon) = Daemon::start() else { return };
    let mut session = daemon.connect(&Wanted::default());
    assert!(session.protocol().contains(ProtocolFeatures::REPLY_ACK.with(ProtocolFeatures::CONFIG)));
    assert_eq!(session.queue_num(), 2);
    let config = session.read_config(256).unwrap();
    assert!(config.len() >= 36, "{} bytes", config.len());
    assert_eq!(config[..8], SECTORS.to_le_bytes());

    let mut driver = Driver::new();
    let live = driver.go_live(session, RingBase(0));
    assert_eq!(driver.request(0, 7, &[0; 512]), [7; 512]);
    driver.request(1, 9, &[0xab; 512]);
    assert_eq!(driver.request(0, 9, &[0; 512]), [0xab; 512]);
    assert!(driver.call.take().unwrap() > 0, "the back-end rang the call");

    let (session, bases) = live.stop().unwrap();
    assert_eq!(bases, [RingBase(3)]);
    let live = driver.go_live(session, bases[0]);
    assert_eq!(driver.request(0, 10, &[0; 512]), [10; 512]);
    let stats = live.stats();
    assert!(stats.failures == 0 && stats.sent > 20 && stats.answers > 5, "{stats:?}");

    // A guest reset begins anew at 0.
    let (session, _) = live.stop().unwrap();
    driver.memory.write(AVAIL, &[0; 4]);
    driver.memory.write(USED, &[0; 4]);
    driver.next = 0;
    let live = driver.go_live(session, RingBase(0));
    assert_eq!(driver.request(0, 11, &[0; 512]), [11; 512]);
    assert_eq!(live.stop().unwrap().1, [RingBase(1)]);
}

#[test]
fn a_backend_without_protocol_features_serves_as_of_old() {
    let Some(daemon) = Daemon::start() else { return };
    let session = daemon.connect(&Wanted::default().adjust("-protocol_features").unwrap());
    assert_eq!(session.protocol(), ProtocolFeatures::NONE);
    let mut driver = Driver::new();
    let live = driver.go_live(session, RingBase(0));
    assert_eq!(driver.request(0, 3, &[0; 512]), [3; 512]);
    assert_eq!(live.stop().unwrap().1, [RingBase(1)]);
}

#[test]
fn a_second_connection_to_a_busy_backend_fails_by_deadline_with_a_hint() {
    let Some(daemon) = Daemon::start() else { return };
    let _first = daemon.connect(&Wanted::default());
    let limits = Limits::new(Duration::from_millis(200));
    let begin = std::time::Instant::now();
    let second = Connection::connect(&daemon.socket, &limits);
    let error = second.and_then(|second| second.negotiate(&Wanted::default())).err().unwrap();
    assert!(begin.elapsed() < Duration::from_secs(1));
    println!("{error} ({:?})", error.hint());
    assert!(error.hint().is_some());
}

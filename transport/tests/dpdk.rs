//! Against DPDK's vhost library, which we did not write: `dpdk-testpmd` with `net_vhost`, by `tests/backends/fetch`. What
//! only it understands: MTU, RARP, STATUS, and an IOMMU whose misses it asks about.

#![cfg(test)]

mod support;

use std::cell::Cell;
use std::env;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use support::{GuestMemory, Scratch, eventually};
use transport::memory_map::{GuestAddr, Iova};
use transport::vhost_user::features::bit;
use transport::vhost_user::iotlb::{Access, IovaRange, MissAnswers};
use transport::vhost_user::message::Iotlb;
use transport::vhost_user::{
    BackendRequests, Call, Connection, IovaMap, Kick, Limits, LiveSession, ProtocolFeatures, Refused, Ring,
    RingBase, RingError, Session, Wanted,
};

type P = ProtocolFeatures;

const MTU_FEATURE: u64 = 1 << 3;
const VERSION_1: u64 = 1 << 32;
const FRAME: usize = 600;
const HEADER: usize = 12;

struct Testpmd {
    child: Child,
    socket: PathBuf,
    _scratch: Scratch,
}

impl Testpmd {
    /// `None`, with a printed reason, where it was not fetched.
    fn start(options: &str) -> Option<Self> {
        let path = |name: &str| env::var_os(format!("OUTBOARD_BACKEND_DPDK_{name}")).map(PathBuf::from);
        let (Some(program), Some(vhost), Some(ring)) =
            (path("TESTPMD"), path("NET_VHOST"), path("MEMPOOL_RING"))
        else {
            let required = env::var_os("OUTBOARD_BACKENDS_REQUIRED").is_some();
            assert!(!required, "no dpdk-testpmd: tests/backends/fetch");
            println!("skipped: no dpdk-testpmd here (tests/backends/fetch brings it)");
            return None;
        };
        let scratch = Scratch::new();
        let socket = scratch.path("net");
        let name = |path: &Path| path.file_name().unwrap().to_str().unwrap().to_owned();
        let line = format!(
            "--lcores 0@0,1@0 --no-huge -m 128 --no-pci --no-shconf --no-telemetry -d {} -d {} \
             --vdev net_vhost0,iface={},queues=1{options} -- --forward-mode=io --port-topology=loop \
             --total-num-mbufs=4096 --no-mlockall --disable-link-check --auto-start",
            name(&vhost),
            name(&ring),
            socket.display()
        );
        let child = Command::new(&program)
            .args(line.split_whitespace())
            .env("LD_LIBRARY_PATH", program.parent().unwrap())
            // It ends with its standard input.
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        eventually("dpdk-testpmd's socket", Duration::from_secs(30), || socket.exists());
        Some(Self { child, socket, _scratch: scratch })
    }

    fn connect(&self, wanted: &Wanted) -> Session {
        let limits = Limits::new(Duration::from_secs(10));
        let mut attempts = transport::vhost_user::reconnect::Attempts::lasting(Some(Duration::from_secs(20)));
        let connection = Connection::connect_patiently(&self.socket, &limits, &mut attempts).unwrap();
        connection.negotiate(wanted).unwrap()
    }
}

impl Drop for Testpmd {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

/// Where the guest keeps things; the IOVA of each is behind [`Driver::iova`].
const DESC: u64 = 0x1000;
const AVAIL: u64 = 0x3000;
const USED: u64 = 0x4000;
const APART: u64 = 0x1_0000;
const BUFFER: u64 = 0x5000;
const SIZE: u16 = 64;

/// The guest's side of a receiving (0) and a sending ring (1), one buffer each.
struct Driver {
    memory: GuestMemory,
    kicks: [Kick; 2],
    calls: [Call; 2],
    errors: [RingError; 2],
    /// Added to every address that the driver tells.
    iova: u64,
    received: u16,
    sent: u16,
}

impl Driver {
    fn new(iova: u64) -> Self {
        Self {
            memory: GuestMemory::new(2 << 20),
            kicks: [Kick::new().unwrap(), Kick::new().unwrap()],
            calls: [Call::new().unwrap(), Call::new().unwrap()],
            errors: [RingError::new().unwrap(), RingError::new().unwrap()],
            iova,
            received: 0,
            sent: 0,
        }
    }

    fn go_live(&self, session: Session, features: u64) -> LiveSession {
        let features = session.offered().accept(features).unwrap();
        let ring = |index: u16| {
            let at = self.iova + APART * (1 + u64::from(index));
            Ring {
                index,
                size: SIZE,
                descriptor: GuestAddr(at + DESC),
                available: GuestAddr(at + AVAIL),
                used: GuestAddr(at + USED),
                base: RingBase(0),
                kick: &self.kicks[usize::from(index)],
                call: &self.calls[usize::from(index)],
                error: Some(&self.errors[usize::from(index)]),
            }
        };
        session.go_live(features, &self.memory.map, &[ring(0), ring(1)]).unwrap()
    }

    /// Offers the buffer of a ring, so many bytes of it.
    fn offer(&self, ring: u16, length: usize, count: u16) {
        let at = APART * (1 + u64::from(ring));
        let mut descriptor = (self.iova + at + BUFFER).to_le_bytes().to_vec();
        descriptor.extend(u32::try_from(length).unwrap().to_le_bytes());
        // Flags: the device writes into what it receives into.
        descriptor.extend([2 * u8::from(ring == 0), 0, 0, 0]);
        self.memory.write(at + DESC, &descriptor);
        self.memory.write(at + AVAIL + 4 + 2 * u64::from((count - 1) % SIZE), &[0, 0]);
        self.memory.write(at + AVAIL + 2, &count.to_le_bytes());
        self.kicks[usize::from(ring)].ring().unwrap();
    }

    fn used(&self, ring: u16) -> u16 {
        self.memory.read_u16(APART * (1 + u64::from(ring)) + USED + 2)
    }

    /// Sends a frame and wants it back; meanwhile `serve` does what there is to be done. One that DPDK drops, as it does
    /// while it waits for a translation, is sent again.
    fn loop_back(&mut self, mut serve: impl FnMut()) {
        self.received += 1;
        let mut frame = vec![0; HEADER];
        frame.extend((0..FRAME).map(|n| u8::try_from((n + usize::from(self.received)) % 251).unwrap()));
        self.offer(0, 2048, self.received);
        self.memory.write(2 * APART + BUFFER, &frame);
        let begun = Instant::now();
        while self.used(0) != self.received {
            assert!(begun.elapsed() < Duration::from_secs(20), "frame {} does not come back", self.received);
            self.sent += 1;
            self.offer(1, frame.len(), self.sent);
            let sent = Instant::now();
            while (self.used(0) != self.received || self.used(1) != self.sent)
                && sent.elapsed() < Duration::from_secs(2)
            {
                serve();
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        assert!(
            self.memory.read(APART + BUFFER + HEADER as u64, FRAME) == frame[HEADER..],
            "{}",
            self.received
        );
    }
}

#[test]
fn dpdk_takes_mtu_rarp_and_status_and_loops_frames_back() {
    let Some(testpmd) = Testpmd::start("") else { return };
    let wanted = Wanted::default().and(P::MTU).and(P::RARP).and(P::STATUS);
    let mut session = testpmd.connect(&wanted);
    let offered = session.protocol();
    assert!(
        offered.contains(P::MTU) && offered.contains(P::RARP) && offered.contains(P::STATUS),
        "{offered:?}"
    );
    session.set_mtu(1500).unwrap();
    // RARP needs the guest to say that it announces itself; this one does not.
    let mut driver = Driver::new(0);
    let mut live = driver.go_live(session, VERSION_1 | MTU_FEATURE);
    for _ in 0..20 {
        driver.loop_back(|| {});
    }
    live.send_rarp([2, 0, 0, 0, 0, 7]).unwrap();
    let (mut session, bases) = live.stop().unwrap();
    assert_eq!(bases, [RingBase(20), RingBase(driver.sent.into())]);
    assert_eq!(session.status().unwrap(), 0, "reset by the end of the rings");
}

#[test]
fn dpdk_reports_the_status_that_it_was_given() {
    let Some(testpmd) = Testpmd::start("") else { return };
    let mut session = testpmd.connect(&Wanted::default().and(P::STATUS));
    assert_eq!(session.status().unwrap(), 0);
}

/// Answers misses, and counts them.
struct Iommu {
    answers: MissAnswers,
    misses: Cell<usize>,
}

impl BackendRequests for Iommu {
    fn config_changed(&self) {}

    fn iotlb(&self, message: Iotlb) -> Result<(), Refused> {
        self.misses.set(self.misses.get() + 1);
        self.answers.answer(&message)
    }
}

#[test]
fn dpdk_behind_an_iommu_asks_for_what_it_misses() {
    const FAR: u64 = 0x40_0000_0000;
    let Some(testpmd) = Testpmd::start(",iommu-support=1") else { return };
    let session = testpmd.connect(&Wanted::default().adjust("+access_platform").unwrap());
    let mut driver = Driver::new(FAR);
    let range = IovaRange { iova: Iova(FAR), size: 2 << 20, guest: GuestAddr(0), access: Access::ReadWrite };
    let map = Arc::new(IovaMap::new(vec![range], &driver.memory.map).unwrap());
    let mut session = session.with_iova_map(map);
    let iommu = Iommu { answers: session.miss_answers().unwrap().unwrap(), misses: Cell::new(0) };
    let mut channel = session.take_backend_channel().unwrap();
    let mut live = driver.go_live(session, VERSION_1 | 1 << bit::ACCESS_PLATFORM);
    driver.loop_back(|| drop(channel.serve(&iommu)));
    let told = iommu.misses.get();
    // What is taken back is asked for again.
    live.iotlb_invalidate(Iova(FAR), 2 << 20).unwrap();
    driver.loop_back(|| drop(channel.serve(&iommu)));
    println!("{told} misses before the translation was taken back, {} after", iommu.misses.get() - told);
    assert!(iommu.misses.get() > told, "it went on with a translation that was taken back");
    live.stop().unwrap();
}

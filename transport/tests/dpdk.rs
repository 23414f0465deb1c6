//! Against DPDK's vhost library, which we did not write: `dpdk-testpmd` with `net_vhost`, by `tests/backends/fetch`. What
//! only it understands: MTU, RARP, STATUS, and an IOMMU whose misses it asks about.

#![cfg(test)]

mod support;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use support::fetched::{fetched, until_listening};
use support::iommu::{BUFFERS_AT, FAR, Iommu, buffers, far};
use support::queue::{Part, Queue};
use support::{GuestMemory, Peer, Scratch, connect_patiently};
use transport::peer::Limits;
use transport::vhost_user::features::bit;
use transport::vhost_user::{LiveSession, ProtocolFeatures, RingBase, Session, Wanted};

type P = ProtocolFeatures;

const MTU_FEATURE: u64 = 1 << 3;
const VERSION_1: u64 = 1 << 32;
const FRAME: usize = 600;
const HEADER: usize = 12;

struct Testpmd {
    _process: Peer,
    socket: PathBuf,
    _scratch: Scratch,
}

impl Testpmd {
    /// `None`, with a printed reason, where it was not fetched.
    fn start(options: &str) -> Option<Self> {
        let (program, vhost, ring) =
            (fetched("dpdk-testpmd")?, fetched("dpdk-net-vhost")?, fetched("dpdk-mempool-ring")?);
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
        let process = Peer(child);
        until_listening(&socket, Duration::from_secs(30));
        Some(Self { _process: process, socket, _scratch: scratch })
    }

    fn connect(&self, wanted: &Wanted) -> Session {
        let limits = Limits::new(Duration::from_secs(10));
        connect_patiently(&self.socket, &limits).negotiate(wanted).unwrap()
    }
}

/// Where the buffers of the two rings are.
const RECEIVED: u64 = BUFFERS_AT;
const SENT: u64 = BUFFERS_AT + 0x1000;

/// The guest's side of a receiving and a sending ring, one buffer each.
struct Driver {
    memory: GuestMemory,
    receives: Queue,
    sends: Queue,
}

impl Driver {
    /// One whose addresses are all behind `iova`.
    fn new(iova: u64) -> Self {
        let [receives, sends] = [0, 1].map(|n| Queue::new(n, 0x1_0000 * u64::from(1 + n)).behind(iova));
        Self { memory: GuestMemory::new(2 << 20), receives, sends }
    }

    fn go_live(&self, session: Session, features: u64) -> LiveSession {
        let features = session.offered().accept(features).unwrap();
        let rings = [self.receives.ring(RingBase(0)), self.sends.ring(RingBase(0))];
        session.go_live(features, &self.memory.map, &rings).unwrap()
    }

    /// Sends a frame and wants it back; meanwhile `serve` does what there is to be done. One that DPDK drops, as it does
    /// while it waits for a translation, is sent again.
    fn loop_back(&mut self, mut serve: impl FnMut()) {
        let Self { memory, receives, sends } = self;
        receives.offer(memory, 0, &[Part::Write(RECEIVED, 2048)]);
        receives.kick.ring().unwrap();
        let number = receives.offered;
        let mut frame = vec![0; HEADER];
        frame.extend((0..FRAME).map(|n| u8::try_from((n + usize::from(number)) % 251).unwrap()));
        memory.write(SENT, &frame);
        let begun = Instant::now();
        while receives.used(memory) != number {
            assert!(begun.elapsed() < Duration::from_secs(20), "frame {number} does not come back");
            sends.offer(memory, 0, &[Part::Read(SENT, u32::try_from(frame.len()).unwrap())]);
            sends.kick.ring().unwrap();
            let sent = Instant::now();
            while (receives.used(memory) != number || sends.used(memory) != sends.offered)
                && sent.elapsed() < Duration::from_secs(2)
            {
                serve();
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        assert!(memory.read(RECEIVED + HEADER as u64, FRAME) == frame[HEADER..], "{number}");
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
    assert_eq!(bases, [RingBase(20), RingBase(driver.sends.offered.into())]);
    assert_eq!(session.status().unwrap(), 0, "reset by the end of the rings");
}

#[test]
fn dpdk_reports_the_status_that_it_was_given() {
    let Some(testpmd) = Testpmd::start("") else { return };
    let mut session = testpmd.connect(&Wanted::default().and(P::STATUS));
    assert_eq!(session.status().unwrap(), 0);
}

#[test]
fn dpdk_behind_an_iommu_asks_for_what_it_misses() {
    let Some(testpmd) = Testpmd::start(",iommu-support=1") else { return };
    let session = testpmd.connect(&Wanted::default().adjust("+access_platform").unwrap());
    let mut driver = Driver::new(FAR);
    let mut session = session.with_iova_map(far(&driver.memory));
    let iommu = Iommu::of(&session);
    let mut channel = session.take_backend_channel().unwrap();
    let mut live = driver.go_live(session, VERSION_1 | 1 << bit::ACCESS_PLATFORM);
    driver.loop_back(|| drop(channel.serve(&iommu)));
    let told = iommu.misses.get();
    // What is taken back is asked for again.
    live.revoke(&buffers()).unwrap();
    driver.loop_back(|| drop(channel.serve(&iommu)));
    println!("{told} misses before the translation was taken back, {} after", iommu.misses.get() - told);
    assert!(iommu.misses.get() > told, "it went on with a translation that was taken back");
    live.stop().unwrap();
}

use super::*;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use transport::memory::GuestAddr;
use transport::peer::Limits;
use transport::vhost_user::Connection;

use crate::bus::BusDevice;
use crate::testing::{Recorder, Scripted, disk, memory};
use crate::virtio::backend::outlets::Outlets;
use crate::virtio::core::device::Parts;
use crate::virtio::core::state::Effort;
use crate::virtio::transport::mmio::{MmioDevice, Place};
use crate::virtio::{OnLoss, PhaseReport};

/// How long a driver waits for a search: far longer than anything else takes here on a busy machine.
const LIMIT: Duration = Duration::from_secs(3);

/// A guest with a disk that breaks when its backend is lost, and may ask for another one.
struct Rig {
    device: MmioDevice,
    handle: DeviceHandle,
    machine: Recorder,
    asked: Arc<AtomicU32>,
}

fn rig() -> Rig {
    let machine = Recorder::default();
    let parts = Parts {
        name: "disk0".into(),
        model: disk(2),
        backend: Box::new(Scripted::default()),
        outlets: Outlets::default(),
        memory: memory(),
        service: None,
    };
    let place = Place { base: GuestAddr(0xd000_0000), gsi: 5 };
    let device = MmioDevice::new(&DeviceHandle::new(parts).unwrap(), place, &machine.ports()).unwrap();
    let handle = device.handle();
    handle.on_loss(OnLoss::Break);
    let asked = Arc::new(AtomicU32::new(0));
    let counter = Arc::clone(&asked);
    let ask = Box::new(move |effort| {
        assert_eq!(effort, Effort::Once);
        counter.fetch_add(1, Ordering::Relaxed);
        true
    });
    handle.search_with(LIMIT, ask);
    Rig { device, handle, machine, asked }
}

fn candidate(queues: u16) -> (Scripted, Candidate) {
    let backend = Scripted::default();
    (backend.clone(), Candidate { model: disk(queues), backend: Box::new(backend) })
}

impl Rig {
    fn write(&self, offset: u64, value: u32) {
        self.device.write(offset, &value.to_le_bytes());
    }

    fn asked(&self) -> u32 {
        self.asked.load(Ordering::Relaxed)
    }

    /// Does the steps of a driver up to FEATURES_OK. Returns whether the device agrees.
    fn agree(&self) -> bool {
        for status in [1, 3] {
            self.write(0x70, status);
        }
        self.write(0x24, 1);
        self.write(0x20, 1);
        self.write(0x70, 0xb);
        self.machine.page_u32(0x70) == 0xb
    }

    fn is_broken(&self) -> bool {
        matches!(self.handle.phase(), PhaseReport::Broken(_))
    }
}

/// The error of a silent peer.
fn silence_error() -> Box<dyn Error + Send + Sync> {
    let (ours, _theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    let limits = Limits::new(Duration::from_millis(1));
    let connection = Connection::from_stream(ours, "a test", &limits).unwrap();
    let error = connection.negotiate(&Default::default()).err().unwrap();
    assert!(error.is_silence());
    error.into()
}

fn silence() -> BackendError {
    BackendError::Lost(silence_error())
}

#[test]
fn device_that_broke_is_whole_again_after_a_reset_that_brings_a_backend() {
    let rig = rig();
    rig.handle.peer_lost("it crashed");
    assert!(rig.is_broken() && rig.asked() == 0 && !rig.agree());
    rig.write(0x70, 0);
    assert_eq!(rig.asked(), 1);
    let (second, candidate) = candidate(2);
    rig.handle.fill(candidate).unwrap();
    assert_eq!(rig.handle.phase(), PhaseReport::Idle);
    assert!(rig.agree());
    for (offset, value) in [(0x30, 0), (0x38, 16), (0x80, 0x1000), (0x90, 0x2000), (0xa0, 0x3000), (0x44, 1)]
    {
        rig.write(offset, value);
    }
    rig.write(0x70, 0xf);
    assert_eq!(second.calls(), ["start 100000000 0:16@1000,2000,3000"]);
    assert_eq!(rig.handle.stats().recoveries, 1);
    rig.write(0x70, 0);
    assert_eq!((second.calls(), rig.asked()), (vec!["stop".to_owned()], 1), "a whole device asks for nobody");
}

#[test]
fn driver_that_is_quicker_than_the_search_waits_for_it_once_and_not_beyond_the_limit() {
    let rig = rig();
    rig.handle.peer_lost("it crashed");
    rig.write(0x70, 0);
    let handle = rig.handle.clone();
    let (second, candidate) = candidate(2);
    let searcher = std::thread::spawn(move || {
        std::thread::sleep(LIMIT / 30);
        handle.fill(candidate).unwrap();
    });
    assert!(rig.agree(), "it waited");
    searcher.join().unwrap();
    assert_eq!(rig.handle.phase(), PhaseReport::Idle);

    // A search that finds nothing in time.
    rig.handle.peer_lost("it crashed again");
    assert_eq!(second.calls(), ["disconnect"]);
    rig.write(0x70, 0);
    let begun = Instant::now();
    assert!(!rig.agree() && begun.elapsed() >= LIMIT && begun.elapsed() < LIMIT * 2, "{:?}", begun.elapsed());
    rig.write(0x70, 0);
    let begun = Instant::now();
    assert!(!rig.agree() && begun.elapsed() < LIMIT, "once is enough: {:?}", begun.elapsed());
    rig.handle.search_failed(BackendError::gone().cause(), Some(false));
    rig.write(0x70, 0);
    assert_eq!(rig.asked(), 3, "the second search was given up");
}

#[test]
fn peer_that_fell_silent_is_not_waited_for_but_may_come_back() {
    let rig = rig();
    rig.handle.with(|device| device.lose_by(&silence()));
    rig.write(0x70, 0);
    let begun = Instant::now();
    assert!(!rig.agree() && begun.elapsed() < LIMIT, "{:?}", begun.elapsed());
    // The backend answers at last: the next driver finds a device that is not broken.
    rig.handle.fill(candidate(2).1).unwrap();
    assert!(!rig.is_broken());
    rig.write(0x70, 0);
    assert!(rig.agree());
}

#[test]
fn a_search_that_we_interrupted_says_nothing_of_a_silent_peer() {
    let rig = rig();
    rig.handle.with(|device| device.lose_by(&silence()));
    rig.write(0x70, 0);
    rig.handle.search_failed(BackendError::gone().cause(), None);
    rig.write(0x70, 0);
    assert_eq!(rig.asked(), 2, "it is searched for again");
    let begun = Instant::now();
    assert!(!rig.agree() && begun.elapsed() < LIMIT, "and not waited for: {:?}", begun.elapsed());
}

#[test]
fn search_that_fails_leaves_the_device_broken_and_the_next_reset_asks_again() {
    let rig = rig();
    rig.handle.peer_lost("it crashed");
    for round in 1..4 {
        rig.write(0x70, 0);
        rig.write(0x70, 0);
        assert_eq!(rig.asked(), round, "one search at a time");
        let error = match round {
            1 => "gone".into(),
            2 => silence_error(),
            _ => rig.handle.fill(candidate(1).1).unwrap_err().into(),
        };
        rig.handle.search_failed(error.as_ref(), Some(round == 2));
        assert!(rig.is_broken() && !rig.agree());
    }
}

#[test]
fn machine_that_ends_wants_no_backend_any_more() {
    let rig = rig();
    rig.handle.peer_lost("it crashed");
    rig.write(0x70, 0);
    rig.handle.end();
    let (second, candidate) = candidate(2);
    let result = rig.handle.fill(candidate);
    assert!(matches!(result, Err(FillError::NotWanted)), "{result:?}");
    assert!(second.calls().is_empty());
    rig.write(0x70, 0);
    assert!(rig.is_broken() && rig.asked() == 1);
}

#[test]
fn broken_device_has_its_backend_searched_for_on_each_new_board() {
    let rig = rig();
    rig.handle.with(|device| device.lose_by(&silence()));
    rig.handle.unplug();
    assert_eq!(rig.asked(), 0);
    let machine = Recorder::default();
    let place = Place { base: GuestAddr(0xd000_0000), gsi: 5 };
    let device = MmioDevice::new(&rig.handle, place, &machine.ports()).unwrap();
    let rig = Rig { device, machine, ..rig };
    assert_eq!(rig.asked(), 1);
    let handle = rig.handle.clone();
    let searcher = std::thread::spawn(move || {
        std::thread::sleep(LIMIT / 100);
        handle.fill(candidate(2).1).unwrap();
    });
    rig.write(0x70, 0);
    assert!(rig.agree(), "it waited, though the last peer was silent");
    searcher.join().unwrap();

    // A backend that comes later is not waited for.
    rig.handle.with(|device| device.lose_by(&silence()));
    rig.handle.unplug();
    let machine = Recorder::default();
    let device = MmioDevice::new(&rig.handle, place, &machine.ports()).unwrap();
    let rig = Rig { device, machine, ..rig };
    for _ in 0..20 {
        rig.write(0x70, 0);
        let begun = Instant::now();
        assert!(!rig.agree() && begun.elapsed() < LIMIT, "{:?}", begun.elapsed());
    }
}

use super::*;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use transport::memory::GuestAddr;
use transport::vhost_user::DeviceFeatures;

use crate::bus::BusDevice;
use crate::lock;
use crate::testing::{Outcome, Recorder, Scripted, disk, memory};
use crate::virtio::backend::outlets::Outlets;
use crate::virtio::core::device::Parts;
use crate::virtio::transport::mmio::{MmioDevice, Place};
use crate::virtio::{OnLoss, PhaseReport};

const BASE: u64 = 0xd000_0000;
const DRIVER: u64 = 0x2000;
const DEVICE: u64 = 0x3000;

const RIDDLE: [u16; 16] = [0, 0, 1, 2, 0, 2, 1, 1, 0, 1, 2, 0, 2, 1, 1, 2];

/// A guest with a disk that waits for another backend when it loses one.
struct Rig {
    device: MmioDevice,
    handle: DeviceHandle,
    machine: Recorder,
    ram: MemoryMap,
    first: Scripted,
}

fn rig_of(model: Model) -> Rig {
    let (machine, first, ram) = (Recorder::default(), Scripted::default(), memory());
    let backend = Box::new(first.clone());
    let parts = Parts {
        name: "disk0".into(),
        model,
        backend,
        memory: ram.clone(),
        outlets: Outlets::default(),
        service: None,
    };
    let device = MmioDevice::new(
        &DeviceHandle::new(parts).unwrap(),
        Place { base: GuestAddr(BASE), gsi: 5 },
        &machine.ports(),
    )
    .unwrap();
    device.handle().on_loss(OnLoss::Recover);
    Rig { handle: device.handle(), device, machine, ram, first }
}

fn rig() -> Rig {
    rig_of(disk(2))
}

fn candidate(model: Model) -> (Scripted, Candidate) {
    let backend = Scripted::default();
    (backend.clone(), Candidate { model, backend: Box::new(backend) })
}

impl Rig {
    fn write(&self, offset: u64, value: u32) {
        self.device.write(offset, &value.to_le_bytes());
    }

    fn status(&self) -> u32 {
        self.machine.page_u32(0x70)
    }

    /// Does the steps of a driver up to DRIVER_OK, with queue 0 only.
    fn start_driver(&self) {
        for status in [0, 1, 3] {
            self.write(0x70, status);
        }
        for select in [1, 0] {
            self.write(0x14, select);
            self.write(0x24, select);
            self.write(0x20, self.machine.page_u32(0x10));
        }
        self.write(0x70, 0xb);
        for (offset, value) in
            [(0x30, 0), (0x38, 16), (0x80, 0x1000), (0x90, 0x2000), (0xa0, 0x3000), (0x44, 1)]
        {
            self.write(offset, value);
        }
        self.write(0x70, 0xf);
        assert_eq!(self.status(), 0xf);
    }

    /// Starts a driver, then loses the backend with these indexes in the ring.
    fn lose(&self, available: u16, used: u16) {
        self.start_driver();
        self.set_indexes(available, used);
        self.machine.take_interrupts();
        self.handle.peer_lost("it crashed");
        assert_eq!(self.handle.phase(), PhaseReport::Recovering("it crashed".into()));
    }

    fn set_indexes(&self, available: u16, used: u16) {
        // The heads in turn, used in order.
        let in_order: [u16; 16] = std::array::from_fn(|slot| slot.try_into().unwrap());
        self.set_rings(available, used, in_order, in_order);
    }

    fn set_rings(&self, available_index: u16, used_index: u16, available: [u16; 16], used: [u16; 16]) {
        let fd = self.ram.regions()[0].fd();
        for ((head, id), slot) in available.into_iter().zip(used).zip(0..) {
            rustix::io::pwrite(fd, &head.to_le_bytes(), DRIVER + 4 + 2 * slot).unwrap();
            rustix::io::pwrite(fd, &u32::from(id).to_le_bytes(), DEVICE + 4 + 8 * slot).unwrap();
        }
        rustix::io::pwrite(fd, &used_index.to_le_bytes(), DEVICE + 2).unwrap();
        rustix::io::pwrite(fd, &available_index.to_le_bytes(), DRIVER + 2).unwrap();
    }

    /// Starts a driver, then loses the backend with ambiguous rings: they do not show which two of three
    /// requests, 0 and 1, are in flight.
    fn lose_in_doubt(&self) {
        self.start_driver();
        self.set_rings(65022, 65020, RIDDLE, [0, 2, 0, 2, 1, 1, 1, 0, 1, 2, 0, 2, 0, 2, 1, 0]);
        self.handle.peer_lost("it crashed");
    }

    /// The driver uses its third head, too.
    fn end_the_doubt(&self) {
        let fd = self.ram.regions()[0].fd();
        rustix::io::pwrite(fd, &2_u16.to_le_bytes(), DRIVER + 4 + 2 * 14).unwrap();
        rustix::io::pwrite(fd, &65023_u16.to_le_bytes(), DRIVER + 2).unwrap();
    }

    fn head(&self, slot: u64) -> u16 {
        let mut head = [0; 2];
        rustix::io::pread(self.ram.regions()[0].fd(), &mut head, DRIVER + 4 + 2 * slot).unwrap();
        u16::from_le_bytes(head)
    }

    /// Returns whether a kick of the guest ends in the kernel.
    fn kicks(&self) -> bool {
        self.machine.guest_writes(BASE + 0x50, 0)
    }
}

#[test]
fn lost_backend_is_replaced_and_the_guest_notices_nothing_but_an_interrupt() {
    let rig = rig();
    rig.lose(9, 7);
    assert_eq!((rig.status(), rig.machine.page_u32(0x60)), (0xf, 1));
    assert_eq!(rig.first.calls().last().unwrap(), "disconnect");
    assert_eq!(rig.machine.take_interrupts(), 1, "used buffers that nobody may have told of");
    assert!(rig.kicks(), "kicks gather in the kernel");
    let (second, candidate) = candidate(disk(2));
    rig.handle.fill(candidate).unwrap();
    assert_eq!(second.calls(), ["start 100000200 0:16@1000,2000,3000+7"]);
    assert_eq!(rig.handle.phase(), PhaseReport::Running);
    assert_eq!((rig.status(), rig.machine.page_u32(0x60)), (0xf, 1));
    assert_eq!(rig.machine.take_interrupts(), 1);
    let stats = rig.handle.stats();
    assert_eq!((stats.activations, stats.recoveries, stats.config_interrupts), (1, 1, 0));
    rig.write(0x70, 0);
    assert_eq!(second.calls(), ["stop"]);
}

#[test]
fn reset_while_nobody_is_there_asks_nobody_and_the_next_driver_starts_later() {
    let rig = rig();
    rig.lose(9, 7);
    rig.first.calls();
    rig.write(0x70, 0);
    assert_eq!(rig.status(), 0);
    assert!(!rig.kicks());
    rig.start_driver();
    assert!(rig.kicks());
    rig.handle.config_changed();
    rig.device.write(0x120, &[1]);
    assert!(rig.first.calls().is_empty());
    let (second, candidate) = candidate(disk(2));
    rig.handle.fill(candidate).unwrap();
    assert_eq!(second.calls(), ["start 100000200 0:16@1000,2000,3000"]);
    assert_eq!(rig.handle.phase(), PhaseReport::Running);
    assert_eq!(rig.handle.stats().activations, 2);
}

#[test]
fn backend_for_a_device_without_a_driver_is_not_started() {
    let rig = rig();
    rig.handle.peer_lost("it crashed");
    let (second, candidate) = candidate(disk(2));
    rig.handle.fill(candidate).unwrap();
    assert!(second.calls().is_empty());
    assert_eq!(rig.handle.phase(), PhaseReport::Idle);
    rig.start_driver();
    assert_eq!(second.calls(), ["start 100000200 0:16@1000,2000,3000"]);
}

#[test]
fn candidate_that_is_another_device_breaks_this_one_with_a_reason() {
    let features = |bits| Model { features: DeviceFeatures::from_bits(bits), ..disk(2) };
    let cases = [
        (features(1 << 32), "it lacks the features 0x200, which the driver uses"),
        (disk(1), "it serves 1 queues, the device has 2"),
        (
            Model { config_source: ConfigSource::Fixed, ..disk(2) },
            "it has 0 bytes of configuration, there were 60",
        ),
    ];
    for (model, reason) in cases {
        let rig = rig();
        rig.lose(0, 0);
        let (second, candidate) = candidate(model);
        let error = rig.handle.fill(candidate).unwrap_err();
        assert!(matches!(error, FillError::Unfit(_)));
        assert_eq!(error.to_string(), reason);
        assert!(second.calls().is_empty());
        assert_eq!((rig.status(), rig.machine.page_u32(0x60)), (0x4f, 3));
        assert!(!rig.kicks());
        let why = format!("another backend came that does not fit: {reason}");
        assert_eq!(rig.handle.phase(), PhaseReport::Broken(why));
        let (_, other) = self::candidate(disk(2));
        assert!(matches!(rig.handle.fill(other), Err(FillError::NotWanted)));
    }
}

#[test]
fn more_queues_and_features_do_no_harm_and_reach_the_next_driver() {
    let rig = rig();
    rig.lose(0, 0);
    let more = Model { features: DeviceFeatures::from_bits(1 << 32 | 1 << 9 | 1 << 28), ..disk(8) };
    let (_, candidate) = candidate(more);
    rig.handle.fill(candidate).unwrap();
    rig.write(0x14, 0);
    assert_eq!(rig.machine.page_u32(0x10), 1 << 9, "not under the driver's feet");
    rig.write(0x70, 0);
    rig.write(0x14, 0);
    assert_eq!(rig.machine.page_u32(0x10), 1 << 9 | 1 << 28);
    rig.write(0x14, 1);
    assert_eq!(rig.machine.page_u32(0x10), 1);
}

#[test]
fn features_that_the_driver_did_not_take_may_be_missing() {
    let rig = rig();
    rig.handle.peer_lost("it crashed");
    let (_, candidate) = candidate(Model { features: DeviceFeatures::from_bits(1 << 32), ..disk(2) });
    rig.handle.fill(candidate).unwrap();
    rig.write(0x14, 0);
    assert_eq!(rig.machine.page_u32(0x10), 0, "the next driver cannot take them");
}

#[test]
fn candidate_that_does_not_start_leaves_the_device_waiting_for_the_next() {
    let rig = rig();
    rig.handle.peer_lost("it crashed");
    rig.start_driver();
    let (second, bad) = candidate(disk(2));
    lock(&second.0).on_start = Outcome::Lost;
    let error = rig.handle.fill(bad).unwrap_err();
    assert!(matches!(error, FillError::Failed(_)), "{error:?}");
    assert_eq!(rig.handle.phase(), PhaseReport::Recovering("it crashed".into()));
    assert_eq!(rig.status(), 0xf);
    // The backend may have used buffers before it failed.
    rig.set_indexes(2, 1);
    let (third, good) = candidate(disk(2));
    rig.handle.fill(good).unwrap();
    assert_eq!(third.calls(), ["start 100000200 0:16@1000,2000,3000+1"]);
}

#[test]
fn candidate_that_cannot_be_told_of_the_rings_is_another_device() {
    let rig = rig();
    rig.lose(0, 0);
    let (second, candidate) = candidate(disk(2));
    lock(&second.0).on_start = Outcome::Refused;
    assert!(matches!(rig.handle.fill(candidate), Err(FillError::Refused(_))));
    let why = "another backend came that does not fit: scripted";
    assert_eq!(rig.handle.phase(), PhaseReport::Broken(why.into()));
}

#[test]
fn backend_that_is_lost_while_it_starts_is_waited_for_like_any_other() {
    let rig = rig();
    lock(&rig.first.0).on_start = Outcome::Lost;
    rig.start_driver();
    assert_eq!(rig.handle.phase(), PhaseReport::Recovering("scripted".into()));
    assert!(rig.kicks());
    let (second, candidate) = candidate(disk(2));
    rig.handle.fill(candidate).unwrap();
    assert_eq!(second.calls(), ["start 100000200 0:16@1000,2000,3000"]);
}

#[test]
fn changed_configuration_of_the_successor_is_told_and_the_same_is_not() {
    for (change, expected) in [(0, 0), (7, 1)] {
        let rig = rig();
        rig.lose(0, 0);
        let mut model = disk(2);
        model.config[0] += change;
        let (_, candidate) = candidate(model);
        rig.handle.fill(candidate).unwrap();
        assert_eq!(rig.handle.stats().config_interrupts, expected);
        assert_eq!(rig.machine.page_bytes(0x100, 1), [1 + change]);
        assert_eq!(rig.machine.page_u32(0x60), if change == 0 { 1 } else { 3 });
    }
}

#[test]
fn ring_that_nobody_can_go_on_with_needs_a_reset_but_keeps_the_new_backend() {
    let packed = Model { features: DeviceFeatures::from_bits(1 << 32 | 1 << 34), ..disk(2) };
    for (model, indexes) in [(packed, (0, 0)), (disk(2), (99, 0))] {
        let rig = rig_of(model.clone());
        rig.lose(indexes.0, indexes.1);
        let (second, candidate) = candidate(model);
        rig.handle.fill(candidate).unwrap();
        assert!(second.calls().is_empty());
        assert!(matches!(rig.handle.phase(), PhaseReport::NeedsReset(_)));
        assert_eq!((rig.status(), rig.machine.page_u32(0x60)), (0x4f, 3));
        assert!(!rig.kicks());
        rig.start_driver();
        assert!(second.calls()[0].starts_with("start "));
    }
}

#[test]
fn doubt_ends_when_the_driver_goes_on() {
    let rig = rig();
    rig.lose_in_doubt();
    let (second, candidate) = candidate(disk(2));
    std::thread::scope(|scope| {
        let taking_over = scope.spawn(|| rig.handle.fill_within(Duration::from_secs(60), candidate));
        std::thread::sleep(Duration::from_millis(30));
        assert_eq!(rig.handle.phase(), PhaseReport::Recovering("it crashed".into()), "it is waited for");
        assert!(rig.kicks());
        rig.end_the_doubt();
        taking_over.join().unwrap().unwrap();
    });
    assert_eq!(second.calls(), ["start 100000200 0:16@1000,2000,3000+fdfc"]);
    assert_eq!(rig.handle.phase(), PhaseReport::Running);
    assert_eq!([12, 13, 14].map(|slot| rig.head(slot)), [0, 1, 2]);
}

#[test]
fn driver_whose_rings_stay_in_doubt_needs_a_reset_and_keeps_the_new_backend() {
    let rig = rig();
    rig.lose_in_doubt();
    let (second, candidate) = candidate(disk(2));
    rig.handle.fill_within(Duration::from_millis(20), candidate).unwrap();
    assert!(second.calls().is_empty());
    let why = "the rings of queue 0 do not tell which 2 requests were in flight";
    assert_eq!(rig.handle.phase(), PhaseReport::NeedsReset(why.into()));
    assert_eq!((rig.status(), rig.machine.page_u32(0x60)), (0x4f, 3));
    assert_eq!([12, 13].map(|slot| rig.head(slot)), [RIDDLE[12], RIDDLE[13]], "nothing was changed");
}

#[test]
fn backend_that_goes_while_there_is_doubt_is_none_and_the_next_is_waited_for() {
    let rig = rig();
    rig.lose_in_doubt();
    let (second, candidate) = candidate(disk(2));
    lock(&second.0).hung_up = true;
    let begin = Instant::now();
    let error = rig.handle.fill_within(Duration::from_secs(60), candidate).unwrap_err();
    assert!(matches!(error, FillError::Failed(_)), "{error:?}");
    assert!(begin.elapsed() < Duration::from_secs(30));
    assert_eq!(rig.handle.phase(), PhaseReport::Recovering("it crashed".into()));
    let (third, candidate) = self::candidate(disk(2));
    rig.end_the_doubt();
    rig.handle.fill(candidate).unwrap();
    assert_eq!(third.calls(), ["start 100000200 0:16@1000,2000,3000+fdfc"]);
}

#[test]
fn machine_or_driver_that_is_reset_while_there_is_doubt_is_not_held_up() {
    for by_driver in [true, false] {
        let rig = rig();
        rig.lose_in_doubt();
        let (second, candidate) = candidate(disk(2));
        let begin = Instant::now();
        let outcome = std::thread::scope(|scope| {
            let taking_over = scope.spawn(|| rig.handle.fill_within(Duration::from_secs(60), candidate));
            std::thread::sleep(Duration::from_millis(30));
            if by_driver {
                rig.write(0x70, 0);
            } else {
                rig.handle.end();
            }
            taking_over.join().unwrap()
        });
        assert!(begin.elapsed() < Duration::from_secs(30));
        assert_eq!(outcome.is_ok(), by_driver, "{outcome:?}");
        assert!(second.calls().is_empty());
    }
}

#[test]
fn mistake_of_the_driver_while_nobody_is_there_outlasts_the_recovery() {
    let rig = rig();
    rig.handle.peer_lost("it crashed");
    rig.start_driver();
    rig.write(0x70, 0);
    for status in [1, 3] {
        rig.write(0x70, status);
    }
    rig.write(0x24, 1);
    rig.write(0x20, 1);
    rig.write(0x70, 0xb);
    rig.write(0x38, 3);
    rig.write(0x44, 1);
    rig.write(0x70, 0xf);
    assert_eq!(rig.status(), 0x4f);
    assert!(matches!(rig.handle.phase(), PhaseReport::Recovering(_)));
    let (second, candidate) = candidate(disk(2));
    rig.handle.fill(candidate).unwrap();
    assert!(matches!(rig.handle.phase(), PhaseReport::NeedsReset(_)));
    assert!(second.calls().is_empty());
    rig.start_driver();
    assert_eq!(rig.handle.phase(), PhaseReport::Running);
}

/// Whether an action during a start waits for the start.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Waits {
    /// The action ends before the start does.
    No,
    /// The action may end before or after the start: either is correct.
    Yes,
}

/// Begins the start of a candidate, holds the start up, and does `meanwhile` before the start goes on.
fn during_the_start(
    rig: &Rig,
    outcome: Outcome,
    waits: Waits,
    meanwhile: impl FnOnce() + Send,
) -> (Scripted, Result<(), FillError>) {
    let (second, candidate) = candidate(disk(2));
    let (open, gate) = channel();
    lock(&second.0).hold_start = Some(gate);
    lock(&second.0).on_start = outcome;
    let result = std::thread::scope(|scope| {
        let taking_over = scope.spawn(|| rig.handle.fill(candidate));
        let begin = Instant::now();
        while lock(&second.0).hold_start.is_some() {
            assert!(begin.elapsed() < Duration::from_secs(10), "the start never began");
            std::thread::sleep(Duration::from_millis(1));
        }
        let meanwhile = scope.spawn(meanwhile);
        let (begin, limit) = match waits {
            Waits::Yes => (Instant::now(), Duration::from_millis(50)),
            Waits::No => (Instant::now(), Duration::from_secs(20)),
        };
        while !meanwhile.is_finished() && begin.elapsed() < limit {
            std::thread::sleep(Duration::from_millis(1));
        }
        let in_time = meanwhile.is_finished();
        open.send(()).unwrap();
        meanwhile.join().unwrap();
        assert!(in_time || waits == Waits::Yes, "the lock was held");
        taking_over.join().unwrap()
    });
    (second, result)
}

#[test]
fn nobody_waits_for_a_start_that_has_nothing_to_do_with_it() {
    let rig = rig();
    rig.lose(0, 0);
    let (_, result) = during_the_start(&rig, Outcome::Works, Waits::No, || {
        rig.device.write(0x120, &[1]);
        rig.handle.config_changed();
        rig.handle.peer_lost("told twice");
        assert!(rig.kicks());
        let (_, other) = candidate(disk(2));
        let result = rig.handle.fill(other);
        assert!(matches!(result, Err(FillError::NotWanted)), "one at a time: {result:?}");
        assert_eq!(rig.handle.stats().recoveries, 0);
    });
    result.unwrap();
    assert_eq!(rig.handle.phase(), PhaseReport::Running);
}

#[test]
fn reset_during_a_start_waits_for_it_and_stops_what_it_started() {
    let rig = rig();
    rig.lose(3, 1);
    let (second, result) = during_the_start(&rig, Outcome::Works, Waits::Yes, || {
        rig.write(0x70, 0);
        assert_eq!(rig.handle.phase(), PhaseReport::Idle, "no backend has the rings after the reset");
    });
    result.unwrap();
    assert_eq!(second.calls(), ["start 100000200 0:16@1000,2000,3000+1", "stop"]);
    assert_eq!(rig.status(), 0);
    rig.start_driver();
    assert_eq!(second.calls(), ["start 100000200 0:16@1000,2000,3000"]);
}

#[test]
fn reset_during_a_start_that_fails_leaves_the_device_waiting() {
    let rig = rig();
    rig.lose(3, 1);
    let (_, result) = during_the_start(&rig, Outcome::Lost, Waits::Yes, || rig.write(0x70, 0));
    assert!(matches!(result, Err(FillError::Failed(_))), "whoever looked goes on: {result:?}");
    assert!(matches!(rig.handle.phase(), PhaseReport::Recovering(_)));
    assert_eq!(rig.status(), 0);
    let (second, candidate) = candidate(disk(2));
    rig.handle.fill(candidate).unwrap();
    rig.start_driver();
    assert_eq!(second.calls(), ["start 100000200 0:16@1000,2000,3000"]);
}

#[test]
fn machine_that_ends_or_restarts_during_a_start_is_not_disturbed_by_it() {
    let rig = rig();
    rig.lose(3, 1);
    let (second, result) = during_the_start(&rig, Outcome::Works, Waits::Yes, || rig.handle.end());
    result.unwrap();
    assert_eq!(second.calls(), ["start 100000200 0:16@1000,2000,3000+1", "stop", "disconnect"]);
    let (third, other) = candidate(disk(2));
    rig.handle.peer_lost("it crashed");
    assert!(matches!(rig.handle.fill(other), Err(FillError::NotWanted)));
    assert!(third.calls().is_empty());

    let rig = self::rig();
    rig.lose(3, 1);
    let unplugs = || rig.handle.unplug();
    let (second, result) = during_the_start(&rig, Outcome::Works, Waits::Yes, unplugs);
    result.unwrap();
    assert_eq!(second.calls(), ["start 100000200 0:16@1000,2000,3000+1", "stop"]);
    assert_eq!(rig.handle.phase(), PhaseReport::Idle);
    let (_, other) = candidate(disk(2));
    assert!(matches!(rig.handle.fill(other), Err(FillError::NotWanted)));
}

#[test]
fn recovering_device_waits_on_between_two_boards_and_takes_a_backend_there() {
    let rig = rig();
    rig.lose(3, 1);
    rig.handle.with(Device::unplug);
    assert_eq!(rig.handle.phase(), PhaseReport::Recovering("it crashed".into()));
    assert!(rig.machine.doorbells().is_empty() && rig.machine.routes().is_empty());
    let (second, candidate) = candidate(disk(2));
    rig.handle.fill(candidate).unwrap();
    assert_eq!(rig.handle.phase(), PhaseReport::Idle);
    assert_eq!(second.calls(), [""; 0]);

    let machine = Recorder::default();
    let place = Place { base: GuestAddr(BASE), gsi: 5 };
    let device = MmioDevice::new(&rig.handle, place, &machine.ports()).unwrap();
    let rig = Rig { device, machine, ..rig };
    rig.start_driver();
    assert_eq!(second.calls(), ["start 100000200 0:16@1000,2000,3000"]);
}

#[test]
fn start_whose_thread_panics_keeps_nobody_waiting() {
    let rig = rig();
    rig.lose(3, 1);
    let (second, candidate) = candidate(disk(2));
    // A held start panics when its gate is dropped.
    lock(&second.0).hold_start = Some(channel().1);
    let handle = rig.handle.clone();
    assert!(std::thread::spawn(move || handle.fill(candidate)).join().is_err());
    rig.write(0x70, 0);
    assert_eq!((rig.status(), rig.handle.phase()), (0, PhaseReport::Recovering("it crashed".into())));
}

#[test]
fn successor_that_begins_its_used_index_anew_is_found_out_and_the_driver_told() {
    use crate::virtio::recovery::watch::Standing;
    let rig = rig();
    rig.lose(9, 7);
    let (second, candidate) = candidate(disk(2));
    rig.handle.fill(candidate).unwrap();
    assert_eq!(rig.handle.judge_successor(), Standing::Unproven, "it has not moved yet");
    second.calls();
    // The backend used the first of the two requests in flight, as number 0.
    rig.set_indexes(9, 1);
    assert_eq!(rig.handle.judge_successor(), Standing::Settled);
    assert_eq!(second.calls(), ["stop"]);
    assert!(
        matches!(rig.handle.phase(), PhaseReport::NeedsReset(why) if why.contains("began queue 0 anew, at 1"))
    );
    assert_eq!(rig.status(), 0x4f);
    // The same backend serves the next driver.
    rig.write(0x70, 0);
    rig.start_driver();
    assert_eq!(second.calls().len(), 1);
}

#[test]
fn successor_that_goes_on_is_left_alone() {
    use crate::virtio::recovery::watch::Standing;
    let rig = rig();
    rig.lose(9, 7);
    let (second, candidate) = candidate(disk(2));
    rig.handle.fill(candidate).unwrap();
    second.calls();
    rig.set_indexes(10, 8);
    assert_eq!(rig.handle.judge_successor(), Standing::Settled);
    assert_eq!((second.calls(), rig.handle.phase()), (vec![], PhaseReport::Running));
    // Later numbers are not judged any more.
    rig.set_indexes(10, 1);
    assert_eq!(rig.handle.judge_successor(), Standing::Settled);
    assert_eq!(rig.handle.phase(), PhaseReport::Running);
}

use super::*;
use transport::vhost_user::DeviceFeatures;

use crate::lock;
use crate::ports::WriteAddress;
use crate::testing::{Outcome, Recorder, Scripted, disk, memory};
use crate::virtio::backend::outlets::Outlets;
use crate::virtio::types::model::Model;
use crate::virtio::{DeviceType, Parts, PhaseReport};

const BASE: u64 = 0xd000_0000;
const PLACE: Place = Place { base: GuestAddr(BASE), gsi: 5 };

/// A guest's view of one device, and both sides to which the device is connected.
struct Rig {
    device: MmioDevice,
    machine: Recorder,
    backend: Scripted,
}

fn rig(queues: u16) -> Rig {
    rig_of(disk(queues))
}

fn rig_of(model: Model) -> Rig {
    let (machine, backend) = (Recorder::default(), Scripted::default());
    let parts = Parts {
        name: "disk0".into(),
        model,
        backend: Box::new(backend.clone()),
        memory: memory(),
        outlets: Outlets::default(),
        service: None,
    };
    let device = MmioDevice::new(&DeviceHandle::new(parts).unwrap(), PLACE, &machine.ports()).unwrap();
    lock(&backend.0).config = (1..=60).collect();
    Rig { device, machine, backend }
}

impl Rig {
    fn write(&self, offset: u64, value: u32) {
        self.device.write(offset, &value.to_le_bytes());
        self.page_is_current();
    }

    /// The page always equals the result of a read that exits.
    fn page_is_current(&self) {
        let mut trapped = vec![0xaa; 0x200];
        self.device.read(0, &mut trapped);
        assert_eq!(self.machine.page_bytes(0, 0x200), trapped);
    }

    fn offer_features(&self) {
        self.write(0x70, 0);
        assert_eq!(self.machine.page_u32(0x70), 0);
        self.write(0x70, 1);
        self.write(0x70, 3);
        for select in [1, 0] {
            self.write(0x14, select);
            self.write(0x24, select);
            self.write(0x20, self.machine.page_u32(0x10));
        }
        self.write(0x70, 0xb);
    }

    /// Does the steps of a stock driver up to and including FEATURES_OK.
    fn negotiate(&self) {
        self.offer_features();
        assert_eq!(self.machine.page_u32(0x70), 0xb);
    }

    /// Does the same steps, and the device refuses FEATURES_OK.
    fn negotiate_in_vain(&self) {
        self.offer_features();
        assert_eq!(self.machine.page_u32(0x70), 3);
    }

    /// Does the steps of a stock driver up to and including DRIVER_OK.
    fn start_driver(&self) {
        self.negotiate();
        for queue in 0..4 {
            self.write(0x30, queue);
            if self.machine.page_u32(0x34) == 0 {
                break;
            }
            self.write(0x38, 64);
            for (offset, value) in [(0x80, 0x1000), (0x90, 0x2000), (0xa0, 0x3000)] {
                self.write(offset, 0x1_0000 * queue + value);
                self.write(offset + 4, 0);
            }
            self.write(0x44, 1);
            assert_eq!(self.machine.page_u32(0x44), 1);
        }
        self.write(0x70, 0xf);
    }

    fn kicks(&self) -> Vec<u32> {
        let at = |when: &WriteMatch| when.address == WriteAddress::Memory(GuestAddr(BASE + 0x50));
        self.machine
            .doorbells()
            .iter()
            .filter(|when| at(when))
            .map(|when| u32::try_from(when.value.unwrap()).unwrap())
            .collect()
    }
}

#[test]
fn page_shows_a_virtio_mmio_device_from_the_start() {
    let rig = rig(1);
    let read = |offset| rig.machine.page_u32(offset);
    assert_eq!((read(0), read(4), read(8)), (0x7472_6976, 2, 2));
    assert_eq!((read(0x34), read(0x60), read(0x70), read(0xb0)), (256, 1, 0, u32::MAX));
    assert_eq!(rig.machine.page_bytes(0x100, 3), [1, 2, 3]);
    rig.page_is_current();
    let ack = WriteMatch::register(GuestAddr(BASE + 0x64), 1);
    assert_eq!(rig.machine.doorbells(), [ack]);
    assert_eq!(rig.machine.routes(), [Route::Pin(5)]);
}

#[test]
fn driver_start_binds_one_doorbell_and_one_route_a_queue_before_the_backend_starts() {
    let rig = rig(3);
    lock(&rig.backend.0).watch = Some(rig.machine.clone());
    rig.start_driver();
    assert_eq!(rig.machine.page_u32(0x70), 0xf);
    assert_eq!(rig.kicks(), [0, 1, 2]);
    assert_eq!(rig.machine.routes().len(), 4);
    let rings = "0:64@1000,2000,3000 1:64@11000,12000,13000 2:64@21000,22000,23000";
    assert_eq!(rig.backend.calls(), [format!("start 100000200 {rings} [4]")]);
}

#[test]
fn packed_queues_begin_with_both_wrap_counters_set() {
    let rig = rig_of(Model { features: DeviceFeatures::from_bits(1 << 32 | 1 << 34), ..disk(1) });
    rig.start_driver();
    assert_eq!(rig.backend.calls(), ["start 500000000 0:64@1000,2000,3000+80008000"]);
}

#[test]
fn guest_reset_takes_the_doorbells_away_then_stops_the_backend_and_repeats() {
    let rig = rig(2);
    lock(&rig.backend.0).watch = Some(rig.machine.clone());
    for _ in 0..20 {
        rig.start_driver();
        assert_eq!(rig.kicks(), [0, 1]);
        rig.backend.calls();
        rig.write(0x70, 0);
        assert_eq!(rig.backend.calls(), ["stop [1]"]);
        assert_eq!(rig.machine.routes(), [Route::Pin(5)]);
        assert_eq!(rig.machine.page_u32(0x70), 0);
    }
    let stats = rig.device.handle().stats();
    assert_eq!((stats.activations, stats.resets, stats.phase), (20, 20, PhaseReport::Idle));
}

#[test]
fn backend_that_does_not_start_breaks_the_device_and_leaves_nothing_bound() {
    let rig = rig(2);
    lock(&rig.backend.0).on_start = Outcome::Lost;
    rig.start_driver();
    assert_eq!(rig.machine.page_u32(0x70), 0x4f);
    assert_eq!(rig.machine.page_u32(0x60), 3, "the driver is told by a configuration interrupt");
    assert_eq!((rig.kicks().len(), rig.machine.routes().len()), (0, 1));
    assert_eq!(rig.device.handle().phase(), PhaseReport::Broken("scripted".into()));
    assert_eq!(rig.backend.calls().last().unwrap(), "disconnect");
}

#[test]
fn start_that_the_backend_was_not_even_asked_for_is_forgiven_at_the_reset() {
    let rig = rig(2);
    lock(&rig.backend.0).on_start = Outcome::Refused;
    rig.start_driver();
    assert_eq!((rig.machine.page_u32(0x70), rig.machine.page_u32(0x60)), (0x4f, 3));
    assert_eq!((rig.kicks().len(), rig.machine.routes().len()), (0, 1));
    assert_eq!(rig.device.handle().phase(), PhaseReport::NeedsReset("scripted".into()));
    lock(&rig.backend.0).on_start = Outcome::Works;
    rig.start_driver();
    assert_eq!(rig.device.handle().phase(), PhaseReport::Running);
    assert_eq!(rig.machine.page_u32(0x70), 0xf);
}

#[test]
fn doorbell_that_cannot_be_bound_breaks_the_device_and_leaves_nothing_bound() {
    let rig = rig(2);
    rig.machine.refuse_doorbell(WriteMatch::register(GuestAddr(BASE + 0x50), 1));
    rig.start_driver();
    assert_eq!(rig.machine.page_u32(0x70), 0x4f);
    assert_eq!((rig.kicks().len(), rig.machine.routes().len()), (0, 1));
    assert_eq!(rig.backend.calls(), ["disconnect"]);
    let PhaseReport::Broken(why) = rig.device.handle().phase() else { panic!("not broken") };
    assert_eq!(why, "the machine cannot do that in a test: out of memory");
}

/// Mistakes in the setup of queue 0: the registers and the values that are written.
const WRONG: [(&str, &[(u64, u32)]); 9] = [
    ("size 0", &[(0x38, 0)]),
    ("size 3", &[(0x38, 3)]),
    ("size beyond the largest", &[(0x38, 512)]),
    ("descriptors outside memory", &[(0x80, 0xffff_f000)]),
    ("available ring outside memory", &[(0x94, 1)]),
    ("used ring beyond the last byte", &[(0xa0, 0x3f_fff0)]),
    ("descriptors odd", &[(0x80, 0x1001)]),
    ("used ring odd", &[(0xa0, 0x3002)]),
    ("addresses that wrap", &[(0x80, 0xffff_fff0), (0x84, 0xffff_ffff)]),
];

#[test]
fn mistake_of_the_driver_needs_a_reset_and_costs_neither_device_nor_backend() {
    let rig = rig(1);
    for (what, mistake) in WRONG {
        rig.negotiate();
        for (offset, value) in [(0x38, 64), (0x80, 0x1000), (0x90, 0x2000), (0xa0, 0x3000)] {
            rig.write(offset, value);
        }
        for (offset, value) in mistake {
            rig.write(*offset, *value);
        }
        rig.write(0x44, 1);
        rig.machine.take_interrupts();
        rig.write(0x70, 0xf);
        assert_eq!((rig.machine.page_u32(0x70), rig.machine.page_u32(0x60)), (0x4f, 3), "{what}");
        assert_eq!(rig.machine.take_interrupts(), 1, "{what}");
        assert!(matches!(rig.device.handle().phase(), PhaseReport::NeedsReset(_)), "{what}");
        rig.write(0x50, 0);
        assert_eq!((rig.kicks().len(), rig.machine.routes().len()), (0, 1), "{what}");
        assert!(rig.backend.calls().is_empty(), "{what}: the backend hears nothing of it");
        rig.write(0x70, 0);
        assert_eq!((rig.machine.page_u32(0x70), rig.device.handle().phase()), (0, PhaseReport::Idle));
    }
    rig.start_driver();
    assert_eq!(rig.machine.page_u32(0x70), 0xf);
    assert_eq!(rig.device.handle().phase(), PhaseReport::Running);
}

#[test]
fn peer_lost_after_a_mistake_of_the_driver_breaks_the_device() {
    let rig = rig(1);
    rig.negotiate();
    rig.write(0x38, 0);
    rig.write(0x44, 1);
    rig.write(0x70, 0xf);
    rig.device.handle().peer_lost("it crashed");
    assert_eq!(rig.device.handle().phase(), PhaseReport::Broken("it crashed".into()));
    rig.negotiate_in_vain();
}

#[test]
fn backend_that_does_not_stop_leaves_a_broken_device_that_refuses_the_next_driver() {
    let rig = rig(1);
    rig.start_driver();
    lock(&rig.backend.0).on_stop = Outcome::Lost;
    rig.write(0x70, 0);
    assert_eq!(rig.machine.page_u32(0x70), 0, "a reset is a reset");
    rig.negotiate_in_vain();
    rig.device.handle().machine_reset();
    rig.page_is_current();
    rig.negotiate_in_vain();
}

#[test]
fn peer_lost_while_running_tells_the_driver_and_undoes_the_connections() {
    let rig = rig(2);
    rig.start_driver();
    rig.device.handle().peer_lost("it crashed");
    rig.page_is_current();
    assert_eq!((rig.machine.page_u32(0x70), rig.machine.page_u32(0x60)), (0x4f, 3));
    assert_eq!((rig.kicks().len(), rig.machine.routes().len()), (0, 1));
    rig.write(0x64, 3);
    assert_eq!(rig.machine.page_u32(0x60), 1);
    rig.device.handle().peer_lost("again");
    assert_eq!(rig.device.handle().phase(), PhaseReport::Broken("it crashed".into()));
    assert_eq!(rig.device.handle().stats().config_interrupts, 1);
}

#[test]
fn peer_lost_before_the_driver_is_ready_is_told_once_it_is() {
    let rig = rig(1);
    rig.start_driver();
    rig.write(0x70, 0);
    for status in [1, 3] {
        rig.write(0x70, status);
    }
    rig.write(0x24, 1);
    rig.write(0x20, 1);
    rig.write(0x70, 0xb);
    rig.device.handle().peer_lost("gone");
    assert_eq!((rig.machine.page_u32(0x70), rig.machine.page_u32(0x60)), (0x4b, 1));
    rig.write(0x70, 0x4f);
    assert_eq!((rig.machine.page_u32(0x70), rig.machine.page_u32(0x60)), (0x4f, 3));
}

#[test]
fn changed_configuration_is_shown_between_two_generations_and_interrupts() {
    let rig = rig(1);
    rig.start_driver();
    lock(&rig.backend.0).config[0] = 99;
    rig.device.handle().config_changed();
    rig.page_is_current();
    assert_eq!(rig.machine.page_bytes(0x100, 2), [99, 2]);
    assert_eq!(rig.machine.generations(), [0, 1, 2]);
    assert_eq!(rig.machine.page_u32(0x60), 3);
    rig.write(0x64, 3);
    assert_eq!(rig.machine.page_u32(0x60), 1);

    rig.device.handle().config_changed();
    assert_eq!(rig.machine.page_u32(0x60), 1, "the same configuration again is no change");
    assert_eq!(rig.machine.generations(), [0, 1, 2]);
}

#[test]
fn configuration_that_cannot_be_read_breaks_the_device_only_when_the_peer_is_lost() {
    let rig = rig(1);
    rig.start_driver();
    lock(&rig.backend.0).on_read = Outcome::Refused;
    rig.device.handle().config_changed();
    assert_eq!(rig.device.handle().phase(), PhaseReport::Running);
    lock(&rig.backend.0).on_read = Outcome::Lost;
    rig.device.handle().config_changed();
    assert_eq!(rig.machine.page_u32(0x70), 0x4f);
}

#[test]
fn driver_writes_to_the_configuration_reach_the_backend_and_are_read_back_without_interrupt() {
    let features = DeviceFeatures::from_bits(1 << 32 | 1 << 11);
    let rig = rig_of(Model { features, ..disk(1) });
    rig.start_driver();
    rig.backend.calls();
    lock(&rig.backend.0).config[32] = 1;
    rig.device.write(0x120, &[1]);
    rig.page_is_current();
    assert_eq!(rig.backend.calls(), ["write 32 [1]", "read"]);
    assert_eq!((rig.machine.page_bytes(0x120, 1), rig.machine.page_u32(0x60)), (vec![1], 1));
    for (offset, length) in
        [(0x13c, 1), (0x138, 8), (0xffc, 4), (0x100, 3), (0x100, 4), (0x11f, 2), (0x120, 2)]
    {
        rig.device.write(offset, &vec![7; length]);
    }
    assert!(rig.backend.calls().is_empty(), "beyond the configuration, or not the driver's to write");
    lock(&rig.backend.0).on_write = Outcome::Lost;
    rig.device.write(0x120, &[0]);
    assert_eq!(rig.machine.page_u32(0x70), 0x4f);
}

#[test]
fn window_of_an_input_device_is_told_whole_and_the_choice_of_the_driver_stays() {
    let device_type = DeviceType::named("input").unwrap();
    let rig = rig_of(Model { device_type, config: vec![0; 136], ..disk(2) });
    rig.start_driver();
    rig.backend.calls();
    let told = |select: u8, subsel: u8, rest: u8| {
        let mut whole = vec![rest; 136];
        whole[..2].copy_from_slice(&[select, subsel]);
        format!("write 0 {whole:?}")
    };
    // The backend does not know of a half-written selection, and shows zeroes.
    lock(&rig.backend.0).config = vec![0; 136];
    rig.device.write(0x100, &[0x11]);
    rig.page_is_current();
    assert_eq!(rig.backend.calls(), [told(0x11, 0, 0), "read".into()]);
    lock(&rig.backend.0).config = vec![5; 136];
    rig.device.write(0x101, &[1]);
    rig.page_is_current();
    assert_eq!(rig.backend.calls(), [told(0x11, 1, 0), "read".into()]);
    assert_eq!(rig.machine.page_bytes(0x100, 4), [0x11, 1, 5, 5]);
    rig.device.write(0x100, &[1]);
    assert_eq!(rig.backend.calls(), [told(1, 1, 5), "read".into()]);
}

#[test]
fn kick_and_acknowledgement_that_reach_us_are_counted_and_still_work() {
    let rig = rig(2);
    rig.write(0x50, 0);
    rig.start_driver();
    assert_eq!(rig.device.handle().stats().trapped, Default::default());
    rig.write(0x50, 1);
    rig.write(0x50, 7);
    rig.write(0x64, 1);
    rig.write(0x14, 1);
    let trapped = rig.device.handle().stats().trapped;
    assert_eq!((trapped.queue_notify, trapped.interrupt_ack, trapped.other), (2, 1, 1));
}

#[test]
fn register_writes_of_another_width_or_place_change_nothing() {
    let rig = rig(1);
    let before = rig.machine.page_bytes(0, 0x1000);
    for (offset, data) in [
        (0x70, &[1][..]),
        (0x70, &[1, 0]),
        (0x70, &[1, 0, 0, 0, 0, 0, 0, 0]),
        (0x71, &[1, 0, 0, 0]),
        (0x00, &[1, 0, 0, 0]),
        (0x10, &[1, 0, 0, 0]),
        (0xfc, &[1, 0, 0, 0]),
        (0xfe, &[1, 0, 0, 0]),
    ] {
        rig.device.write(offset, data);
        assert_eq!(rig.machine.page_bytes(0, 0x1000), before, "{offset:#x} {data:?}");
    }
}

#[test]
fn machine_reset_stops_the_backend_and_shows_registers_at_power_on() {
    let rig = rig(1);
    rig.start_driver();
    rig.backend.calls();
    rig.device.handle().machine_reset();
    rig.page_is_current();
    assert_eq!(rig.backend.calls(), ["stop"]);
    assert_eq!(rig.machine.page_u32(0x70), 0);
    rig.start_driver();
    assert_eq!(rig.machine.page_u32(0x70), 0xf);
}

#[test]
fn unplugged_device_is_stopped_and_serves_the_next_board_as_at_power_on() {
    let rig = rig(1);
    rig.start_driver();
    rig.backend.calls();
    let handle = rig.device.handle();
    handle.with(|device| device.interrupt_config());
    handle.unplug();
    assert_eq!(rig.backend.calls(), ["stop"]);
    assert_eq!(handle.phase(), PhaseReport::Idle);
    assert!(rig.machine.doorbells().is_empty() && rig.machine.routes().is_empty());
    rig.device.write(0x70, &1_u32.to_le_bytes());
    handle.machine_reset();
    assert!(rig.backend.calls().is_empty(), "the old board cannot reach it");

    let machine = Recorder::default();
    let device = MmioDevice::new(&handle, PLACE, &machine.ports()).unwrap();
    let rig = Rig { device, machine, backend: rig.backend };
    rig.page_is_current();
    assert_eq!((rig.machine.page_u32(0x60), rig.machine.take_interrupts()), (1, 0));
    rig.start_driver();
    assert_eq!(rig.machine.page_u32(0x70), 0xf);
    assert_eq!(rig.backend.calls().len(), 1);
}

#[test]
fn end_of_the_machine_stops_the_backend_once_and_nothing_starts_again() {
    let rig = rig(1);
    rig.start_driver();
    rig.backend.calls();
    rig.device.handle().end();
    rig.device.handle().end();
    assert_eq!(rig.backend.calls(), ["stop", "disconnect", "disconnect"]);
    assert!(rig.machine.doorbells().is_empty() && rig.machine.routes().is_empty());
    for status in [1_u32, 3, 0xb, 0xf] {
        rig.device.write(0x70, &status.to_le_bytes());
    }
    assert!(rig.backend.calls().is_empty());
}

#[test]
fn device_that_is_dropped_leaves_nothing_registered() {
    let rig = rig(2);
    rig.start_driver();
    let Rig { device, machine, .. } = rig;
    drop(device);
    assert!(machine.doorbells().is_empty() && machine.routes().is_empty());
}

#[test]
fn machine_that_refuses_the_interrupt_refuses_the_device_and_keeps_nothing() {
    let (machine, backend) = (Recorder::default(), Scripted::default());
    machine.refuse_routes();
    let parts = Parts {
        name: "d".into(),
        model: disk(1),
        backend: Box::new(backend),
        memory: memory(),
        outlets: Outlets::default(),
        service: None,
    };
    let error =
        MmioDevice::new(&DeviceHandle::new(parts).unwrap(), PLACE, &machine.ports()).map(|_| ()).unwrap_err();
    assert_eq!(error.to_string(), "cannot connect the device to the machine");
    assert!(machine.doorbells().is_empty());
}

/// After any sequence of writes the page is current. The doorbells of a running device are those of its
/// enabled queues; otherwise everything is unbound.
#[test]
fn arbitrary_writes_never_break_the_invariants() {
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = move |below: usize| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        usize::try_from(seed >> 33).unwrap() % below
    };
    let statuses = [0, 1, 3, 0xb, 0xf, 0x80, 0x8f, 0x40, 0xff];
    let values = [0, 1, 2, 3, 4, 64, 256, 0x1000, 0x2000, 0x3000, 0xffff_ffff];
    let mut activations = 0;
    for _ in 0..30 {
        let rig = rig(2);
        for _ in 0..400 {
            let (offset, value) = match random(10) {
                0..4 => (0x70, statuses[random(statuses.len())]),
                4..6 => (0x44, u32::try_from(random(2)).unwrap()),
                6 => (0x20, 1),
                7 => (0x24, 1),
                _ => (u64::try_from(random(0x60) * 4).unwrap(), values[random(values.len())]),
            };
            rig.write(offset, value);
            let handle = rig.device.handle();
            let (running, ready) = handle.with(|device| {
                let ready = device.registers().queues().iter().filter(|queue| queue.ready).count();
                (device.phase() == PhaseReport::Running, ready)
            });
            assert_eq!(rig.kicks().len(), if running { ready } else { 0 });
            let status = rig.machine.page_u32(0x70);
            assert!(!running || status & 0xf == 0xf, "{status:#x}");
        }
        activations += rig.device.handle().stats().activations;
    }
    assert!(activations > 0, "the sequences never got as far as a running device");
}

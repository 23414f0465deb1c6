use std::sync::atomic::{AtomicU32, Ordering};

use super::*;
use crate::bus::Bus;
use crate::pci::{BarIndex, Decoded, Function, Window, Windows};
use crate::testing::Recorder;

const LINE: u32 = 9;
const PORTS: u64 = 0x610;

/// A function whose whole configuration space reads 0x11, and that counts how often it was unplugged.
#[derive(Default)]
struct Thing(AtomicU32);

impl Function for Thing {
    fn config_read(&self, _: u16, data: &mut [u8]) {
        data.fill(0x11);
    }
    fn config_write(&self, _: u16, _: &[u8]) {}
    fn decoded(&self) -> Vec<Decoded> {
        Vec::new()
    }
    fn bar_read(&self, _: BarIndex, _: u64, _: &mut [u8]) {}
    fn bar_write(&self, _: BarIndex, _: u64, _: &[u8]) {}
}

impl Occupant for Thing {
    fn unplug(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

struct Machine {
    recorder: Recorder,
    bridge: Arc<HostBridge>,
    hotplug: Arc<Hotplug>,
    buses: [Bus; 2],
}

impl Machine {
    fn new() -> Self {
        let recorder = Recorder::default();
        let none = Window::default();
        let bridge = HostBridge::new(Windows { memory32: none, memory64: none, io: none });
        let line = EventLine::new(recorder.ports().interrupts.as_ref(), LINE).unwrap();
        let hotplug = Hotplug::new(Arc::clone(&bridge), Arc::new(line));
        let (mut pio, mut mmio) = (Bus::new(), Bus::new());
        pio.insert(PORTS, Hotplug::LENGTH, "pci-hotplug", hotplug.clone()).unwrap();
        mmio.insert(0, 1 << 20, "ecam", bridge.ecam()).unwrap();
        Self { recorder, bridge, hotplug, buses: [pio, mmio] }
    }

    fn add(&self, at: u8) -> (DeviceNumber, Arc<Thing>) {
        let (number, thing) = (DeviceNumber::new(at).unwrap(), Arc::new(Thing::default()));
        self.bridge.insert(Some(number), thing.clone()).unwrap();
        self.hotplug.occupy(number, thing.clone());
        (number, thing)
    }

    fn register(&self, offset: u64) -> u32 {
        let mut data = [0xff; 4];
        self.buses[0].read(PORTS + offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn eject(&self, bits: u32) {
        self.buses[0].write(PORTS + Hotplug::EJECT, &bits.to_le_bytes());
    }

    /// Whether the guest finds something at this number.
    fn answers(&self, number: DeviceNumber) -> bool {
        let mut data = [0; 4];
        self.buses[1].read(u64::from(number.get()) << 15, &mut data);
        data != [0xff; 4]
    }

    fn raised(&self) -> u64 {
        self.recorder.take_raised().iter().map(|(line, times)| if *line == LINE { *times } else { 0 }).sum()
    }
}

#[test]
fn a_lost_device_is_told_of_once_and_leaves_the_bus_when_the_guest_lets_go_of_it() {
    let machine = Machine::new();
    let ((one, first), (two, second)) = (machine.add(1), machine.add(31));
    assert_eq!((machine.register(Hotplug::PRESENT), machine.register(Hotplug::GONE)), (0x8000_0002, 0));
    assert_eq!(machine.raised(), 0);

    machine.hotplug.lost(two);
    machine.hotplug.lost(two);
    assert_eq!(machine.raised(), 1, "one loss, one interrupt");
    assert_eq!(machine.register(Hotplug::PRESENT), 2);
    assert_eq!(machine.register(Hotplug::GONE), 0x8000_0000);
    assert_eq!(machine.register(Hotplug::GONE), 0, "reading clears");
    assert!(machine.answers(two), "the function itself says what a broken device reads, until it is ejected");

    machine.eject(0x8000_0000);
    assert!(!machine.answers(two) && machine.answers(one));
    assert_eq!((first.0.load(Ordering::Relaxed), second.0.load(Ordering::Relaxed)), (0, 1));
    machine.eject(0x8000_0000);
    machine.hotplug.lost(two);
    assert_eq!((second.0.load(Ordering::Relaxed), machine.raised()), (1, 0), "it is gone already");
}

#[test]
fn the_line_is_high_again_until_the_guest_has_asked() {
    let machine = Machine::new();
    let (number, _) = machine.add(1);
    machine.hotplug.lost(number);
    for _ in 0..3 {
        assert_eq!(machine.raised(), 1);
        machine.recorder.end_of_interrupt(LINE);
        machine.hotplug.line_lowered();
    }
    assert_eq!((machine.raised(), machine.register(Hotplug::GONE)), (1, 2));
    machine.recorder.end_of_interrupt(LINE);
    machine.hotplug.line_lowered();
    assert_eq!(machine.raised(), 0);
}

#[test]
fn losses_that_come_together_are_read_together() {
    let machine = Machine::new();
    let numbers: Vec<_> = (1..=31).map(|at| machine.add(at).0).collect();
    numbers.iter().for_each(|number| machine.hotplug.lost(*number));
    assert_eq!((machine.raised(), machine.register(Hotplug::GONE)), (31, !1));
    machine.eject(u32::MAX);
    assert!(!numbers.iter().any(|number| machine.answers(*number)));
}

#[test]
fn a_working_device_can_be_switched_off_and_another_one_cannot() {
    let machine = Machine::new();
    let (_, thing) = machine.add(4);
    let fixed = DeviceNumber::new(5).unwrap();
    machine.bridge.insert(Some(fixed), Arc::new(Thing::default())).unwrap();
    machine.eject(1 << 5 | 1);
    assert!(machine.answers(fixed), "nobody said that it may go");
    machine.hotplug.lost(fixed);
    assert_eq!(machine.raised(), 0);
    machine.eject(1 << 4);
    assert_eq!((thing.0.load(Ordering::Relaxed), machine.register(Hotplug::PRESENT)), (1, 0));
    // The slot can be used again, and GONE no longer reports the previous device.
    let (number, _) = machine.add(4);
    assert_eq!(machine.register(Hotplug::PRESENT), 1 << 4);
    machine.hotplug.lost(number);
    machine.hotplug.occupy(number, thing);
    assert_eq!((machine.register(Hotplug::PRESENT), machine.register(Hotplug::GONE)), (1 << 4, 0));
}

#[test]
fn accesses_of_other_widths_and_places_read_zero_and_change_nothing() {
    let machine = Machine::new();
    let (number, thing) = machine.add(1);
    machine.hotplug.lost(number);
    for offset in 0..Hotplug::LENGTH {
        for width in [1, 2, 3, 4, 8] {
            if width == 4 && offset % 4 == 0 {
                continue;
            }
            let mut data = vec![0xff; width];
            machine.hotplug.read(offset, &mut data);
            assert_eq!(data, vec![0; width], "{offset} {width}");
            machine.hotplug.write(offset, &vec![0xff; width]);
        }
    }
    for offset in [Hotplug::GONE, Hotplug::PRESENT] {
        machine.hotplug.write(offset, &[0xff; 4]);
    }
    assert_eq!(thing.0.load(Ordering::Relaxed), 0);
    assert_eq!((machine.register(Hotplug::EJECT), machine.register(Hotplug::GONE)), (0, 2));
}

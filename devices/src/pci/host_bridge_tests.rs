use super::*;
use crate::bus::Bus;
use crate::pci::bar::{BarKind, BarSpec, Command};

const WINDOWS: Windows = Windows {
    memory32: Window { base: 0xc000_0000, size: 0x1000_0000 },
    memory64: Window { base: 0x80_0000_0000, size: 0x40_0000_0000 },
    io: Window { base: 0xc000, size: 0x4000 },
};
const ECAM: u64 = 0xe000_0000;

/// A function with a memory BAR and a port BAR. Each read returns the BAR and the offset of the read.
struct Thing {
    config: Mutex<ConfigSpace>,
    writes: Mutex<Vec<(u8, u64, Vec<u8>)>>,
}

impl Function for Thing {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        assert!(usize::from(offset & 3) + data.len() <= 4, "inside a dword");
        lock(&self.config).read(offset, data);
    }
    fn config_write(&self, offset: u16, data: &[u8]) {
        assert!(usize::from(offset & 3) + data.len() <= 4, "inside a dword");
        lock(&self.config).write(offset, data);
    }
    fn decoded(&self) -> Vec<Decoded> {
        lock(&self.config).decoded()
    }
    fn bar_read(&self, bar: BarIndex, offset: u64, data: &mut [u8]) {
        data.fill(bar.get() << 4 | u8::try_from(offset & 0xf).unwrap());
    }
    fn bar_write(&self, bar: BarIndex, offset: u64, data: &[u8]) {
        lock(&self.writes).push((bar.get(), offset, data.to_vec()));
    }
}

struct Machine {
    bridge: Arc<HostBridge>,
    memory: Bus,
    ports: Bus,
}

impl Machine {
    fn new() -> Self {
        let bridge = HostBridge::new(WINDOWS);
        let (mut memory, mut ports) = (Bus::new(), Bus::new());
        memory.insert(ECAM, ECAM_LENGTH, "ecam", bridge.ecam()).unwrap();
        for window in [WINDOWS.memory32, WINDOWS.memory64] {
            memory.insert(window.base, window.size, "memory", bridge.memory(window)).unwrap();
        }
        ports.insert(CONFIG_PORTS, CONFIG_PORTS_LENGTH, "ports", bridge.config_ports()).unwrap();
        ports.insert(WINDOWS.io.base, WINDOWS.io.size, "io", bridge.io()).unwrap();
        Self { bridge, memory, ports }
    }

    fn add(&self) -> (DeviceNumber, Arc<Thing>) {
        let bar = |index, kind, size| BarSpec { index: BarIndex::new(index).unwrap(), kind, size };
        let specs = [bar(0, BarKind::Memory64, 0x2000), bar(2, BarKind::Io, 0x40)];
        let mut bars = Bars::new(&specs, WINDOWS).unwrap();
        self.bridge.assign(&mut bars);
        let identity = Identity { vendor: 0x1234, device: 0x5678, ..IDENTITY };
        let config = Mutex::new(ConfigSpace::new(identity, bars, 1));
        let thing = Arc::new(Thing { config, writes: Mutex::default() });
        (self.bridge.insert(None, thing.clone()).unwrap(), thing)
    }

    fn ecam(&self, device: u8, register: u64) -> u64 {
        ECAM + (u64::from(device) << 15) + register
    }

    fn read32(&self, device: u8, register: u64) -> u32 {
        let mut data = [0; 4];
        self.memory.read(self.ecam(device, register), &mut data);
        u32::from_le_bytes(data)
    }

    fn write32(&self, device: u8, register: u64, value: u32) {
        self.memory.write(self.ecam(device, register), &value.to_le_bytes());
    }

    fn enable(&self, device: u8) {
        self.write32(device, 4, u32::from(Command::IO | Command::MEMORY));
    }

    /// What the guest reads at an address.
    fn byte(&self, bus: &Bus, address: u64) -> u8 {
        let mut data = [0];
        bus.read(address, &mut data);
        data[0]
    }
}

#[test]
fn both_ways_lead_to_the_same_configuration_space() {
    let machine = Machine::new();
    let (number, _) = machine.add();
    assert_eq!(number.get(), 1);
    assert_eq!(machine.read32(0, 0), 0x0008_1b36);
    assert_eq!(machine.read32(0, 8), 0x0600_0000);
    assert_eq!(machine.read32(1, 0), 0x5678_1234);
    assert_eq!(machine.read32(2, 0), u32::MAX);
    let address = |value: u32| machine.ports.write(0xcf8, &value.to_le_bytes());
    address(0x8000_0800);
    let mut data = [0; 4];
    machine.ports.read(0xcf8, &mut data);
    assert_eq!(u32::from_le_bytes(data), 0x8000_0800);
    machine.ports.read(0xcfc, &mut data);
    assert_eq!(u32::from_le_bytes(data), 0x5678_1234);
    let mut word = [0; 2];
    machine.ports.read(0xcfe, &mut word);
    assert_eq!(word, [0x78, 0x56]);
    address(0x8000_083c);
    machine.ports.write(0xcfc, &[0x2a]);
    assert_eq!(machine.read32(1, 0x3c), 0x12a);
    for nobody in [0x0000_0800, 0x8001_0800, 0x8000_0900, 0x8000_1000] {
        address(nobody);
        machine.ports.read(0xcfc, &mut data);
        assert_eq!(u32::from_le_bytes(data), u32::MAX, "{nobody:#x}");
    }
    machine.ports.write(0xcfb, &[1]);
    machine.ports.read(0xcf8, &mut data);
    assert_eq!(u32::from_le_bytes(data), 0x8000_1000, "only a dword changes the address");
}

#[test]
fn accesses_that_cross_dwords_and_functions_are_taken_apart() {
    let machine = Machine::new();
    machine.add();
    let mut eight = [0; 8];
    machine.memory.read(machine.ecam(1, 0), &mut eight);
    assert_eq!(eight, [0x34, 0x12, 0x78, 0x56, 0, 0, 0, 0]);
    let mut odd = [0; 4];
    machine.memory.read(machine.ecam(1, 1), &mut odd);
    assert_eq!(odd, [0x12, 0x78, 0x56, 0]);
    machine.memory.read(machine.ecam(1, 0xffe), &mut odd);
    assert_eq!(odd, [0, 0, 0xff, 0xff], "the next function is not there");
    machine.memory.write(machine.ecam(1, 2), &[0xff; 4]);
    assert_eq!(machine.read32(1, 4), 0x0547);
}

#[test]
fn bars_are_reached_where_they_are_and_only_while_decoded() {
    let machine = Machine::new();
    let (_, thing) = machine.add();
    let at = u64::from(machine.read32(1, 0x10) & !0xf);
    let port = u64::from(machine.read32(1, 0x18) & !3);
    assert_eq!((at, port), (0xc000_0000, 0xc000));
    assert_eq!(machine.byte(&machine.memory, at + 5), 0xff, "not enabled yet");
    machine.enable(1);
    assert_eq!(machine.byte(&machine.memory, at + 5), 0x05);
    assert_eq!(machine.byte(&machine.ports, port + 6), 0x26);
    assert_eq!(machine.byte(&machine.memory, at + 0x2000), 0xff, "behind it");
    // The BAR moves into the window above 4 GiB.
    machine.write32(1, 0x14, 0x81);
    let far = 0x81_0000_0000 | at;
    assert_eq!(machine.byte(&machine.memory, at + 5), 0xff);
    assert_eq!(machine.byte(&machine.memory, far + 5), 0x05);
    machine.memory.write(far + 0x1ffc, &[1, 2, 3, 4]);
    machine.memory.write(far + 0x1ffd, &[1, 2, 3, 4]);
    machine.ports.write(port + 1, &[9]);
    assert_eq!(*lock(&thing.writes), [(0, 0x1ffc, vec![1, 2, 3, 4]), (2, 1, vec![9])]);
    machine.write32(1, 4, 0);
    assert_eq!(machine.byte(&machine.memory, far + 5), 0xff);
    assert_eq!(machine.byte(&machine.ports, port + 6), 0xff);
}

#[test]
fn two_bars_on_the_same_addresses_do_no_harm_and_come_apart_again() {
    let machine = Machine::new();
    machine.add();
    machine.add();
    machine.enable(1);
    machine.enable(2);
    let home = machine.read32(2, 0x10);
    machine.write32(2, 0x10, machine.read32(1, 0x10));
    assert_eq!(machine.byte(&machine.memory, 0xc000_0000), 0);
    assert_eq!(machine.byte(&machine.memory, u64::from(home & !0xf)), 0xff);
    machine.write32(1, 0x10, home);
    assert_eq!(machine.byte(&machine.memory, 0xc000_0000), 0, "now the second one's");
    assert_eq!(machine.byte(&machine.memory, u64::from(home & !0xf)), 0);
}

#[test]
fn thirty_one_devices_fit_and_a_removed_one_is_gone() {
    let machine = Machine::new();
    for expected in DeviceNumber::ALL {
        let (number, _) = machine.add();
        assert_eq!(number.get(), expected);
        machine.enable(expected);
    }
    let (_, thing) = {
        let other = Machine::new();
        other.add()
    };
    assert_eq!(machine.bridge.insert(None, thing.clone()), Err(InsertError::Full));
    let seventh = DeviceNumber::new(7).unwrap();
    assert_eq!(machine.bridge.insert(Some(seventh), thing.clone()), Err(InsertError::Taken(seventh)));
    let at = u64::from(machine.read32(7, 0x10) & !0xf);
    assert_eq!(machine.byte(&machine.memory, at), 0);
    assert!(machine.bridge.remove(seventh).is_some() && machine.bridge.remove(seventh).is_none());
    assert_eq!((machine.read32(7, 0), machine.byte(&machine.memory, at)), (u32::MAX, 0xff));
    assert_eq!(machine.bridge.insert(None, thing), Ok(seventh));
    machine.bridge.clear();
    assert_eq!(machine.read32(1, 0), u32::MAX);
}

/// A function whose configuration writes take long. It counts the writes that have begun and those that have
/// ended.
#[derive(Default)]
struct Slow {
    begun: std::sync::atomic::AtomicU32,
    ended: std::sync::atomic::AtomicU32,
}

impl Function for Slow {
    fn config_read(&self, _: u16, data: &mut [u8]) {
        data.fill(0);
    }
    fn config_write(&self, _: u16, _: &[u8]) {
        self.begun.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        std::thread::yield_now();
        self.ended.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
    }
    fn decoded(&self) -> Vec<Decoded> {
        Vec::new()
    }
    fn bar_read(&self, _: BarIndex, _: u64, _: &mut [u8]) {}
    fn bar_write(&self, _: BarIndex, _: u64, _: &[u8]) {}
}

#[test]
fn a_removed_function_has_no_configuration_write_under_way_and_gets_no_other() {
    let machine = Machine::new();
    for _ in 0..1000 {
        let slow = Arc::new(Slow::default());
        let number = machine.bridge.insert(None, slow.clone()).unwrap();
        let counts = || [&slow.begun, &slow.ended].map(|n| n.load(std::sync::atomic::Ordering::SeqCst));
        let then = std::thread::scope(|scope| {
            for _ in 0..3 {
                // Until the function is gone.
                scope.spawn(|| {
                    while machine.read32(1, 0) == 0 {
                        machine.write32(1, 4, 7);
                    }
                });
            }
            while counts()[0] < 3 {
                std::thread::yield_now();
            }
            assert!(machine.bridge.remove(number).is_some());
            counts()
        });
        assert_eq!(then[0], then[1], "one was under way");
        assert_eq!(counts(), then, "another one came");
    }
}

#[test]
fn bars_move_while_other_vcpus_read_them() {
    let machine = Machine::new();
    machine.add();
    machine.enable(1);
    let stop = std::sync::atomic::AtomicBool::new(false);
    let seen = std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut seen = 0_u64;
            while !stop.load(std::sync::atomic::Ordering::Relaxed) || seen == 0 {
                let byte = machine.byte(&machine.memory, 0xc800_0003);
                assert!(byte == 3 || byte == 0xff);
                seen += u64::from(byte == 3);
            }
            seen
        });
        for round in 0..2000_u32 {
            machine.write32(1, 0x10, 0xc800_0000 + (round & 1) * 0x2000);
        }
        machine.write32(1, 0x10, 0xc800_0000);
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        reader.join().unwrap()
    });
    assert!(seen > 0);
}

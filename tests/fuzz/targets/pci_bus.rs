//! Functions on a PCI bus whose guest writes anything anywhere: BARs are decoded inside the windows and where
//! the registers say, an access goes to the function that decodes all of it, and what lies in a BAR lies
//! where the BAR is.
#![no_main]

use std::sync::{Arc, Mutex};

use devices::bus::BusDevice;
use devices::pci::{
    BarIndex, BarKind, BarSpec, Bars, ConfigSpace, Decoded, Fixture, Fixtures, Function, HostBridge,
    Identity, Space, Window, Windows,
};
use devices::ports::{Access, FileRange, WriteWidth};
use fuzz::descriptors::{memory_file, none_left};
use fuzz::input::Input;
use fuzz::ports::Recorder;
use libfuzzer_sys::fuzz_target;

const WINDOWS: Windows = Windows {
    memory32: Window { base: 0xc000_0000, size: 0x1000_0000 },
    memory64: Window { base: 0x80_0000_0000, size: 0x20_0000_0000 },
    io: Window { base: 0xc000, size: 0x4000 },
};

struct State {
    config: ConfigSpace,
    fixtures: Fixtures,
}

/// Answers with its number and BAR, and checks what it is asked.
struct Thing {
    number: u8,
    state: Mutex<State>,
}

impl Function for Thing {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        assert!(offset < 4096 && usize::from(offset & 3) + data.len() <= 4 && !data.is_empty());
        self.state.lock().expect("no panic").config.read(offset, data);
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        assert!(offset < 4096 && usize::from(offset & 3) + data.len() <= 4 && !data.is_empty());
        let mut state = self.state.lock().expect("no panic");
        state.config.write(offset, data);
        let decoded = state.config.decoded();
        // Refused where two functions collide.
        let _ = state.fixtures.place(&decoded);
    }

    fn decoded(&self) -> Vec<Decoded> {
        self.state.lock().expect("no panic").config.decoded()
    }

    fn bar_read(&self, bar: BarIndex, offset: u64, data: &mut [u8]) {
        self.bar_write(bar, offset, data);
        data.fill(self.number << 3 | bar.get());
    }

    fn bar_write(&self, bar: BarIndex, offset: u64, data: &[u8]) {
        let decoded = self.decoded();
        let bar = decoded.iter().find(|decoded| decoded.bar == bar).expect("a BAR that is decoded");
        assert!(offset + data.len() as u64 <= bar.size, "beyond the BAR");
    }
}

fuzz_target!(|data: &[u8]| {
    none_left(|| drive(data));
});

fn specs(input: &mut Input) -> Vec<BarSpec> {
    let kinds = [
        BarKind::Io,
        BarKind::Memory32,
        BarKind::Prefetchable32,
        BarKind::Memory64,
        BarKind::Prefetchable64,
        BarKind::Rom,
    ];
    let mut spec = || {
        let index = BarIndex::new(input.byte() % 7).expect("up to 6");
        let kind = input.pick(&kinds);
        let small = [0x20, 0x1000, 0x2000, 0x1_0000];
        let size = if input.rarely(4) { input.number() } else { input.pick(&small) };
        BarSpec { index, kind, size }
    };
    (0..3).map(|_| spec()).collect()
}

fn thing(input: &mut Input, number: u8, bridge: &HostBridge, machine: &Recorder) -> Option<Arc<Thing>> {
    let mut bars = Bars::new(&specs(input), WINDOWS).ok()?;
    bridge.assign(&mut bars);
    let identity = Identity {
        vendor: 1,
        device: number.into(),
        revision: 0,
        class: 0,
        subsystem_vendor: 0,
        subsystem: 0,
    };
    let mut config = ConfigSpace::new(identity, bars, 1);
    while input.rarely(2) {
        let (body, mask) = (input.bytes(40), input.bytes(50));
        let _ = config.add_capability(9, &body, &mask);
    }
    let bar = BarIndex::new(input.byte() % 6).expect("up to 6");
    let mut fixtures = Fixtures::new(bar, machine.ports());
    let piece = FileRange { fd: Arc::new(memory_file(0x2000)), offset: 0x1000, size: 0x1000 };
    let memory = Fixture::Memory { piece, access: Access::ReadWrite, vanished: Arc::new(|| ()) };
    let bell = Fixture::Doorbell { fd: memory_file(0), width: WriteWidth::Any, value: None };
    fixtures.add(0, memory).expect("the BAR is nowhere");
    fixtures.add(0x10, bell).expect("the BAR is nowhere");
    Some(Arc::new(Thing { number, state: Mutex::new(State { config, fixtures }) }))
}

fn drive(data: &[u8]) {
    let mut input = Input::new(data);
    let (machine, bridge) = (Recorder::crowded(0), HostBridge::new(WINDOWS));
    let mut things: Vec<(u8, Arc<Thing>)> = Vec::new();
    for number in 1..=3 + input.byte() % 4 {
        if let Some(thing) = thing(&mut input, number, &bridge, &machine) {
            let at = bridge.insert(None, thing.clone()).expect("there is room");
            things.push((at.get(), thing));
        }
    }
    let (ecam, ports) = (bridge.ecam(), bridge.config_ports());
    let windows = [
        (WINDOWS.memory32, Space::Memory, bridge.memory(WINDOWS.memory32)),
        (WINDOWS.memory64, Space::Memory, bridge.memory(WINDOWS.memory64)),
        (WINDOWS.io, Space::Io, bridge.io()),
    ];
    while !input.is_empty() {
        let device = u64::from(input.byte() % 8) << 15;
        match input.byte() % 8 {
            0 => ecam.write(device + 4, &[input.byte() | 3, 0]),
            1 => {
                let value = if input.rarely(3) { input.number() as u32 } else { 0xc000_0000 | input.u32() };
                ecam.write(device + 0x10 + u64::from(input.byte() % 6) * 4, &value.to_le_bytes());
            }
            2 => ecam.write(device + 0x14, &[input.pick(&[0, 0x80, 0x9f, 0xa0]), 0, 0, 0]),
            3 => ecam.write(input.number() & 0xf_fff7, &input.bytes(8)),
            4 => {
                let mut data = [0xaa; 8];
                let length = input.below(9);
                ecam.read(input.number() & 0xf_fff0, &mut data[..length]);
                assert!(data[length..].iter().all(|byte| *byte == 0xaa));
            }
            5 => {
                ports.write(0, &(1 << 31 | (device as u32) >> 4 | input.u16() as u32 & 0xfc).to_le_bytes());
                ports.write(4 + u64::from(input.byte() & 3), &[input.byte()]);
                ports.read(u64::from(input.byte() & 7), &mut [0]);
            }
            // The bus hands on only what is inside the eight ports, and never nothing.
            6 => {
                let (port, bytes) = (input.byte() & 7, input.u32().to_le_bytes());
                let length = (input.below(4) + 1).min(8 - usize::from(port));
                ports.write(port.into(), &bytes[..length]);
            }
            _ => {
                let (window, space, through) = &windows[input.below(3)];
                let decoded = things.iter().flat_map(|(_, thing)| thing.decoded()).collect::<Vec<_>>();
                let near = decoded.get(input.below(decoded.len().max(1))).map_or(0, |d| d.base);
                let offset = near.wrapping_sub(window.base).wrapping_add(u64::from(input.byte() % 80));
                let offset =
                    if offset < window.size - 8 { offset } else { input.number() % (window.size - 8) };
                access(&things, through.as_ref(), *space, window.base + offset, offset, input.below(8) + 1);
            }
        }
        check(&things, &machine);
    }
    drop((things, windows));
    bridge.clear();
    assert!(machine.doorbells().is_empty() && machine.shown().is_empty());
}

/// An access goes to somebody who decodes all of it; to nobody when nobody does.
fn access(
    things: &[(u8, Arc<Thing>)],
    bus: &dyn BusDevice,
    space: Space,
    at: u64,
    offset: u64,
    length: usize,
) {
    let mut data = vec![0xaa; length];
    bus.read(offset, &mut data);
    bus.write(offset, &vec![0; length]);
    let holds = |d: &Decoded| d.space == space && d.base <= at && at + length as u64 <= d.base + d.size;
    let who = things.iter().find(|(_, thing)| {
        thing.decoded().iter().any(|d| holds(d) && data[0] == thing.number << 3 | d.bar.get())
    });
    if who.is_none() {
        assert!(data.iter().all(|byte| *byte == 0xff), "{at:#x}: {data:x?}");
    }
    // Without a collision it is not lost.
    let all: Vec<Decoded> = things.iter().flat_map(|(_, thing)| thing.decoded()).collect();
    let apart = |a: &Decoded| {
        let overlaps =
            |b: &&Decoded| b.space == a.space && a.base < b.base + b.size && b.base < a.base + a.size;
        all.iter().filter(overlaps).count() == 1
    };
    if all.iter().any(|d| holds(d) && apart(d)) {
        assert!(who.is_some(), "{at:#x} is lost");
    }
}

/// What is decoded is inside the windows and aligned; what is in a BAR is where the BAR is.
fn check(things: &[(u8, Arc<Thing>)], machine: &Recorder) {
    let all: Vec<Decoded> = things.iter().flat_map(|(_, thing)| thing.decoded()).collect();
    for Decoded { space, base, size, .. } in &all {
        assert!(size.is_power_of_two() && base % size == 0);
        let windows = match space {
            Space::Memory => [WINDOWS.memory32, WINDOWS.memory64],
            Space::Io => [WINDOWS.io, WINDOWS.io],
        };
        assert!(
            windows.iter().any(|window| *base >= window.base && base + size <= window.base + window.size)
        );
    }
    for (at, size) in machine.shown() {
        let inside = |d: &Decoded| d.space == Space::Memory && d.base == at && size <= d.size;
        assert!(all.iter().any(inside), "a piece at {at:#x}, where no BAR is");
    }
    assert!(machine.doorbells().len() <= things.len());
}

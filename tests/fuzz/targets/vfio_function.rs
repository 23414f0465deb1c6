//! A vfio-user server's function: whatever its configuration space, regions and answers are, and whatever the
//! guest does to it, lists end, BARs stay in their windows, and nothing is left behind.
#![no_main]

use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use devices::bus::BusDevice;
use devices::event_line::EventLine;
use devices::pci::vfio_user::VfioUserDevice;
use devices::pci::vfio_user::bars::mappable;
use devices::pci::vfio_user::function::{FunctionShape, Said};
use devices::pci::vfio_user::pin::Look;
use devices::pci::vfio_user::server::{Irq, Server, ServerError, ServerStats, Writes};
use devices::pci::vfio_user::survey::{Doorbell, Piece, Region, Reset};
use devices::pci::{BarIndex, DeviceNumber, Function, HostBridge, Hotplug, Space, Window, Windows};
use devices::ports::WriteWidth;
use fuzz::descriptors::memory_file;
use fuzz::input::Input;
use fuzz::ports::Recorder;
use libfuzzer_sys::fuzz_target;
use transport::peer::deadline::Deadline;

const WINDOWS: Windows = Windows {
    memory32: Window { base: 0xc000_0000, size: 0x1000_0000 },
    memory64: Window { base: 1 << 45, size: 1 << 44 },
    io: Window { base: 0xc000, size: 0x4000 },
};

/// Answers as the input says; the configuration space as it was, mostly.
struct Whim {
    input: Arc<Mutex<Input>>,
    config: Vec<u8>,
}

impl Whim {
    fn outcome(&self) -> Result<(), ServerError> {
        match self.input.lock().expect("no panic").byte() {
            254 => Err(ServerError::Refused("no".into())),
            255 => Err(ServerError::Lost("gone".into())),
            253 => Err(ServerError::Closed("closed".into())),
            _ => Ok(()),
        }
    }
}

impl Server for Whim {
    fn limit(&self) -> Duration {
        Duration::from_secs(2)
    }

    fn is_alive(&self) -> bool {
        self.input.lock().expect("no panic").rarely(2)
    }

    fn read(&self, region: u8, offset: u64, data: &mut [u8], _: &Deadline) -> Result<(), ServerError> {
        self.outcome()?;
        let mut input = self.input.lock().expect("no panic");
        let from = usize::try_from(offset).expect("an offset in a region");
        if region == 7 && !input.rarely(8) {
            data.copy_from_slice(&self.config[from..from + data.len()]);
        } else {
            data.fill_with(|| input.byte());
        }
        Ok(())
    }

    fn write(&self, region: u8, offset: u64, data: &[u8], _: &Deadline) -> Result<(), ServerError> {
        assert!(
            region != 7 || offset.is_multiple_of(data.len() as u64),
            "{} bytes at {offset:#x}",
            data.len()
        );
        self.outcome()
    }

    fn post(&self, _: u8, _: u64, _: &[u8], _: &Deadline) -> Result<(), ServerError> {
        self.outcome()
    }

    fn arm(&self, _: Irq, calls: &[BorrowedFd<'_>], _: &Deadline) -> Result<(), ServerError> {
        assert!((1..=2048).contains(&calls.len()));
        self.outcome()
    }

    fn disarm(&self, _: Irq, _: &Deadline) -> Result<(), ServerError> {
        self.outcome()
    }

    fn unmask_pin(&self, look: Look) -> Result<(), ServerError> {
        self.outcome()?;
        if self.input.lock().expect("no panic").rarely(4) {
            look.asserted();
        }
        Ok(())
    }

    fn reset(&self, _: &Deadline) -> Result<(), ServerError> {
        self.outcome()
    }

    fn shut_down(&self) {}

    fn stats(&self) -> ServerStats {
        ServerStats::default()
    }
}

/// A plain endpoint with MSI-X and MSI, and what the input makes of it.
fn config(input: &mut Input) -> Vec<u8> {
    let mut config = vec![0; if input.rarely(4) { 0x100 } else { 0x1000 }];
    let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &[0x34, 0x12, 0x78, 0x56]);
    put(6, &[0x10]);
    put(0x10, &[0, 0, 0, 0, 0x0c, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0]);
    put(0x34, &[0x40]);
    put(0x3d, &[1]);
    put(0x40, &[0x11, 0x50, 3, 0, 0, 0, 0, 0, 0, 0x08, 0, 0]);
    put(0x50, &[0x05, 0x70, 0x82, 0x01]);
    put(0x70, &[0x10, 0x00, 0x02, 0x00]);
    for _ in 0..input.byte() % 16 {
        let at = usize::from(input.u16()) % config.len() & !3;
        let value = input.u32().to_le_bytes();
        config[at..at + 4].copy_from_slice(&value);
    }
    config
}

fn region(input: &mut Input, shape: &FunctionShape, index: usize) -> Region {
    let bar = shape.bars[index];
    let areas: Vec<_> = (0..input.byte() % 4).map(|_| (input.number(), input.number())).collect();
    let areas = bar.map(|bar| mappable(&bar, &areas, shape.msix.as_ref())).unwrap_or_default();
    let pieces: Vec<_> = areas
        .into_iter()
        .map(|area| Piece { offset: area.start, size: area.end - area.start, file_offset: area.start })
        .collect();
    for piece in &pieces {
        assert!(piece.offset + piece.size <= bar.expect("a BAR").region);
    }
    let doorbells = (index == 0 && input.rarely(2)).then(|| Doorbell {
        offset: 0x10,
        width: WriteWidth::Four,
        value: None,
        fd: memory_file(0),
    });
    let writes = if input.rarely(2) { Writes::Posted } else { Writes::Answered };
    Region {
        readable: !input.rarely(8),
        writable: !input.rarely(8),
        file: Some(Arc::new(memory_file(0))),
        pieces,
        doorbells: doorbells.into_iter().collect(),
        writes,
    }
}

fn dword(device: &VfioUserDevice, at: u16) -> u32 {
    let mut data = [0; 4];
    device.config_read(at, &mut data);
    u32::from_le_bytes(data)
}

/// A guest that looks for the capabilities.
fn walk(device: &VfioUserDevice) {
    let mut at = dword(device, 0x34) & 0xff;
    for step in 0.. {
        if at == 0 || at == 0xff {
            break;
        }
        assert!(step < 48, "a list that does not end");
        at = dword(device, u16::try_from(at).expect("a byte")) >> 8 & 0xff;
    }
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input::new(data);
    let config = config(&mut input);
    let mut bars = [0x1000, 0x4000, 0, 0x20, 0, 0];
    for bar in &mut bars {
        if input.rarely(4) {
            *bar = input.number();
        }
    }
    let interrupts = [1, 2, 4].map(|count| if input.rarely(4) { input.u32() % 2049 } else { count });
    let said = Said { config: &config, bars: &bars, interrupts: &interrupts };
    let mut shape = match FunctionShape::judge(&said) {
        Ok(shape) => shape,
        Err(unfit) => return drop(unfit.to_string()),
    };
    shape.limit_vectors(input.u16());
    shape.oddities.iter().for_each(|oddity| drop(oddity.to_string()));
    let regions = std::array::from_fn(|index| region(&mut input, &shape, index));
    let machine = Recorder::refusing(usize::from(input.byte() % 64));
    let input = Arc::new(Mutex::new(input));
    let server = Arc::new(Whim { input: Arc::clone(&input), config });
    let keeps_decoding = shape.virtio_status.is_some();
    let device = VfioUserDevice::new("fuzzed".into(), server, shape, regions, Reset::Used).expect("eventfds");
    let bridge = HostBridge::new(WINDOWS);
    if device.plug(&machine.ports(), &bridge, Some(20)).is_err() {
        return;
    }
    let number = bridge.insert(None, device.clone()).expect("an empty bus");
    let line = EventLine::new(&Recorder::default(), 9).expect("nothing is refused");
    let hotplug = Hotplug::new(Arc::clone(&bridge), Arc::new(line));
    hotplug.occupy(number, device.clone());
    let mut ejected = false;
    let ids = dword(&device, 0);
    loop {
        let mut now = input.lock().expect("no panic");
        if now.is_empty() {
            break;
        }
        let (op, bar, offset, value) = (now.byte() % 11, now.byte() % 7, now.u16(), now.u64());
        let length = 1 << now.below(4);
        drop(now);
        let (at, word) = (offset & 0xfff, value.to_le_bytes());
        let within = (4 - usize::from(at & 3)).min(length);
        let bar = BarIndex::new(bar).expect("0 to 6");
        match op {
            0 => walk(&device),
            1 => device.config_read(at, &mut [0; 4][..within]),
            // Registers are more interesting than the empty space behind them.
            2 => device.config_write(at, &word[..within]),
            3 => device.config_write(at & 0x7c, &word[..4]),
            4 => device.bar_read(bar, offset.into(), &mut [0; 8][..length]),
            5 => device.bar_write(bar, offset.into(), &word[..length]),
            6 => device.bar_write(bar, u64::from(offset) & 0x3f, &word[..4]),
            7 => hotplug.lost(DeviceNumber::new(value as u8).unwrap_or(number)),
            8 => hotplug.read(offset.into(), &mut [0; 8][..length]),
            9 => {
                hotplug.write(u64::from(offset) & 0xf, &word[..length]);
                ejected |=
                    bridge.remove(number).is_none() || bridge.insert(Some(number), device.clone()).is_err();
            }
            _ => device.pin_served(),
        }
        assert!([ids, u32::MAX].contains(&dword(&device, 0)));
        for bar in device.decoded() {
            let last = bar.base + (bar.size - 1);
            let window = match bar.space {
                Space::Io => WINDOWS.io,
                Space::Memory if last < 1 << 32 => WINDOWS.memory32,
                Space::Memory => WINDOWS.memory64,
            };
            assert!(window.base <= bar.base && last - window.base < window.size, "{bar:x?}");
        }
        if device.link.is_gone() {
            assert_eq!(dword(&device, 0x40), u32::MAX);
            assert!(keeps_decoding || device.decoded().is_empty());
        }
        if device.link.is_gone() || ejected {
            assert_eq!(
                (machine.counts(), machine.shown().len()),
                ((0, 0), 0),
                "a broken or ejected device left something"
            );
        }
    }
    device.unplug();
    assert_eq!((machine.counts(), machine.shown().len()), ((0, 0), 0), "something was left behind");
});

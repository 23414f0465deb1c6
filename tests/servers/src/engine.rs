//! A DMA engine with one of everything: trapped registers, mapped memory with holes, a 64-bit BAR, ports,
//! MSI-X, MSI, the pin, doorbells, DMA by mapping and by message. `README.md` has its registers as a table.

use std::io::{Error, Result};
use std::time::Duration;

use vfio_bindings::bindings::vfio::{
    VFIO_PCI_BAR0_REGION_INDEX, VFIO_PCI_BAR1_REGION_INDEX, VFIO_PCI_BAR2_REGION_INDEX,
    VFIO_PCI_BAR4_REGION_INDEX, VFIO_PCI_CONFIG_REGION_INDEX,
};
use vfio_user::{IrqInfo, ServerRegion};

use crate::area::Area;
use crate::config_space::{self, Bar, ConfigSpace, Decode, Effect, Identity};
use crate::guest_memory::{GuestMemory, OnlyMessages};
use crate::interrupts::{Interrupts, Kind};
use crate::serve::{Device, IoEvent, Progress};

/// Vendor and device.
pub const ID: (u16, u16) = (0x1234, 0x0b0f);
/// What register 0 reads: "ENGN".
pub const MAGIC: u32 = u32::from_le_bytes(*b"ENGN");
/// MSI-X vectors.
pub const MSIX_VECTORS: u16 = 32;

const REGISTERS_SIZE: u64 = 0x1000;
const SPARSE_SIZE: u64 = 0x1_0000;
const SPARSE: [(u64, u64); 2] = [(0x1000, 0x2000), (0x8000, 0x8000)];
const LARGE_SIZE: u64 = 0x10_0000;
const LARGE: [(u64, u64); 1] = [(0, LARGE_SIZE)];
const PORTS_SIZE: u64 = 32;
const TABLE_SIZE: u64 = 0x2000;
/// Most bytes of one command.
const MAX_LENGTH: u64 = 64 << 20;
const PIECE: usize = 64 << 10;
/// Doorbells with an address each, then as many with one address and a value each.
const DOORBELLS: u64 = 8;
const DOORBELL_PAGE: u64 = 0x800;
const SHARED_DOORBELL: u64 = 0x840;

const IDLE: u32 = 0;
const BUSY: u32 = 1;
const DONE: u32 = 2;
const FAILED: u32 = 3;

const LATER: u32 = 1 << 8;
const INTERRUPT: u32 = 1 << 9;

/// What the guest wrote last.
#[derive(Clone, Debug, Default)]
struct Registers {
    scratch: u32,
    status: u32,
    command: u32,
    vector: u32,
    source: u64,
    destination: u64,
    length: u64,
    pattern: u32,
    checksum: u32,
    mode: u32,
    pin: u32,
    sink_count: u32,
    sink_sum: u32,
    port: u32,
    port_writes: u32,
    doorbells: [u32; 16],
}

/// What outlives a reset.
#[derive(Clone, Debug, Default)]
struct Counters {
    reads: u32,
    writes: u32,
    resets: u32,
}

/// The device.
#[derive(Debug)]
pub struct Engine {
    config: ConfigSpace,
    registers: Registers,
    counters: Counters,
    sparse: Area,
    large: Area,
    memory: GuestMemory,
    interrupts: Interrupts,
    waiting: Option<u32>,
}

impl Engine {
    /// One with zeroes everywhere.
    ///
    /// # Errors
    /// When there is no memory for its BARs.
    pub fn new() -> Result<Self> {
        let mut config =
            ConfigSpace::new(&Identity { id: ID, subsystem: (0x1af4, 0x0b0f), class: [0xff, 0, 0], pin: 1 });
        let area = |name, size| Area::new(name, usize::try_from(size).map_err(Error::other)?);
        let (sparse, large) = (area("engine-bar1", SPARSE_SIZE)?, area("engine-bar2", LARGE_SIZE)?);
        for bar in Self::bars(&sparse, &large) {
            config.bar(&bar);
        }
        config.msix(MSIX_VECTORS, 5, 0, 0x1000);
        config.msi(3);
        config.express();
        Ok(Self {
            config: config.finish(),
            registers: Registers::default(),
            counters: Counters::default(),
            sparse,
            large,
            memory: GuestMemory::new(),
            interrupts: Interrupts::new(1, 8, usize::from(MSIX_VECTORS)),
            waiting: None,
        })
    }

    fn bars<'a>(sparse: &'a Area, large: &'a Area) -> [Bar<'a>; 5] {
        let trapped = |index, size, decode| Bar { index, size, decode, mapped: None };
        [
            trapped(0, REGISTERS_SIZE, Decode::Memory32),
            Bar { index: 1, size: SPARSE_SIZE, decode: Decode::Memory32, mapped: Some((sparse, &SPARSE)) },
            Bar { index: 2, size: LARGE_SIZE, decode: Decode::Memory64, mapped: Some((large, &LARGE)) },
            trapped(4, PORTS_SIZE, Decode::Io),
            trapped(5, TABLE_SIZE, Decode::Memory32),
        ]
    }

    fn register(&self, offset: u64) -> u32 {
        let low = |wide: u64| u32::try_from(wide & 0xffff_ffff).unwrap_or(0);
        let count = |number: u64| u32::try_from(number).unwrap_or(u32::MAX);
        let registers = &self.registers;
        match offset {
            0x00 => MAGIC,
            0x04 => 1,
            0x08 => registers.scratch,
            0x0c => registers.status,
            0x10 => registers.command,
            0x14 => registers.vector,
            0x18 => low(registers.source),
            0x1c => low(registers.source >> 32),
            0x20 => low(registers.destination),
            0x24 => low(registers.destination >> 32),
            0x28 => low(registers.length),
            0x2c => low(registers.length >> 32),
            0x30 => registers.pattern,
            0x34 => registers.checksum,
            0x3c => registers.pin,
            0x40 => self.counters.writes,
            0x44 => self.counters.reads,
            0x48 => self.counters.resets,
            0x4c => registers.mode,
            0x54 => registers.sink_count,
            0x58 => registers.sink_sum,
            0x5c => u32::try_from(self.memory.len()).unwrap_or(u32::MAX),
            0x64 => count(self.interrupts.raised),
            0x68 => count(self.interrupts.dropped),
            0x6c => registers.doorbells.iter().fold(0, |sum, one| sum.wrapping_add(*one)),
            0x80..0xc0 => {
                let number = usize::try_from((offset - 0x80) / 4).unwrap_or(usize::MAX);
                registers.doorbells.get(number).copied().unwrap_or(0)
            }
            _ => 0,
        }
    }

    fn set(&mut self, offset: u64, value: u32) -> Result<()> {
        const LOW: u64 = 0xffff_ffff;
        let wide = u64::from(value);
        let registers = &mut self.registers;
        match offset {
            0x08 => registers.scratch = value,
            0x10 => {
                registers.command = value;
                registers.status = BUSY;
                if value & LATER == 0 {
                    self.execute(value);
                } else {
                    self.waiting = Some(value);
                }
            }
            0x14 => registers.vector = value,
            0x18 => registers.source = registers.source & !LOW | wide,
            0x1c => registers.source = registers.source & LOW | wide << 32,
            0x20 => registers.destination = registers.destination & !LOW | wide,
            0x24 => registers.destination = registers.destination & LOW | wide << 32,
            0x28 => registers.length = registers.length & !LOW | wide,
            0x2c => registers.length = registers.length & LOW | wide << 32,
            0x30 => registers.pattern = value,
            0x38 => self.raise(value),
            0x3c => {
                registers.pin = 0;
                self.config.release_pin();
            }
            0x4c => {
                registers.mode = value;
                let always = if value == 0 { OnlyMessages::WhereUnmapped } else { OnlyMessages::Always };
                self.memory.set_only_messages(always);
            }
            0x50 => {
                registers.sink_count = registers.sink_count.wrapping_add(1);
                registers.sink_sum = registers.sink_sum.wrapping_add(value);
            }
            // Vector in the high byte, how often in the rest.
            0x60 => {
                for _ in 0..value & 0x00ff_ffff {
                    self.raise(value >> 24);
                }
            }
            0xf0 => return Err(Error::other("a register that fails")),
            0xf4 => std::process::exit(9),
            0xf8 => std::thread::sleep(Duration::from_millis(wide.min(20_000))),
            SHARED_DOORBELL => self.doorbell(DOORBELLS + wide % DOORBELLS, 1),
            _ if (DOORBELL_PAGE..DOORBELL_PAGE + 4 * DOORBELLS).contains(&offset) => {
                self.doorbell((offset - DOORBELL_PAGE) / 4, 1);
            }
            _ => {}
        }
        Ok(())
    }

    /// By MSI-X when the guest has armed it, else by MSI, else by the pin.
    fn raise(&mut self, vector: u32) {
        for kind in [Kind::Msix, Kind::Msi] {
            if self.interrupts.is_armed(kind) {
                self.interrupts.raise(kind, vector);
                return;
            }
        }
        self.registers.pin = 1;
        self.config.assert_pin();
        if !self.config.pin_disabled() {
            self.interrupts.raise(Kind::Intx, 0);
        }
    }

    fn execute(&mut self, command: u32) {
        let done = self.transfer(command & 0xff);
        if let Err(error) = &done {
            log::info!("command {command:#x}: {error}");
        }
        self.registers.status = if done.is_ok() { DONE } else { FAILED };
        if command & INTERRUPT != 0 {
            self.raise(self.registers.vector);
        }
    }

    /// Copies in pieces: 1 memory to memory, 2 a pattern to memory, 3 the sum of memory, 4 BAR 2 to memory, 5
    /// memory to BAR 2.
    fn transfer(&mut self, command: u32) -> Result<()> {
        let Registers { source, destination, length, pattern, .. } = self.registers;
        if length > MAX_LENGTH || !(1..=5).contains(&command) {
            return Err(Error::other("no such command, or too long"));
        }
        let pattern = pattern.to_le_bytes();
        let mut sum = 0_u32;
        let mut at = 0;
        while at < length {
            let here = usize::try_from(length - at).unwrap_or(PIECE).min(PIECE);
            let place =
                |start: u64| start.checked_add(at).ok_or_else(|| Error::other("an address that wraps"));
            let mut data = vec![0; here];
            match command {
                2 => data.iter_mut().zip(pattern.iter().cycle()).for_each(|(to, from)| *to = *from),
                4 => {
                    let offset = usize::try_from(place(source)?).map_err(Error::other)?;
                    self.large.read(offset, &mut data)?;
                }
                _ => self.memory.read(place(source)?, &mut data)?,
            }
            for word in data.chunks(4) {
                let mut bytes = [0; 4];
                bytes.iter_mut().zip(word).for_each(|(to, from)| *to = *from);
                sum = sum.wrapping_add(u32::from_le_bytes(bytes));
            }
            match command {
                3 => {}
                5 => {
                    let offset = usize::try_from(place(destination)?).map_err(Error::other)?;
                    self.large.write(offset, &data)?;
                }
                _ => self.memory.write(place(destination)?, &data)?,
            }
            at += u64::try_from(here).unwrap_or(u64::MAX);
        }
        self.registers.checksum = sum;
        Ok(())
    }

    fn configure(&mut self, offset: u64, data: &[u8]) {
        let disabled = self.config.pin_disabled();
        if self.config.write(offset, data) == Effect::Reset {
            self.function_reset();
        }
        if disabled && !self.config.pin_disabled() && self.registers.pin != 0 {
            self.interrupts.raise(Kind::Intx, 0);
        }
    }

    fn function_reset(&mut self) {
        self.registers = Registers { status: IDLE, ..Registers::default() };
        self.memory.set_only_messages(OnlyMessages::WhereUnmapped);
        self.waiting = None;
        self.counters.resets = self.counters.resets.wrapping_add(1);
        self.config.release_pin();
        self.sparse.clear();
        self.large.clear();
    }
}

/// The words that an access of any width touches, each with its own bytes of the data.
fn words(offset: u64, length: usize) -> impl Iterator<Item = (u64, usize)> {
    (0..length).step_by(4).map(move |skip| (offset + u64::try_from(skip).unwrap_or(0), skip))
}

impl Device for Engine {
    fn regions(&self) -> Vec<ServerRegion> {
        config_space::regions(&Self::bars(&self.sparse, &self.large))
    }

    fn irqs(&self) -> Vec<IrqInfo> {
        self.interrupts.describe()
    }

    fn read(&mut self, region: u32, offset: u64, data: &mut [u8]) -> Result<()> {
        let start = usize::try_from(offset).map_err(Error::other)?;
        match region {
            VFIO_PCI_CONFIG_REGION_INDEX => self.config.read(offset, data),
            VFIO_PCI_BAR0_REGION_INDEX => {
                self.counters.reads = self.counters.reads.wrapping_add(1);
                if offset & !3 == 0xf0 {
                    return Err(Error::other("a register that fails"));
                }
                let from = offset & !3;
                let length = data.len() + usize::try_from(offset - from).unwrap_or(0);
                let bytes: Vec<u8> =
                    words(from, length).flat_map(|(at, _)| self.register(at).to_le_bytes()).collect();
                let skip = usize::try_from(offset - from).unwrap_or(0);
                data.iter_mut().zip(bytes.iter().skip(skip)).for_each(|(to, byte)| *to = *byte);
            }
            VFIO_PCI_BAR1_REGION_INDEX => self.sparse.read(start, data)?,
            VFIO_PCI_BAR2_REGION_INDEX => self.large.read(start, data)?,
            VFIO_PCI_BAR4_REGION_INDEX => {
                let word = match offset & !3 {
                    0 => self.registers.port,
                    4 => self.registers.port_writes,
                    _ => 0,
                };
                let skip = usize::try_from(offset & 3).unwrap_or(0);
                data.fill(0);
                data.iter_mut().zip(word.to_le_bytes().iter().skip(skip)).for_each(|(to, byte)| *to = *byte);
            }
            _ => data.fill(0),
        }
        Ok(())
    }

    fn write(&mut self, region: u32, offset: u64, data: &[u8]) -> Result<()> {
        let start = usize::try_from(offset).map_err(Error::other)?;
        let word = |skip: usize| {
            let mut bytes = [0; 4];
            bytes.iter_mut().zip(data.iter().skip(skip)).for_each(|(to, from)| *to = *from);
            u32::from_le_bytes(bytes)
        };
        match region {
            VFIO_PCI_CONFIG_REGION_INDEX => self.configure(offset, data),
            VFIO_PCI_BAR0_REGION_INDEX => {
                self.counters.writes = self.counters.writes.wrapping_add(1);
                for (at, skip) in words(offset, data.len()) {
                    self.set(at, word(skip))?;
                }
            }
            VFIO_PCI_BAR1_REGION_INDEX => self.sparse.write(start, data)?,
            VFIO_PCI_BAR2_REGION_INDEX => self.large.write(start, data)?,
            VFIO_PCI_BAR4_REGION_INDEX => {
                self.registers.port_writes = self.registers.port_writes.wrapping_add(1);
                match offset {
                    0 => self.registers.port = word(0),
                    8 => self.raise(word(0)),
                    _ => {}
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.function_reset();
        self.config.reset();
    }

    fn memory(&mut self) -> &mut GuestMemory {
        &mut self.memory
    }

    fn interrupts(&mut self) -> &mut Interrupts {
        &mut self.interrupts
    }

    fn poll(&mut self) -> Progress {
        if let Some(command) = self.waiting.take() {
            self.execute(command);
        }
        Progress::Asleep
    }

    fn io_events(&self) -> Vec<IoEvent> {
        let own = (0..DOORBELLS).map(|number| IoEvent {
            region: VFIO_PCI_BAR0_REGION_INDEX,
            offset: DOORBELL_PAGE + 4 * number,
            size: 4,
            value: None,
        });
        let shared = (0..DOORBELLS).map(|number| IoEvent {
            region: VFIO_PCI_BAR0_REGION_INDEX,
            offset: SHARED_DOORBELL,
            size: 4,
            value: Some(number),
        });
        own.chain(shared).collect()
    }

    fn doorbell(&mut self, number: u64, times: u64) {
        let number = usize::try_from(number).unwrap_or(usize::MAX);
        if let Some(count) = self.registers.doorbells.get_mut(number) {
            *count = count.wrapping_add(u32::try_from(times).unwrap_or(u32::MAX));
        }
    }
}

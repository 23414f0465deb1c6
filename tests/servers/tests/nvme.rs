//! The NVMe controller, driven by the crate's own client: registers, queues, data, interrupts.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
#![allow(clippy::cast_possible_truncation)]

mod support;

use std::os::fd::AsRawFd;

use outboard_servers::nvme::{VECTORS, command::COMPLETION, command::SUBMISSION};
use support::{Folder, Line, Memory, Running, map_region, pattern, until};
use vfio_bindings::bindings::vfio::{
    VFIO_IRQ_SET_ACTION_TRIGGER, VFIO_IRQ_SET_DATA_EVENTFD, VFIO_PCI_CONFIG_REGION_INDEX,
    VFIO_PCI_MSIX_IRQ_INDEX,
};
use vfio_user::Client;
use vm_memory::{Bytes, MmapRegion, VolatileMemory};

const BASE: u64 = 0x1_0000_0000;
const ADMIN: (u64, u64) = (BASE, BASE + 0x1000);
const IO: (u64, u64) = (BASE + 0x2000, BASE + 0x3000);
const BUFFER: u64 = BASE + 0x1_0000;
const DISK: usize = 4 << 20;
const ENTRIES: u16 = 32;

#[derive(Default)]
struct Queue {
    tail: u16,
    head: u16,
    phase: u16,
}

struct Driver {
    client: Client,
    memory: Memory,
    doorbells: Option<MmapRegion>,
    queues: [Queue; 2],
    lines: Vec<Line>,
    running: Running,
}

#[derive(Debug)]
struct Answer {
    result: u32,
    status: u16,
}

impl Driver {
    fn start(doorbells: &str, wire: &str) -> Self {
        let folder = Folder::new();
        let disk = support::disk(&folder, DISK);
        let arguments = ["--disk", support::text(&disk), "--doorbells", doorbells, "--wire", wire];
        let running = Running::start(env!("CARGO_BIN_EXE_vfio-user-nvme"), folder, &arguments);
        let mut client = running.client();
        let memory = Memory::new(BASE, 16 << 20);
        memory.give_to(&mut client);
        let lines: Vec<Line> = (0..4).map(|_| Line::new()).collect();
        let action = VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER;
        for (number, line) in (0..).zip(&lines) {
            let fds = [line.0.as_raw_fd()];
            client.set_irqs(VFIO_PCI_MSIX_IRQ_INDEX, action, number, 1, &fds).unwrap();
        }
        let mapped = (doorbells == "mapped").then(|| map_region(&client, 0));
        let mut driver =
            Self { client, memory, doorbells: mapped, queues: Default::default(), lines, running };
        driver.enable();
        driver
    }

    fn register(&mut self, offset: u64) -> u32 {
        let mut bytes = [0; 4];
        self.client.region_read(0, offset, &mut bytes).unwrap();
        u32::from_le_bytes(bytes)
    }

    fn set(&mut self, offset: u64, value: u32) {
        self.client.region_write(0, offset, &value.to_le_bytes()).unwrap();
    }

    fn enable(&mut self) {
        for at in [ADMIN.0, ADMIN.1, IO.0, IO.1] {
            self.memory.write(at, &[0; 0x1000]);
        }
        self.queues = [0, 1].map(|_| Queue { phase: 1, ..Queue::default() });
        self.set(0x24, u32::from(ENTRIES - 1) << 16 | u32::from(ENTRIES - 1));
        for (offset, value) in [(0x28, ADMIN.0), (0x30, ADMIN.1)] {
            self.set(offset, value as u32);
            self.set(offset + 4, (value >> 32) as u32);
        }
        self.set(0x14, 0x0046_0001);
        assert_eq!(self.register(0x1c), 1, "ready");
    }

    fn ring(&mut self, queue: usize, completion: usize, value: u16) {
        let offset = 0x1000 + (queue * 2 + completion) * 4;
        match &self.doorbells {
            Some(page) => {
                page.as_volatile_slice()
                    .store(u32::from(value), offset, std::sync::atomic::Ordering::Release)
                    .unwrap();
            }
            None => self.set(offset as u64, u32::from(value)),
        }
    }

    fn submit(&mut self, queue: usize, opcode: u8, namespace: u32, prp: [u64; 2], words: [u32; 3]) -> Answer {
        let (submission, completion) = [ADMIN, IO][queue];
        let state = &mut self.queues[queue];
        let id = 0x100 + state.tail;
        let mut entry = [0; SUBMISSION];
        entry[..4].copy_from_slice(&(u32::from(opcode) | u32::from(id) << 16).to_le_bytes());
        entry[4..8].copy_from_slice(&namespace.to_le_bytes());
        entry[24..32].copy_from_slice(&prp[0].to_le_bytes());
        entry[32..40].copy_from_slice(&prp[1].to_le_bytes());
        for (number, word) in words.iter().enumerate() {
            entry[40 + 4 * number..44 + 4 * number].copy_from_slice(&word.to_le_bytes());
        }
        self.memory.write(submission + u64::from(state.tail) * SUBMISSION as u64, &entry);
        state.tail = (state.tail + 1) % ENTRIES;
        let (tail, head, phase) = (state.tail, state.head, state.phase);
        self.ring(queue, 0, tail);
        let at = completion + u64::from(head) * COMPLETION as u64;
        let word = |at| u32::from_le_bytes(self.memory.read(at, 4).try_into().unwrap());
        let last =
            until("a completion", || Some(word(at + 12)).filter(|last| last >> 16 & 1 == u32::from(phase)));
        assert_eq!(last as u16, id, "the command's identifier");
        let answer = Answer { result: word(at), status: (last >> 17) as u16 };
        let state = &mut self.queues[queue];
        state.head = (state.head + 1) % ENTRIES;
        if state.head == 0 {
            state.phase ^= 1;
        }
        let head = state.head;
        self.ring(queue, 1, head);
        answer
    }

    fn io_queues(&mut self) {
        let identity = 1 | u32::from(ENTRIES - 1) << 16;
        // Interrupts on, by vector 2; contiguous.
        assert_eq!(self.submit(0, 0x05, 0, [IO.1, 0], [identity, 2 << 16 | 3, 0]).status, 0);
        assert_eq!(self.submit(0, 0x01, 0, [IO.0, 0], [identity, 1 << 16 | 1, 0]).status, 0);
    }

    /// Pages of the buffer as a PRP pair, the list in the page before it.
    fn prp(&self, offset: u64, length: u64) -> [u64; 2] {
        let first = BUFFER + offset;
        let pages: Vec<u64> =
            (1..).map(|page| BUFFER + page * 4096).take_while(|page| *page < first + length).collect();
        match pages.as_slice() {
            [] => [first, 0],
            [second] => [first, *second],
            more => {
                let list = BUFFER - 4096;
                for (number, page) in (0..).zip(more) {
                    self.memory.write(list + number * 8, &page.to_le_bytes());
                }
                [first, list]
            }
        }
    }

    fn transfer(&mut self, opcode: u8, block: u64, length: usize, offset: u64) -> u16 {
        let prp = self.prp(offset, length as u64);
        let words = [block as u32, (block >> 32) as u32, (length / 512 - 1) as u32];
        self.submit(1, opcode, 1, prp, words).status
    }
}

const WRITE: u8 = 1;
const READ: u8 = 2;

fn identifies_itself_and_moves_data(doorbells: &str, wire: &str) {
    let mut driver = Driver::start(doorbells, wire);
    assert_eq!(driver.submit(0, 0x06, 0, [BUFFER, 0], [1, 0, 0]).status, 0);
    assert_eq!(driver.memory.read(BUFFER + 24, 18), b"outboard test NVMe");
    assert_eq!(driver.submit(0, 0x06, 1, [BUFFER, 0], [0, 0, 0]).status, 0);
    assert_eq!(driver.memory.read(BUFFER, 8), (DISK as u64 / 512).to_le_bytes());
    let queues = driver.submit(0, 0x09, 0, [0, 0], [7, 0x0001_0001, 0]);
    assert_eq!(queues.result, u32::from(VECTORS - 2) << 16 | u32::from(VECTORS - 2));
    driver.io_queues();
    assert!(driver.lines[0].count() >= 1, "admin interrupts");
    // One page, two pages, a list; at the start of a page and within one.
    for (number, (length, offset)) in
        [(512, 0), (4096, 512), (8192, 0), (1 << 20, 0), (300 * 512, 1024)].into_iter().enumerate()
    {
        let (data, block) = (pattern(length, number as u8), number as u64 * 2100);
        let (length, block) = (length.min(1 << 20), block % 6000);
        driver.memory.write(BUFFER + offset, &data);
        assert_eq!(driver.transfer(WRITE, block, length, offset), 0);
        driver.memory.write(BUFFER + offset, &vec![0xee; length]);
        assert_eq!(driver.transfer(READ, block, length, offset), 0);
        assert!(driver.memory.read(BUFFER + offset, length) == data, "{length} bytes at {offset}");
        assert_eq!(driver.submit(1, 0, 1, [0, 0], [0, 0, 0]).status, 0, "flush");
        let file = std::fs::read(driver.running.folder.path("disk")).unwrap();
        let start = block as usize * 512;
        assert!(file[start..start + length] == data, "the file");
    }
    assert!(driver.lines[2].count() >= 10, "I/O interrupts");
    assert_eq!(driver.lines[1].count(), 0);
}

#[test]
fn mapped_doorbells_move_data() {
    identifies_itself_and_moves_data("mapped", "plain");
}

#[test]
fn trapped_doorbells_move_data() {
    identifies_itself_and_moves_data("trapped", "plain");
}

#[test]
fn behind_the_front_data_moves_as_well() {
    identifies_itself_and_moves_data("mapped", "extended");
}

#[test]
fn what_makes_no_sense_is_answered_with_its_status() {
    let mut driver = Driver::start("mapped", "plain");
    driver.io_queues();
    let end = DISK as u64 / 512;
    assert_eq!(driver.transfer(READ, end, 512, 0), 0x80, "past the end");
    assert_eq!(driver.transfer(READ, u64::MAX, 1024, 0), 0x80, "wrapping");
    assert_eq!(driver.transfer(READ, 0, (1 << 20) + 512, 0), 0x02, "more than MDTS");
    assert_eq!(driver.submit(1, 0x7f, 1, [0, 0], [0, 0, 0]).status, 0x01);
    assert_eq!(driver.submit(1, READ, 2, [BUFFER, 0], [0, 0, 0]).status, 0x0b);
    assert_eq!(driver.submit(1, READ, 1, [0x1000, 0], [0, 0, 0]).status, 0x04, "not mapped");
    assert_eq!(driver.submit(1, READ, 1, [BUFFER, BUFFER + 8], [0, 0, 15]).status, 0x13);
    assert_eq!(driver.submit(0, 0x05, 0, [IO.1, 0], [1 | 31 << 16, 3, 0]).status, 0x101, "taken");
    assert_eq!(driver.submit(0, 0x05, 0, [IO.1, 0], [2 | 31 << 16, 99 << 16 | 3, 0]).status, 0x108);
    assert_eq!(driver.submit(0, 0x04, 0, [0, 0], [1, 0, 0]).status, 0x10c, "in use");
    assert_eq!(driver.submit(0, 0x00, 0, [0, 0], [1, 0, 0]).status, 0);
    assert_eq!(driver.submit(0, 0x04, 0, [0, 0], [1, 0, 0]).status, 0);
}

#[test]
fn queues_at_the_end_of_all_addresses_are_fatal_until_a_reset() {
    let mut driver = Driver::start("mapped", "plain");
    for (queue, base) in [(0x28, !0xfff_u64), (0x30, 0)] {
        driver.set(0x14, 0x0046_0000);
        driver.set(0x24, 0x0fff_0fff);
        driver.client.region_write(0, queue, &base.to_le_bytes()).unwrap();
        driver.set(0x14, 0x0046_0001);
        for tail in [1, 100, 200] {
            driver.ring(0, 0, tail);
        }
        until("the fatal status", || (driver.register(0x1c) & 2 != 0).then_some(()));
        driver.set(0x14, 0x0046_0000);
        driver.enable();
        assert_eq!(driver.submit(0, 0x06, 0, [BUFFER, 0], [1, 0, 0]).status, 0);
    }
}

#[test]
fn a_doorbell_beyond_its_queue_is_fatal_until_a_reset() {
    let mut driver = Driver::start("mapped", "plain");
    driver.ring(0, 0, 4000);
    until("the fatal status", || (driver.register(0x1c) & 2 != 0).then_some(()));
    driver.set(0x14, 0x0046_0000);
    assert_eq!(driver.register(0x1c), 0);
    driver.enable();
    assert_eq!(driver.submit(0, 0x06, 0, [BUFFER, 0], [1, 0, 0]).status, 0);
}

#[test]
fn a_function_level_reset_and_a_device_reset_disable_the_controller() {
    let mut driver = Driver::start("mapped", "plain");
    let mut bytes = [0; 4];
    // The PCI Express capability comes after MSI-X.
    driver.client.region_read(VFIO_PCI_CONFIG_REGION_INDEX, 0x4c, &mut bytes).unwrap();
    assert_eq!(bytes[0], 0x10);
    driver.client.region_write(VFIO_PCI_CONFIG_REGION_INDEX, 0x4c + 8, &0x8000_u16.to_le_bytes()).unwrap();
    assert_eq!((driver.register(0x14), driver.register(0x1c)), (0, 0));
    driver.enable();
    driver.client.reset().unwrap();
    assert_eq!((driver.register(0x14), driver.register(0x1c)), (0, 0));
    driver.enable();
    assert_eq!(driver.submit(0, 0x06, 0, [BUFFER, 0], [1, 0, 0]).status, 0);
}

#[test]
fn clients_come_and_go_and_leave_nothing() {
    for wire in ["plain", "extended"] {
        let mut driver = Driver::start("mapped", wire);
        let before = driver.running.descriptors();
        for _ in 0..5 {
            driver.client.shutdown().unwrap();
            let mut client = driver.running.client();
            driver.memory.give_to(&mut client);
            let action = VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER;
            for (number, line) in (0..).zip(&driver.lines) {
                let fds = [line.0.as_raw_fd()];
                client.set_irqs(VFIO_PCI_MSIX_IRQ_INDEX, action, number, 1, &fds).unwrap();
            }
            driver.doorbells = Some(map_region(&client, 0));
            driver.client = client;
            driver.enable();
            assert_eq!(driver.submit(0, 0x06, 0, [BUFFER, 0], [1, 0, 0]).status, 0);
        }
        until("the descriptors of the clients before are closed", || {
            (driver.running.descriptors() <= before).then_some(())
        });
    }
}

//! The DMA engine, by the crate's own client, and by messages for what neither crate side speaks.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
#![allow(clippy::cast_possible_truncation)]

mod support;

use std::io::Write;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;

use outboard_servers::engine::{ID, MAGIC};
use outboard_servers::front::wire::{Header, Message, NO_REPLY, REPLY, command};
use serde_json::{Value, json};
use support::{Folder, Line, Memory, Running, map_region, pattern, until};
use vfio_bindings::bindings::vfio::{
    VFIO_IRQ_SET_ACTION_TRIGGER, VFIO_IRQ_SET_DATA_EVENTFD, VFIO_IRQ_SET_DATA_NONE,
    VFIO_PCI_CONFIG_REGION_INDEX, VFIO_PCI_INTX_IRQ_INDEX, VFIO_PCI_MSI_IRQ_INDEX, VFIO_PCI_MSIX_IRQ_INDEX,
};
use vfio_user::Client;
use vm_memory::{Bytes, VolatileMemory};

const BASE: u64 = 0x10_0000;
const SIZE: u64 = 4 << 20;

fn engine(arguments: &[&str]) -> Running {
    Running::start(env!("CARGO_BIN_EXE_vfio-user-engine"), Folder::new(), arguments)
}

fn register(client: &mut Client, offset: u64) -> u32 {
    let mut bytes = [0; 4];
    client.region_read(0, offset, &mut bytes).unwrap();
    u32::from_le_bytes(bytes)
}

fn set(client: &mut Client, offset: u64, value: u32) {
    client.region_write(0, offset, &value.to_le_bytes()).unwrap();
}

fn transfer(client: &mut Client, operation: u32, source: u64, destination: u64, length: u64) -> u32 {
    for (offset, value) in [(0x18, source), (0x20, destination), (0x28, length)] {
        client.region_write(0, offset, &value.to_le_bytes()).unwrap();
    }
    set(client, 0x10, operation);
    until("the end of the command", || Some(register(client, 0xc)).filter(|status| *status != 1))
}

fn sum(data: &[u8]) -> u32 {
    data.chunks(4).fold(0, |sum, word| sum.wrapping_add(u32::from_le_bytes(word.try_into().unwrap())))
}

#[test]
fn dma_copies_fills_sums_and_reaches_its_own_memory() {
    let running = engine(&[]);
    let mut client = running.client();
    let mut id = [0; 4];
    client.region_read(VFIO_PCI_CONFIG_REGION_INDEX, 0, &mut id).unwrap();
    assert_eq!(id, (u32::from(ID.0) | u32::from(ID.1) << 16).to_le_bytes());
    assert_eq!(register(&mut client, 0), MAGIC);
    let memory = Memory::new(BASE, SIZE);
    memory.give_to(&mut client);
    assert_eq!(register(&mut client, 0x5c), 1, "mappings");
    let data = pattern(300_000, 3);
    memory.write(BASE + 100, &data);
    assert_eq!(transfer(&mut client, 1, BASE + 100, BASE + (1 << 20), data.len() as u64), 2);
    assert!(memory.read(BASE + (1 << 20), data.len()) == data);
    assert_eq!(register(&mut client, 0x34), sum(&data));
    set(&mut client, 0x30, 0xdead_beef);
    assert_eq!(transfer(&mut client, 2, 0, BASE + (3 << 20), 4096), 2);
    assert!(memory.read(BASE + (3 << 20), 4096).chunks(4).all(|word| word == 0xdead_beef_u32.to_le_bytes()));
    // Into BAR 2, which is mapped here, and back, by the worker and with an interrupt.
    assert_eq!(transfer(&mut client, 5, BASE + 100, 0x1000, 8192), 2);
    let large = map_region(&client, 2);
    let mut seen = vec![0; 8192];
    large.as_volatile_slice().read_slice(&mut seen, 0x1000).unwrap();
    assert!(seen == data[..8192]);
    assert_eq!(transfer(&mut client, 4 | 1 << 8, 0x1000, BASE + (2 << 20), 8192), 2);
    assert!(memory.read(BASE + (2 << 20), 8192) == data[..8192]);
    for (source, length) in [(BASE + SIZE - 8, 16), (0, 4), (u64::MAX - 4, 8), (BASE, 1 << 40)] {
        assert_eq!(transfer(&mut client, 3, source, 0, length), 3, "{source:#x}+{length:#x}");
    }
    client.dma_unmap(BASE, SIZE).unwrap();
    assert_eq!(transfer(&mut client, 3, BASE, 0, 4), 3, "unmapped");
}

#[test]
fn mapped_pieces_are_shared_and_the_rest_is_trapped() {
    let running = engine(&[]);
    let mut client = running.client();
    let areas: Vec<_> =
        client.region(1).unwrap().sparse_areas.iter().map(|area| (area.offset, area.size)).collect();
    assert_eq!(areas, [(0x1000, 0x2000), (0x8000, 0x8000)]);
    let mapped = map_region(&client, 1);
    for offset in [0x1000_usize, 0x2ffc, 0x8000, 0xfffc] {
        mapped.as_volatile_slice().write_slice(&(offset as u32).to_le_bytes(), offset).unwrap();
        let mut bytes = [0; 4];
        client.region_read(1, offset as u64, &mut bytes).unwrap();
        assert_eq!(bytes, (offset as u32).to_le_bytes());
    }
    client.region_write(1, 0, &[1, 2, 3, 4]).unwrap();
    client.region_write(4, 0, &[5, 6, 7, 8]).unwrap();
    let ports = |client: &mut Client| {
        let mut ports = [[0; 4]; 2];
        for (port, place) in (0..).zip(&mut ports) {
            client.region_read(4, port * 4, place).unwrap();
        }
        ports
    };
    assert_eq!(ports(&mut client), [[5, 6, 7, 8], [1, 0, 0, 0]], "what was written, and how often");
    client.reset().unwrap();
    assert_eq!(register(&mut client, 0x48), 1, "resets");
    assert_eq!(ports(&mut client), [[0; 4]; 2]);
}

#[test]
fn interrupts_go_by_what_is_armed() {
    let running = engine(&[]);
    let mut client = running.client();
    let lines: Vec<Line> = (0..3).map(|_| Line::new()).collect();
    let action = VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER;
    let arm = |client: &mut Client, index, vector, line: usize| {
        client.set_irqs(index, action, vector, 1, &[lines[line].0.as_raw_fd()]).unwrap();
    };
    let off = |client: &mut Client, index| {
        let action = VFIO_IRQ_SET_DATA_NONE | VFIO_IRQ_SET_ACTION_TRIGGER;
        client.set_irqs(index, action, 0, 0, &[]).unwrap();
    };
    arm(&mut client, VFIO_PCI_INTX_IRQ_INDEX, 0, 0);
    set(&mut client, 0x38, 0);
    assert_eq!((lines[0].count(), register(&mut client, 0x3c)), (1, 1), "the pin");
    let mut status = [0; 2];
    client.region_read(VFIO_PCI_CONFIG_REGION_INDEX, 6, &mut status).unwrap();
    assert_eq!(status[0] & 8, 8, "Interrupt Status");
    set(&mut client, 0x3c, 1);
    client.region_read(VFIO_PCI_CONFIG_REGION_INDEX, 6, &mut status).unwrap();
    assert_eq!(status[0] & 8, 0);
    off(&mut client, VFIO_PCI_INTX_IRQ_INDEX);
    arm(&mut client, VFIO_PCI_MSI_IRQ_INDEX, 7, 1);
    set(&mut client, 0x38, 7);
    assert_eq!(lines[1].count(), 1, "MSI");
    off(&mut client, VFIO_PCI_MSI_IRQ_INDEX);
    arm(&mut client, VFIO_PCI_MSIX_IRQ_INDEX, 31, 2);
    set(&mut client, 0x60, 31 << 24 | 1000);
    assert_eq!(lines[2].count(), 1000, "MSI-X");
    off(&mut client, VFIO_PCI_MSIX_IRQ_INDEX);
    set(&mut client, 0x38, 31);
    assert_eq!(lines[2].count() + lines[1].count(), 0, "disarmed");
}

/// A client that says what it likes.
struct Raw {
    stream: UnixStream,
    twin: Option<UnixStream>,
    next: u16,
    memory: Vec<u8>,
    served: usize,
}

impl Raw {
    fn connect(running: &Running, capabilities: Value) -> (Self, Value) {
        let socket = running.socket();
        let stream = until("a connection", || UnixStream::connect(&socket).ok());
        let mut raw = Self { stream, twin: None, next: 1, memory: pattern(SIZE as usize, 9), served: 0 };
        let mut body = vec![0, 0, 1, 0];
        body.extend(json!({ "capabilities": capabilities }).to_string().into_bytes());
        body.push(0);
        let mut answer = raw.ask(command::VERSION, body);
        let text = &answer.body[4..answer.body.len() - 1];
        let offered: Value = serde_json::from_slice(text).unwrap();
        raw.twin = answer.fds.pop().map(UnixStream::from);
        (raw, offered["capabilities"].clone())
    }

    fn send(&mut self, command: u16, flags: u32, body: Vec<u8>) -> u16 {
        self.next += 1;
        Message::new(self.next, command, flags, body).send(self.stream.as_fd()).unwrap();
        self.next
    }

    /// Sends, and serves the server's own requests until the answer is there.
    fn ask(&mut self, command: u16, body: Vec<u8>) -> Message {
        let id = self.send(command, 0, body);
        loop {
            if let Some(twin) = self.twin.as_ref().map(|twin| twin.try_clone().unwrap()) {
                use rustix::event::{PollFd, PollFlags, poll};
                let mut fds = [PollFd::new(&twin, PollFlags::IN), PollFd::new(&self.stream, PollFlags::IN)];
                poll(&mut fds, None).unwrap();
                if !fds[0].revents().is_empty() {
                    let request = Message::receive(twin.as_fd()).unwrap().unwrap();
                    self.serve(&request).send(twin.as_fd()).unwrap();
                    continue;
                }
            }
            let message = Message::receive(self.stream.as_fd()).unwrap().expect("the server goes on");
            if !message.header.is_reply() {
                assert!(self.twin.is_none(), "requests come on the twin");
                let answer = self.serve(&message);
                answer.send(self.stream.as_fd()).unwrap();
                continue;
            }
            let Header { id: answered, command: to, .. } = message.header;
            assert_eq!((answered, to), (id, command));
            return message;
        }
    }

    fn serve(&mut self, request: &Message) -> Message {
        self.served += 1;
        let word = |at: usize| u64::from_ne_bytes(request.body[at..at + 8].try_into().unwrap());
        let (address, count) = (word(0), word(8) as usize);
        let Some(place) = address.checked_sub(BASE).map(|place| place as usize) else {
            return request.header.error(14);
        };
        let Some(memory) = self.memory.get_mut(place..place + count) else { return request.header.error(14) };
        let mut body = request.body[..16].to_vec();
        if request.header.command == command::DMA_READ {
            body.extend_from_slice(memory);
        } else {
            memory.copy_from_slice(&request.body[16..]);
        }
        Message::new(request.header.id, request.header.command, REPLY, body)
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Message {
        let mut body = offset.to_ne_bytes().to_vec();
        body.extend([0_u32, data.len() as u32].into_iter().flat_map(u32::to_ne_bytes));
        body.extend(data);
        self.ask(command::REGION_WRITE, body)
    }

    fn read(&mut self, offset: u64) -> u32 {
        let mut body = offset.to_ne_bytes().to_vec();
        body.extend([0_u32, 4].into_iter().flat_map(u32::to_ne_bytes));
        let answer = self.ask(9, body);
        u32::from_ne_bytes(answer.body[16..20].try_into().unwrap())
    }

    /// Memory without a descriptor.
    fn map(&mut self) {
        let mut body: Vec<u8> = [32_u32, 3].into_iter().flat_map(u32::to_ne_bytes).collect();
        body.extend([0, BASE, SIZE].into_iter().flat_map(u64::to_ne_bytes));
        assert!(!self.ask(2, body).header.is_error());
    }
}

fn dma_by_messages(arguments: &[&str], proposed: Value) -> Raw {
    let running = engine(&[&["--wire", "extended", "--max-data-xfer-size", "4096"], arguments].concat());
    let (mut raw, offered) = Raw::connect(&running, proposed);
    assert_eq!(offered["max_data_xfer_size"], 4096);
    raw.map();
    let data = raw.memory[..100_000].to_vec();
    // The copy happens within the write of the command register.
    for (offset, value) in [(0x18, BASE), (0x20, BASE + (1 << 20)), (0x28, 100_000)] {
        raw.write(offset, &value.to_le_bytes());
    }
    raw.write(0x10, &1_u32.to_le_bytes());
    assert_eq!(raw.read(0xc), 2, "status");
    assert!(raw.memory[1 << 20..][..100_000] == data);
    assert!(raw.served >= 50, "{} messages", raw.served);
    // Refused by us, so that the command fails and the server lives.
    raw.write(0x18, &(BASE + SIZE).to_le_bytes());
    raw.write(0x10, &1_u32.to_le_bytes());
    assert_eq!(raw.read(0xc), 3);
    raw
}

#[test]
fn dma_goes_by_messages_in_the_middle_of_a_request() {
    dma_by_messages(&[], json!({ "max_msg_fds": 8 }));
}

#[test]
fn dma_messages_take_the_twin_socket() {
    let raw = dma_by_messages(&["--twin-socket"], json!({ "twin_socket": { "supported": true } }));
    assert!(raw.twin.is_some());
}

#[test]
fn many_writes_in_one_message_arrive_in_order_among_others() {
    let running = engine(&["--wire", "extended"]);
    let (mut raw, offered) = Raw::connect(&running, json!({ "write_multiple": true, "max_msg_fds": 64 }));
    assert_eq!((&offered["write_multiple"], &offered["max_msg_fds"]), (&json!(true), &json!(8)));
    let entry = |offset: u64, value: u32| {
        let mut entry = offset.to_ne_bytes().to_vec();
        entry.extend([0_u32, 4].into_iter().flat_map(u32::to_ne_bytes));
        entry.extend(u64::from(value).to_le_bytes());
        entry
    };
    let many = |values: std::ops::Range<u32>| {
        let mut body = u64::from(values.end - values.start).to_ne_bytes().to_vec();
        body.extend(values.flat_map(|value| entry(0x50, value)));
        body
    };
    let answer = raw.ask(command::REGION_WRITE_MULTI, many(0..100));
    assert_eq!(answer.body, 100_u64.to_ne_bytes());
    raw.send(command::REGION_WRITE_MULTI, NO_REPLY, many(100..150));
    assert_eq!((raw.read(0x54), raw.read(0x58)), (150, (0..150).sum()), "count and sum");
    // Wrong in itself: refused as a whole.
    let answer = raw.ask(command::REGION_WRITE_MULTI, many(0..3)[..50].to_vec());
    assert!(answer.header.is_error());
    assert_eq!(raw.read(0x54), 150);
}

#[test]
fn doorbells_are_rung_by_eventfds_in_both_forms() {
    for (form, size) in [("spec", 40), ("libvfio", 48)] {
        let running = engine(&["--wire", "extended", "--io-entries", form]);
        let (mut raw, _) = Raw::connect(&running, json!({ "max_msg_fds": 16 }));
        let ask = |raw: &mut Raw, room: u32| {
            let body = [room, 0, 0, 0].into_iter().flat_map(u32::to_ne_bytes).collect();
            raw.ask(command::GET_REGION_IO_FDS, body)
        };
        let short = ask(&mut raw, 16);
        assert_eq!((short.body.len(), short.fds.len()), (16, 0));
        let room = u32::from_ne_bytes(short.body[..4].try_into().unwrap());
        let whole = ask(&mut raw, room);
        assert_eq!((whole.body.len(), whole.fds.len()), (16 + 16 * size, 16));
        for fd in whole.fds {
            std::fs::File::from(fd).write_all(&2_u64.to_ne_bytes()).unwrap();
        }
        until("the doorbells", || (raw.read(0x6c) == 32).then_some(()));
        raw.write(0x800, &[0; 4]);
        raw.write(0x840, &[7, 0, 0, 0]);
        assert_eq!((raw.read(0x80), raw.read(0x80 + 15 * 4)), (3, 3), "trapped, they count as well");
    }
}

#[test]
fn what_nobody_speaks_is_refused_and_the_next_message_understood() {
    let running = engine(&["--wire", "extended"]);
    let (mut raw, _) = Raw::connect(&running, json!({}));
    for (number, length) in [(16, 8), (17, 8), (0, 0), (99, 1000)] {
        let answer = raw.ask(number, vec![0; length]);
        assert_eq!((answer.header.is_error(), answer.header.errno), (true, 95));
    }
    assert_eq!(raw.read(0), MAGIC);
}

#[test]
fn a_register_that_kills_ends_the_server_within_a_request() {
    let mut running = engine(&[]);
    let mut client = running.client();
    assert!(client.region_write(0, 0xf4, &[0; 4]).is_err());
    until("its end", || (!running.is_running()).then_some(()));
}

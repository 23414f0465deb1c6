//! A vfio-user server without a thread: like [`crate::peer`], it watches the client through the trace hook,
//! and puts its reply into the socket just before the command goes out.
//!
//! It answers as the specification says until the fuzzer's bytes say otherwise. Where a reply that is due
//! will not come whole, it closes its half: nothing is waited for.

use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use transport::peer::fds;
use transport::peer::{Direction, Error, Limits, Trace, TraceEvent};
use transport::vfio_user::Client;
use transport::vfio_user::message::{
    CapabilityHead, Command, FeatureHead, HEADER_SIZE, Header, IoFdEntry, IoFdsHead, LoggingReport,
    RegionInfoPayload, SparseHead,
};
use zerocopy::{FromBytes, IntoBytes};

use crate::descriptors::{any, memory_file};
use crate::input::Input;

/// Only reached where a broken reply looks like the beginning of a long one.
const DEADLINE: Duration = Duration::from_millis(20);

struct State {
    input: Input,
    socket: UnixStream,
    twin: Option<UnixStream>,
    /// The ids of our own commands.
    next: u16,
}

/// The server.
pub struct Server(Arc<Mutex<State>>);

struct Watcher(Arc<Mutex<State>>);

impl Trace for Watcher {
    fn message(&self, event: &TraceEvent<'_>) {
        assert!(!event.to_string().contains('\n'), "a line is a line");
        if event.direction == Direction::Request {
            let header = Header::read_from_bytes(event.header).expect("a whole header");
            self.0.lock().expect("no panic").answer(&header, event.payload);
        }
    }
}

impl Server {
    /// A server whose deviations are in `input`, and what becomes of connecting to it.
    pub fn new(input: Input) -> (Self, Result<Client, Error>) {
        let (ours, theirs) = UnixStream::pair().expect("a socket pair");
        ours.set_nonblocking(true).expect("a flag");
        let state = Arc::new(Mutex::new(State { input, socket: ours, twin: None, next: 0 }));
        let limits = Limits::new(DEADLINE).traced(Arc::new(Watcher(Arc::clone(&state))));
        let client = Client::from_stream(theirs, "fuzz", &limits);
        (Self(state), client)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().expect("no panic")
    }

    /// Draws from the input. The client must not be used meanwhile.
    pub fn draw<T>(&self, draw: impl FnOnce(&mut Input) -> T) -> T {
        draw(&mut self.state().input)
    }

    /// Sends a command of its own, or something like one.
    pub fn ask(&self) {
        self.state().ask();
    }

    /// Takes what the client sent, so that the sockets do not fill up.
    pub fn drain(&self) {
        self.state().drain();
    }

    /// Closes one direction of the connection, or both.
    pub fn hang_up(&self, how: Shutdown) {
        let _ = self.state().socket.shutdown(how);
    }
}

/// Sends without blocking; a client that has closed is no fault.
fn send(socket: &UnixStream, bytes: &[u8], fds: &[OwnedFd]) {
    let fds: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
    let _ = fds::send(socket.as_fd(), bytes, &fds);
}

fn length(bytes: &[u8]) -> u32 {
    u32::try_from(bytes.len()).expect("small")
}

impl State {
    fn drain(&mut self) {
        let mut bytes = [0; 65536];
        for socket in std::iter::once(&self.socket).chain(&self.twin) {
            while fds::receive(socket.as_fd(), &mut bytes, fds::Room::Many, &mut Vec::new())
                .is_ok_and(|got| got.bytes > 0)
            {}
        }
    }

    fn ask(&mut self) {
        let command =
            self.input.pick(&[Command::DMA_READ, Command::DMA_WRITE, Command(0), Command::REGION_READ]);
        let address = if self.input.rarely(3) { self.input.number() } else { u64::from(self.input.u16()) };
        let data = self.input.bytes(40);
        let count = if self.input.rarely(4) { self.input.number() } else { data.len() as u64 };
        let mut payload = [address.to_ne_bytes(), count.to_ne_bytes()].concat();
        if command == Command::DMA_WRITE || self.input.rarely(8) {
            payload.extend(data);
        }
        self.next = self.next.wrapping_add(1);
        let mut header = Header::command(self.next, command, length(&payload));
        if self.input.rarely(8) {
            header.flags = self.input.u32() & 0x3f;
        }
        let fds = if self.input.rarely(16) { vec![any(&mut self.input)] } else { Vec::new() };
        let socket = match &self.twin {
            Some(twin) if !self.input.rarely(16) => twin,
            _ => &self.socket,
        };
        send(socket, &[header.as_bytes(), &payload].concat(), &fds);
    }

    fn answer(&mut self, asked: &Header, payload: &[u8]) {
        self.drain();
        if asked.flags & 0x10 != 0 && !self.input.rarely(64) {
            return;
        }
        let act = self.input.byte();
        let (mut payload, mut fds) = self.proper(Command(asked.command), payload);
        let mut header = Header::reply(asked, length(&payload));
        let mut whole = true;
        match act {
            0..0x80 => {}
            0x80..0x90 => {
                // Other contents of the same size, in whole numbers.
                let numbers = payload.len() / 8 + 1;
                let other: Vec<u8> = (0..numbers).flat_map(|_| self.input.number().to_ne_bytes()).collect();
                payload.iter_mut().zip(other).for_each(|(old, new)| *old = new);
            }
            0x90..0xa8 if !payload.is_empty() => {
                let at = self.input.below(payload.len());
                payload[at] ^= self.input.byte();
            }
            0xa8..0xb0 => {
                payload = self.input.bytes(300);
                header.size = length(&payload) + 16;
            }
            0xb0..0xb8 => fds = (0..self.input.below(4)).map(|_| any(&mut self.input)).collect(),
            0xb8..0xbb => header.flags ^= self.input.u32(),
            0xbb..0xbd => header.command = self.input.u16(),
            0xbd..0xc0 => header.id ^= self.input.u16(),
            0xc0..0xc8 => {
                header.size = self.input.u32();
                whole = header.size <= length(&payload) + 16;
            }
            0xc8..0xd0 => send(&self.socket, &[header.as_bytes(), &payload].concat(), &[]),
            0xd0..0xe0 => self.ask(),
            0xe0..0xe8 => {
                header = Header::error_reply(asked, self.input.u32());
                payload.clear();
                fds.clear();
            }
            0xe8..0xf0 => {
                let keep = self.input.below(HEADER_SIZE + payload.len());
                let mut bytes = [header.as_bytes(), &payload].concat();
                bytes.truncate(keep);
                send(&self.socket, &bytes, &fds);
                let _ = self.socket.shutdown(Shutdown::Write);
                return;
            }
            0xf0..0xf8 => {
                let bytes = self.input.bytes(64);
                send(&self.socket, &bytes, &[]);
                let _ = self.socket.shutdown(Shutdown::Write);
                return;
            }
            _ => {
                let _ = self.socket.shutdown(self.input.pick(&[Shutdown::Write, Shutdown::Both]));
                return;
            }
        }
        send(&self.socket, &[header.as_bytes(), &payload].concat(), &fds);
        if !whole {
            let _ = self.socket.shutdown(Shutdown::Write);
        }
    }

    /// What a good server answers.
    fn proper(&mut self, command: Command, asked: &[u8]) -> (Vec<u8>, Vec<OwnedFd>) {
        let only = |payload: Vec<u8>| (payload, Vec::new());
        match command {
            Command::VERSION => self.version(),
            Command::DEVICE_GET_INFO => only([16u32, 3, 9, 5].map(u32::to_ne_bytes).concat()),
            Command::DEVICE_GET_REGION_INFO => region(asked),
            Command::DEVICE_GET_REGION_IO_FDS => doorbells(asked),
            Command::DEVICE_GET_IRQ_INFO => {
                let mut info = asked.to_vec();
                info[12] = 6;
                only(info)
            }
            Command::REGION_READ | Command::MIG_DATA_READ => {
                let head = if command == Command::REGION_READ { 16 } else { 8 };
                let count = u32::from_ne_bytes(asked[head - 4..head].try_into().expect("4 bytes"));
                let mut reply = asked.to_vec();
                reply.resize(head + (count as usize).min(1 << 16), 7);
                if command == Command::MIG_DATA_READ {
                    // The end of the stream.
                    reply[4..8].copy_from_slice(&5u32.to_ne_bytes());
                    reply.truncate(8 + 5);
                }
                only(reply)
            }
            Command::REGION_WRITE => only(asked[..16].to_vec()),
            Command::REGION_WRITE_MULTI => only(asked[..8].to_vec()),
            Command::DMA_UNMAP => only(asked.to_vec()),
            Command::DEVICE_FEATURE => only(feature(asked)),
            _ => only(Vec::new()),
        }
    }

    fn version(&mut self) -> (Vec<u8>, Vec<OwnedFd>) {
        let twin = self.input.byte() & 1 == 1;
        let mut text = "{\"capabilities\":{\"max_msg_fds\":4,\"write_multiple\":true".to_owned();
        let mut fds = Vec::new();
        if twin {
            let (ours, theirs) = UnixStream::pair().expect("a socket pair");
            ours.set_nonblocking(true).expect("a flag");
            self.twin = Some(ours);
            fds.push(theirs.into());
            text += ",\"twin_socket\":{\"supported\":true,\"fd_index\":0}";
        }
        ([&[0, 0, 1, 0], text.as_bytes(), b"}}\0"].concat(), fds)
    }
}

fn region(asked: &[u8]) -> (Vec<u8>, Vec<OwnedFd>) {
    let ask = RegionInfoPayload::read_from_bytes(asked).expect("32 bytes");
    let mut info = RegionInfoPayload { flags: 15, argsz: 64, size: 0x4000, ..ask };
    if ask.argsz < 64 {
        return (info.as_bytes().to_vec(), Vec::new());
    }
    info.cap_offset = 32;
    let head = CapabilityHead { id: 1, version: 1, next: 0 };
    let sparse = SparseHead { count: 1, reserved: 0 };
    let area = [0x1000u64, 0x1000].map(u64::to_ne_bytes).concat();
    let payload = [info.as_bytes(), head.as_bytes(), sparse.as_bytes(), &area].concat();
    (payload, vec![memory_file(0x4000)])
}

fn doorbells(asked: &[u8]) -> (Vec<u8>, Vec<OwnedFd>) {
    let ask = IoFdsHead::read_from_bytes(asked).expect("16 bytes");
    let head = IoFdsHead { argsz: 16 + 40, count: 1, ..ask };
    let entry = IoFdEntry { offset: 0, size: 4, fd_index: 0, kind: 0, flags: 0, shadow_fd_index: 0 };
    ([head.as_bytes(), entry.as_bytes(), &[0; 8]].concat(), vec![memory_file(1)])
}

fn feature(asked: &[u8]) -> Vec<u8> {
    let (head, data) = FeatureHead::read_from_prefix(asked).expect("8 bytes");
    let data = match (head.flags & 0xffff, head.flags >> 16) {
        (_, 4..) => Vec::new(),
        (1, _) => 5u64.to_ne_bytes().to_vec(),
        (2, 1) => [2u32, 0].map(u32::to_ne_bytes).concat(),
        (8, _) => {
            let report = LoggingReport::read_from_bytes(data).expect("24 bytes");
            let words = (report.length / report.page_size).div_ceil(64) as usize;
            [data, &vec![0; words * 8]].concat()
        }
        _ => data.to_vec(),
    };
    [head.as_bytes(), &data].concat()
}

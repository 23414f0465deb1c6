//! A vhost-user backend without a thread: it watches the front end through the trace hook, which is called
//! just before each message goes out, and puts its answer into the socket then. So a conversation takes no
//! time, and the same input gives the same conversation.
//!
//! It answers as the specification says, with everything offered, until the fuzzer's bytes say otherwise.
//! Where an answer that is due will not come whole, the peer closes its half: nothing is waited for.

use std::io::Write;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use transport::peer::fds;
use transport::peer::{Direction, Limits, Trace, TraceEvent};
use transport::vhost_user::Connection;
use transport::vhost_user::message::{HEADER_SIZE, Header, Inflight};
use transport::vhost_user::request::{Answer, Request};
use zerocopy::{FromBytes, IntoBytes};

use crate::descriptors::{any, memory_file};
use crate::input::Input;

/// Only reached where a broken answer looks like the beginning of a long one.
const DEADLINE: Duration = Duration::from_millis(20);

/// Messages that may lie in the socket.
const UNREAD_MOST: usize = 64;

/// The features that are offered, unless the input says otherwise: log, in-direct, event index, protocol,
/// version 1, access platform, packed rings.
const FEATURES: u64 = 1 << 26 | 1 << 28 | 1 << 29 | 1 << 30 | 1 << 32 | 1 << 33 | 1 << 34;

/// Every protocol feature that there is.
const PROTOCOL: u64 = (1 << 24) - 1;

struct State {
    input: Input,
    socket: UnixStream,
    /// Messages since the socket was last read.
    unread: usize,
    /// What was read of a message that is not whole yet.
    partial: Vec<u8>,
    fds: Vec<OwnedFd>,
    /// The backend's own channel.
    channel: Option<UnixStream>,
    /// The far ends of pipes.
    kept: Vec<OwnedFd>,
    listening: bool,
}

/// The backend.
pub struct Peer(Arc<Mutex<State>>);

struct Watcher(Arc<Mutex<State>>);

impl Trace for Watcher {
    fn message(&self, event: &TraceEvent<'_>) {
        if event.direction == Direction::Request {
            let header = Header::read_from_bytes(event.header).expect("a whole header");
            self.0.lock().expect("no panic").answer(&header, event.payload);
        }
    }
}

impl Peer {
    /// A backend whose deviations are in `input`, and the connection to it.
    pub fn new(input: Input) -> (Self, Connection) {
        let (ours, theirs) = UnixStream::pair().expect("a socket pair");
        let state = State {
            input,
            socket: ours,
            unread: 0,
            partial: Vec::new(),
            fds: Vec::new(),
            channel: None,
            kept: Vec::new(),
            listening: false,
        };
        let state = Arc::new(Mutex::new(state));
        let limits = Limits::new(DEADLINE).traced(Arc::new(Watcher(Arc::clone(&state))));
        let connection = Connection::from_stream(theirs, "fuzz", &limits).expect("a connection");
        (Self(state), connection)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().expect("no panic")
    }

    /// Draws from the input. The connection must not be used meanwhile.
    pub fn draw<T>(&self, draw: impl FnOnce(&mut Input) -> T) -> T {
        draw(&mut self.state().input)
    }

    /// Sends a request on the backend's own channel, or something like one.
    pub fn request(&self) {
        let state = &mut *self.state();
        state.drain();
        let (bytes, fds) = any_request(&mut state.input);
        state.send_on_channel(&bytes, &fds);
    }

    /// Sends bytes on the backend's own channel.
    pub fn send_on_channel(&self, bytes: &[u8]) {
        let mut state = self.state();
        state.drain();
        state.send_on_channel(bytes, &[]);
    }

    /// Takes what was answered on the backend's own channel.
    pub fn answers(&self) -> Vec<u8> {
        let mut answers = Vec::new();
        let state = self.state();
        let Some(channel) = &state.channel else { return answers };
        let mut bytes = [0; 4096];
        while let Ok(received) = fds::receive(channel.as_fd(), &mut bytes, fds::Room::Many, &mut Vec::new()) {
            if received.bytes == 0 {
                break;
            }
            answers.extend_from_slice(&bytes[..received.bytes]);
        }
        answers
    }

    /// Closes one direction of the main connection, or both.
    pub fn hang_up(&self, how: Shutdown) {
        self.state().hang_up(how);
    }
}

/// A backend request: mostly well-formed, with its fields the fuzzer's.
pub fn any_request(input: &mut Input) -> (Vec<u8>, Vec<OwnedFd>) {
    let code = u32::from(input.byte() % 12);
    let act = input.byte();
    let due: usize = match code {
        1 => 32,
        3 => 24,
        4 | 5 => 8,
        6..=8 => 16,
        9 | 10 => 40,
        _ => 0,
    };
    let mut payload: Vec<u8> = Vec::new();
    while payload.len() < due {
        payload.extend(input.number().to_ne_bytes());
    }
    // The first field of these is small.
    if matches!(code, 3 | 9 | 10) && act & 1 == 0 {
        payload[1..8].fill(0);
    }
    let mut header = Header::request(code, u32::try_from(due).expect("small"));
    if act & 2 != 0 {
        header.flags |= 8;
    }
    let fds = match act >> 2 & 3 {
        0 => usize::from(matches!(code, 3 | 9)),
        n => usize::from(n) - 1,
    };
    match act >> 4 {
        12 => header.size = input.u32(),
        13 => header.flags = input.u32(),
        14 => header.request = input.u32(),
        15 => {
            payload = input.bytes(64);
            header.size = u32::try_from(payload.len()).expect("small");
        }
        _ => {}
    }
    let mut bytes = header.as_bytes().to_vec();
    bytes.extend(payload);
    (bytes, (0..fds).map(|_| any(input)).collect())
}

/// Sends without blocking; a front end that has closed is no fault.
fn send(socket: &UnixStream, bytes: &[u8], fds: &[OwnedFd]) {
    let fds: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
    let _ = fds::send(socket.as_fd(), bytes, &fds);
}

impl State {
    fn hang_up(&mut self, how: Shutdown) {
        let _ = self.socket.shutdown(how);
    }

    fn send_on_channel(&mut self, bytes: &[u8], fds: &[OwnedFd]) {
        if let Some(channel) = &self.channel {
            send(channel, bytes, fds);
        }
    }

    /// Reads what the front end has sent up to now, and keeps its channel.
    fn drain(&mut self) {
        self.unread = 0;
        loop {
            let due = match Header::read_from_prefix(&self.partial) {
                Err(_) => HEADER_SIZE,
                Ok((header, payload)) => {
                    let size = usize::try_from(header.size).expect("64 bits");
                    assert!(size <= 4096, "the front end sent {header:?}");
                    if payload.len() == size {
                        let fds = std::mem::take(&mut self.fds);
                        if Request(header.request) == Request::SET_BACKEND_REQ_FD {
                            self.channel = fds.into_iter().next().map(UnixStream::from);
                        }
                        self.partial.clear();
                        continue;
                    }
                    HEADER_SIZE + size
                }
            };
            let have = self.partial.len();
            self.partial.resize(due, 0);
            let received =
                fds::receive(self.socket.as_fd(), &mut self.partial[have..], fds::Room::Many, &mut self.fds);
            let got = received.map_or(0, |received| received.bytes);
            self.partial.truncate(have + got);
            if got == 0 {
                return;
            }
        }
    }

    fn answer(&mut self, asked: &Header, payload: &[u8]) {
        // Reading is only for the channel, and so that the socket does not fill up.
        self.unread += 1;
        if self.unread > UNREAD_MOST {
            self.drain();
        }
        let request = Request(asked.request);
        let row = request.row().expect("the front end sends what is in the table");
        let in_postcopy = self.listening && request == Request::SET_MEM_TABLE && payload.len() > 8;
        self.listening |= request == Request::POSTCOPY_LISTEN;
        let due = asked.wants_reply() || in_postcopy || !matches!(row.answer, Answer::Ack);
        let act = self.input.byte();
        if act < 0x80 && !due {
            return;
        }
        let (mut payload, mut fds) = self.proper(request, payload);
        let mut header = Header::reply(asked.request, length(&payload));
        let mut whole = true;
        match act {
            0..0x80 => {}
            0x80..0x90 => {
                // Other contents of the same size, in whole numbers.
                let numbers = payload.len() / 8 + 1;
                let other: Vec<u8> = (0..numbers).flat_map(|_| self.input.number().to_ne_bytes()).collect();
                payload.iter_mut().zip(other).for_each(|(old, new)| *old = new);
            }
            0x90..0xa0 if !payload.is_empty() => {
                let at = self.input.below(payload.len());
                payload[at] ^= self.input.byte();
            }
            0xa0..0xb0 => {
                payload = self.input.bytes(300);
                header.size = length(&payload);
            }
            0xb0..0xb8 => fds = (0..self.input.below(4)).map(|_| any(&mut self.input)).collect(),
            0xb8..0xbc => header.flags ^= self.input.u32(),
            0xbc..0xc0 => header.request = self.input.u32(),
            0xc0..0xc8 => {
                header.size = self.input.u32();
                whole = header.size <= length(&payload);
            }
            0xc8..0xd0 => {
                // Twice: the second one is in the way of the next answer.
                send(&self.socket, &[header.as_bytes(), &payload].concat(), &[]);
            }
            0xd0..0xe0 => {
                let (bytes, fds) = any_request(&mut self.input);
                self.drain();
                self.send_on_channel(&bytes, &fds);
            }
            0xe0..0xe8 => {
                let keep = self.input.below(HEADER_SIZE + payload.len());
                let mut bytes = [header.as_bytes(), &payload].concat();
                bytes.truncate(keep);
                send(&self.socket, &bytes, &fds);
                return self.hang_up(Shutdown::Write);
            }
            0xe8..0xf0 => {
                let bytes = self.input.bytes(64);
                send(&self.socket, &bytes, &[]);
                return self.hang_up(Shutdown::Write);
            }
            0xf0..0xf8 => return self.hang_up(Shutdown::Both),
            _ => return self.hang_up(Shutdown::Write),
        }
        send(&self.socket, &[header.as_bytes(), &payload].concat(), &fds);
        if !whole {
            self.hang_up(Shutdown::Write);
        }
    }

    /// What a good backend answers.
    fn proper(&mut self, request: Request, asked: &[u8]) -> (Vec<u8>, Vec<OwnedFd>) {
        let number = |number: u64| (number.to_ne_bytes().to_vec(), Vec::new());
        match request {
            Request::GET_FEATURES => number(FEATURES),
            Request::GET_PROTOCOL_FEATURES => number(PROTOCOL),
            Request::GET_QUEUE_NUM => number(4),
            Request::GET_MAX_MEM_SLOTS => number(16),
            Request::GET_STATUS => number(0xf),
            Request::GET_VRING_BASE | Request::GET_VRING_BASE_SKIP_DRAIN => (asked.to_vec(), Vec::new()),
            Request::GET_CONFIG => {
                let mut config = asked.to_vec();
                for (n, byte) in config.iter_mut().skip(12).enumerate() {
                    *byte = n as u8;
                }
                (config, Vec::new())
            }
            Request::GET_INFLIGHT_FD => {
                let size = 1 << 20;
                let mut area = Inflight::read_from_bytes(asked).expect("24 bytes");
                area.mmap_size = size;
                (area.as_bytes().to_vec(), vec![memory_file(size)])
            }
            Request::GET_SHMEM_CONFIG => (([1u64, 0, 0x1_0000].map(u64::to_ne_bytes)).concat(), Vec::new()),
            Request::SET_DEVICE_STATE_FD => {
                let flags = rustix::pipe::PipeFlags::CLOEXEC;
                let (reader, writer) = rustix::pipe::pipe_with(flags).expect("a pipe");
                if asked.first() == Some(&0) {
                    // Written before it is asked for, and ended by the drop.
                    let _ = std::fs::File::from(writer).write_all(b"the state of a device");
                    (vec![0; 8], vec![reader])
                } else {
                    self.kept.push(reader);
                    (vec![0; 8], vec![writer])
                }
            }
            Request::POSTCOPY_ADVISE | Request::GET_SHARED_OBJECT => (vec![0; 8], vec![memory_file(1)]),
            Request::SET_LOG_BASE => (Vec::new(), Vec::new()),
            Request::SET_MEM_TABLE if self.listening => (asked.to_vec(), Vec::new()),
            _ => number(0),
        }
    }
}

fn length(bytes: &[u8]) -> u32 {
    u32::try_from(bytes.len()).expect("small")
}

//! Against QEMU's vhost-user-gpu, which we did not write: what it draws goes to the display whose socket we hand it, which is
//! played here. By `tests/backends/fetch`; it needs no graphics card.

#![cfg(test)]

mod support;

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use support::fetched::{fetched, until_listening};
use support::queue::{Part, Queue};
use support::{GuestMemory, Peer, Scratch, connect_patiently};
use transport::peer::Limits;
use transport::vhost_user::{RingBase, Wanted};

const VERSION_1: u64 = 1 << 32;
const WIDTH: u32 = 64;
const HEIGHT: u32 = 16;

struct Gpu {
    _process: Peer,
    socket: PathBuf,
    _scratch: Scratch,
}

impl Gpu {
    /// `None`, with a printed reason, where it was not fetched.
    fn start() -> Option<Self> {
        let program = fetched("vhost-user-gpu")?;
        let scratch = Scratch::new();
        let socket = scratch.path("gpu");
        let child = Command::new(program)
            .arg("--socket-path")
            .arg(&socket)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let process = Peer(child);
        until_listening(&socket, Duration::from_secs(30));
        Some(Self { _process: process, socket, _scratch: scratch })
    }
}

/// What a display was told, by request.
type Seen = Vec<(u32, Vec<u8>)>;

fn words(bytes: &[u8]) -> Vec<u32> {
    bytes.chunks_exact(4).map(|word| u32::from_ne_bytes(word.try_into().unwrap())).collect()
}

/// One screen, until the other end is closed. "Vhost-user-gpu Protocol", QEMU's interop documentation.
fn display(mut stream: UnixStream) -> JoinHandle<Seen> {
    thread::spawn(move || {
        let mut seen = Seen::new();
        let mut header = [0; 12];
        while stream.read_exact(&mut header).is_ok() {
            let [request, _flags, size] = words(&header)[..] else { panic!() };
            let mut payload = vec![0; size.try_into().unwrap()];
            stream.read_exact(&mut payload).unwrap();
            let answer = match request {
                // GET_PROTOCOL_FEATURES
                1 => vec![0; 8],
                // GET_DISPLAY_INFO: OK_DISPLAY_INFO, and 16 screens of which one is on.
                3 => {
                    let mut answer = vec![0; 24 + 16 * 24];
                    answer[..4].copy_from_slice(&0x1101_u32.to_le_bytes());
                    for (at, value) in [(32, WIDTH), (36, HEIGHT), (40, 1)] {
                        answer[at..at + 4].copy_from_slice(&value.to_le_bytes());
                    }
                    answer
                }
                _ => vec![],
            };
            if !answer.is_empty() {
                let size = u32::try_from(answer.len()).unwrap();
                let header: Vec<u8> = [request, 4, size].into_iter().flat_map(u32::to_ne_bytes).collect();
                stream.write_all(&[header, answer].concat()).unwrap();
            }
            seen.push((request, payload));
        }
        seen
    })
}

const REQUEST: u64 = 0x5000;
const ANSWER: u64 = 0x6000;
const PIXELS: u64 = 0x7000;

/// The guest's side of the control queue, and of the other one, which nobody uses.
struct Driver {
    memory: GuestMemory,
    control: Queue,
    cursor: Queue,
}

impl Driver {
    /// One command of virtio 1.2 §5.7.6.7 and the type of its answer.
    fn command(&mut self, command: u32, body: &[u32]) -> u32 {
        let words = [&[command, 0, 0, 0, 0, 0], body].concat();
        let request: Vec<u8> = words.into_iter().flat_map(u32::to_le_bytes).collect();
        self.memory.write(REQUEST, &request);
        self.memory.write(ANSWER, &[0; 4]);
        let length = u32::try_from(request.len()).unwrap();
        self.control.offer(&self.memory, 0, &[Part::Read(REQUEST, length), Part::Write(ANSWER, 408)]);
        self.control.kick_and_wait(&self.memory);
        words_at(&self.memory, ANSWER, 1)[0]
    }
}

fn words_at(memory: &GuestMemory, at: u64, count: usize) -> Vec<u32> {
    words(&memory.read(at, 4 * count))
}

#[test]
fn qemu_gpu_draws_on_the_display_whose_socket_it_was_given() {
    let Some(gpu) = Gpu::start() else { return };
    let limits = Limits::new(Duration::from_secs(20));
    let mut session = connect_patiently(&gpu.socket, &limits).negotiate(&Wanted::default()).unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let seen = display(ours);
    session.set_gpu_socket(theirs.as_fd()).unwrap();
    drop(theirs);
    assert_eq!(
        words(&session.read_config(16).unwrap())[2],
        0,
        "how many screens there are, it leaves to the front end"
    );

    let (control, cursor) = (Queue::new(0, 0x1000), Queue::new(1, 0x2_0000));
    let mut driver = Driver { memory: GuestMemory::new(2 << 20), control, cursor };
    let features = session.offered().accept(VERSION_1).unwrap();
    let rings = [driver.control.ring(RingBase(0)), driver.cursor.ring(RingBase(0))];
    let live = session.go_live(features, &driver.memory.map, &rings).unwrap();

    const OK: u32 = 0x1100;
    // GET_DISPLAY_INFO comes from the display.
    assert_eq!(driver.command(0x100, &[]), 0x1101);
    assert_eq!(words_at(&driver.memory, ANSWER + 24, 5), [0, 0, WIDTH, HEIGHT, 1]);
    let pixels: Vec<u32> = (0..WIDTH * HEIGHT).map(|n| 0xff00_0000 | (n * 77)).collect();
    driver.memory.write(PIXELS, &pixels.iter().copied().flat_map(u32::to_le_bytes).collect::<Vec<u8>>());
    let whole = [0, 0, WIDTH, HEIGHT];
    // RESOURCE_CREATE_2D in B8G8R8A8, ATTACH_BACKING, SET_SCANOUT, TRANSFER_TO_HOST_2D, FLUSH.
    assert_eq!(driver.command(0x101, &[7, 1, WIDTH, HEIGHT]), OK);
    assert_eq!(driver.command(0x106, &[7, 1, u32::try_from(PIXELS).unwrap(), 0, 4 * WIDTH * HEIGHT, 0]), OK);
    assert_eq!(driver.command(0x103, &[&whole[..], &[0, 7]].concat()), OK);
    assert_eq!(driver.command(0x105, &[&whole[..], &[0, 0, 7, 0]].concat()), OK);
    assert_eq!(driver.command(0x104, &[&whole[..], &[7, 0]].concat()), OK);
    live.stop().unwrap();
    drop(gpu);

    let seen = seen.join().unwrap();
    let of = |request: u32| {
        seen.iter().filter(|(seen, _)| *seen == request).map(|(_, payload)| payload).next_back()
    };
    assert_eq!(words(of(7).unwrap()), [0, WIDTH, HEIGHT], "SCANOUT");
    let update = words(of(8).unwrap());
    assert_eq!(update[..5], [0, 0, 0, WIDTH, HEIGHT], "UPDATE");
    assert!(update[5..] == pixels, "other pixels");
}

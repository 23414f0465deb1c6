//! Against QEMU's vhost-user-gpu, which we did not write: what it draws goes to the display whose socket we hand it, which is
//! played here. By `tests/backends/fetch`; it needs no graphics card.

#![cfg(test)]

mod support;

use std::env;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use support::{GuestMemory, Scratch, eventually};
use transport::memory_map::GuestAddr;
use transport::vhost_user::{Call, Connection, Kick, Limits, Ring, RingBase, Wanted};

const VERSION_1: u64 = 1 << 32;
const WIDTH: u32 = 64;
const HEIGHT: u32 = 16;

struct Gpu {
    child: Child,
    socket: PathBuf,
    _scratch: Scratch,
}

impl Gpu {
    /// `None`, with a printed reason, where it was not fetched.
    fn start() -> Option<Self> {
        let Some(program) = env::var_os("OUTBOARD_BACKEND_VHOST_USER_GPU") else {
            println!("skipped: no vhost-user-gpu here (tests/backends/fetch brings it)");
            return None;
        };
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
        eventually("vhost-user-gpu's socket", Duration::from_secs(30), || socket.exists());
        Some(Self { child, socket, _scratch: scratch })
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
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

const DESC: u64 = 0x1000;
const AVAIL: u64 = 0x3000;
const USED: u64 = 0x4000;
const REQUEST: u64 = 0x5000;
const ANSWER: u64 = 0x6000;
const PIXELS: u64 = 0x7000;
/// Where the other queue is, which nobody uses.
const CURSOR: u64 = 0x2_0000;
const SIZE: u16 = 64;

/// The guest's side of the control queue.
struct Driver {
    memory: GuestMemory,
    kicks: [Kick; 2],
    calls: [Call; 2],
    requests: u16,
}

impl Driver {
    fn ring(&self, index: u16) -> Ring<'_> {
        let at = u64::from(index) * CURSOR;
        Ring {
            index,
            size: SIZE,
            descriptor: GuestAddr(at + DESC),
            available: GuestAddr(at + AVAIL),
            used: GuestAddr(at + USED),
            base: RingBase(0),
            kick: &self.kicks[usize::from(index)],
            call: &self.calls[usize::from(index)],
            error: None,
        }
    }

    /// One command of virtio 1.2 §5.7.6.7 and the type of its answer.
    fn command(&mut self, command: u32, body: &[u32]) -> u32 {
        let words = [&[command, 0, 0, 0, 0, 0], body].concat();
        let request: Vec<u8> = words.into_iter().flat_map(u32::to_le_bytes).collect();
        self.memory.write(REQUEST, &request);
        self.memory.write(ANSWER, &[0; 4]);
        let length = u32::try_from(request.len()).unwrap();
        for (n, (at, length, flags)) in
            [(REQUEST, length, [1, 0, 1, 0]), (ANSWER, 408, [2, 0, 0, 0])].iter().enumerate()
        {
            let descriptor = [&at.to_le_bytes()[..], &length.to_le_bytes(), flags].concat();
            self.memory.write(DESC + 16 * n as u64, &descriptor);
        }
        self.memory.write(AVAIL + 4 + 2 * u64::from(self.requests % SIZE), &[0, 0]);
        self.requests += 1;
        self.memory.write(AVAIL + 2, &self.requests.to_le_bytes());
        self.kicks[0].ring().unwrap();
        eventually("the backend answers", Duration::from_secs(20), || {
            self.memory.read_u16(USED + 2) == self.requests
        });
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
    let mut attempts = transport::vhost_user::reconnect::Attempts::lasting(Some(Duration::from_secs(20)));
    let connection = Connection::connect_patiently(&gpu.socket, &limits, &mut attempts).unwrap();
    let mut session = connection.negotiate(&Wanted::default()).unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let seen = display(ours);
    session.set_gpu_socket(theirs.as_fd()).unwrap();
    drop(theirs);
    assert_eq!(
        words(&session.read_config(16).unwrap())[2],
        0,
        "how many screens there are, it leaves to the front end"
    );

    let pair = || (Kick::new().unwrap(), Call::new().unwrap());
    let ((k0, c0), (k1, c1)) = (pair(), pair());
    let mut driver =
        Driver { memory: GuestMemory::new(2 << 20), kicks: [k0, k1], calls: [c0, c1], requests: 0 };
    let features = session.offered().accept(VERSION_1).unwrap();
    let live = session.go_live(features, &driver.memory.map, &[driver.ring(0), driver.ring(1)]).unwrap();

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

use super::*;

use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use transport::memory::MemoryMap;
use transport::peer::Limits;
use transport::testing::{Act, Offer, Script, ScriptedBackend};
use transport::vhost_user::request::Request;
use transport::vhost_user::{Connection, ProtocolFeatures};

use crate::testing::{RAM, memory_without_a_file};
use crate::virtio::PhaseReport;
use crate::virtio::backend::vhost_user::Order;
use crate::virtio::backend::vhost_user::tests::Guest;
use crate::virtio::recovery::candidate::open;
use crate::virtio::types::model::Wishes;
use crate::virtio::types::table::DeviceType;

const DESC: u64 = 0x1000;
const AVAIL: u64 = 0x2000;
const USED: u64 = 0x3000;
const SIZE: u16 = 8;

struct Rig {
    memory: MemoryMap,
    state: QueueState,
}

fn rig() -> Rig {
    let [desc, driver, device] = [DESC, AVAIL, USED].map(GuestAddr);
    let state = QueueState { size: SIZE, ready: true, desc, driver, device, ..QueueState::new(SIZE) };
    Rig { memory: memory_without_a_file(), state }
}

impl Rig {
    fn rings(&self) -> Rings<'_> {
        Rings { state: &self.state, space: Space::from(&self.memory), tells_events: true }
    }

    fn store(&self, at: u64, bytes: &[u8]) {
        self.memory.write(GuestAddr(at), bytes).unwrap();
    }

    fn load(&self, at: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.memory.read(GuestAddr(at), &mut bytes).unwrap();
        bytes
    }

    fn describe(&self, at: u64, (address, length, flags, next): (u64, u32, u16, u16)) {
        let bytes =
            [&address.to_le_bytes()[..], &length.to_le_bytes(), &flags.to_le_bytes(), &next.to_le_bytes()];
        self.store(at, &bytes.concat());
    }

    fn offer(&self, index: u16, heads: &[u16]) {
        for (slot, head) in (0..).zip(heads) {
            self.store(AVAIL + 4 + 2 * slot, &head.to_le_bytes());
        }
        self.store(AVAIL + 2, &index.to_le_bytes());
    }
}

#[test]
fn request_in_pieces_is_read_whole_and_answered_in_pieces() {
    let rig = rig();
    rig.store(0x8000, b"control");
    rig.store(0x9000, b"key");
    rig.describe(DESC + 48, (0x8000, 7, NEXT, 4));
    rig.describe(DESC + 64, (0x9000, 3, NEXT, 5));
    rig.describe(DESC + 80, (0xa000, 2, NEXT | WRITE, 6));
    rig.describe(DESC + 96, (0xb000, 9, WRITE, 0));
    rig.offer(1, &[3]);
    let mut queue = ControlQueue::default();
    assert!(queue.has_more(rig.rings()).unwrap());
    let chain = queue.take(rig.rings()).unwrap().unwrap();
    assert_eq!((chain.request.as_slice(), chain.room()), (b"controlkey".as_slice(), 11));
    queue.answer(rig.rings(), &chain, b"done").unwrap();
    assert_eq!((rig.load(0xa000, 2), rig.load(0xb000, 3)), (b"do".to_vec(), b"ne\0".to_vec()));
    assert_eq!(rig.load(USED + 2, 10), [1, 0, 3, 0, 0, 0, 4, 0, 0, 0]);
    assert!(!queue.has_more(rig.rings()).unwrap() && queue.take(rig.rings()).unwrap().is_none());
    assert_eq!(rig.load(USED + 4 + 64, 2), [1, 0], "kick me for the next");
}

#[test]
fn indirect_tables_are_looked_through_once() {
    let rig = rig();
    rig.store(0x8000, b"abc");
    rig.describe(0x7000, (0x8000, 3, NEXT, 1));
    rig.describe(0x7010, (0xa000, 1, WRITE, 0));
    rig.describe(DESC, (0x7000, 32, INDIRECT, 0));
    rig.offer(1, &[0]);
    let queue = ControlQueue::default();
    let chain = queue.take(rig.rings()).unwrap().unwrap();
    assert_eq!((chain.request.as_slice(), chain.room()), (b"abc".as_slice(), 1));
    // A table in a table, and tables without entries or with too many.
    rig.describe(0x7010, (0x7000, 32, INDIRECT, 0));
    assert!(queue.take(rig.rings()).is_err());
    for length in [0, 15, 17, 16 * 257, u32::MAX] {
        rig.describe(DESC, (0x7000, length, INDIRECT, 0));
        assert!(queue.take(rig.rings()).is_err(), "{length}");
    }
    rig.describe(DESC, (0x7000, 32, INDIRECT | NEXT, 1));
    assert!(queue.take(rig.rings()).is_err(), "both");
    // The ring's own table as an indirect table: a loop without a buffer.
    rig.describe(DESC, (DESC, 16, INDIRECT, 0));
    assert!(queue.take(rig.rings()).is_err(), "itself");
}

#[test]
fn rings_of_a_hostile_driver_end_in_an_error_and_in_bounded_memory() {
    let rig = rig();
    let queue = ControlQueue::default();
    // A loop.
    rig.describe(DESC, (0x8000, 4, NEXT, 1));
    rig.describe(DESC + 16, (0x8000, 4, NEXT, 0));
    rig.offer(1, &[0]);
    assert!(queue.take(rig.rings()).is_err());
    rig.offer(1, &[SIZE]);
    assert!(queue.take(rig.rings()).is_err(), "a head beyond the table");
    rig.describe(DESC, (0x8000, 4, NEXT, SIZE));
    rig.offer(1, &[0]);
    assert!(queue.take(rig.rings()).is_err(), "a next one beyond the table");
    for at in [RAM - 2, RAM, u64::MAX - 1] {
        rig.describe(DESC, (at, 4, 0, 0));
        assert!(queue.take(rig.rings()).is_err(), "{at:#x}");
    }
    rig.offer(SIZE + 1, &[0]);
    assert!(queue.take(rig.rings()).is_err() && queue.has_more(rig.rings()).is_err(), "more than there are");
    // A request of four gigabytes is cut.
    rig.describe(DESC, (0x8000, u32::MAX, 0, 0));
    rig.offer(1, &[0]);
    assert_eq!(queue.take(rig.rings()).unwrap().unwrap().request.len(), REQUEST_MAX);
    // An answer is written only to guest memory.
    rig.describe(DESC, (RAM - 2, 4, WRITE, 0));
    let chain = queue.take(rig.rings()).unwrap().unwrap();
    assert!(ControlQueue::default().answer(rig.rings(), &chain, b"done").is_err());
}

/// A crypto device with a scripted backend and one data queue.
fn crypto(script: Script) -> (ScriptedBackend, Guest) {
    let offer = Offer::default();
    let protocol = offer.protocol.with(ProtocolFeatures::CRYPTO_SESSION).without(ProtocolFeatures::CONFIG);
    let (backend, socket) = ScriptedBackend::pair(Offer { protocol, queue_num: 1, ..offer }, script).unwrap();
    let limits = Limits::new(Duration::from_secs(5));
    let connection = Connection::from_stream(socket, "scripted", &limits).unwrap();
    let order = Order::new(DeviceType::named("crypto").unwrap(), Wishes::default(), "").unwrap();
    let opened = open(connection, &order).unwrap();
    assert_eq!((opened.model.queues, opened.model.config.len()), (2, 56));
    assert_eq!((opened.model.config[4], opened.model.config[36]), (1, 64));
    let (guest, _channel, _hang_up) = Guest::new(opened);
    (backend, guest)
}

/// Starts a driver with the data queue and the control queue, number 1.
fn start(guest: &Guest) {
    for area in [DESC, AVAIL, USED, 0x4000, 0x5000, 0x6000] {
        guest.store(area, &[0; 0x1000]);
    }
    for status in [0, 1, 3] {
        guest.write(0x70, status);
    }
    guest.write(0x24, 1);
    guest.write(0x20, guest.takes_high.load(Relaxed));
    guest.write(0x70, 0xb);
    for (queue, areas) in [(0, [0x4000, 0x5000, 0x6000]), (1, [DESC, AVAIL, USED])] {
        guest.write(0x30, queue);
        guest.write(0x38, SIZE.into());
        for (offset, area) in [0x80, 0x90, 0xa0].into_iter().zip(areas) {
            guest.write(offset, u32::try_from(area).unwrap());
        }
        guest.write(0x44, 1);
    }
    guest.write(0x70, 0xf);
    assert_eq!(guest.device.handle().phase(), PhaseReport::Running);
}

/// Puts a request with `keys` and room for `room` bytes into the ring; `number` counts from 0.
fn request(guest: &Guest, number: u16, words: &[u32], keys: &[u8], room: u32) {
    let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    bytes.resize(72, 0);
    bytes.extend_from_slice(keys);
    guest.store(0x8000, &bytes);
    let length = u32::try_from(bytes.len()).unwrap();
    let describe = |at: u64, address: u64, length: u32, flags: u16| {
        let parts =
            [&address.to_le_bytes()[..], &length.to_le_bytes(), &flags.to_le_bytes(), &1_u16.to_le_bytes()];
        guest.store(at, &parts.concat());
    };
    describe(DESC, 0x8000, length, NEXT);
    describe(DESC + 16, 0xa000, room, WRITE);
    guest.store(AVAIL + 4 + 2 * u64::from(number % SIZE), &[0, 0]);
    guest.store(AVAIL + 2, &(number + 1).to_le_bytes());
    assert!(guest.machine.guest_writes(0xd000_0050, 1), "the kick ends in the kernel");
}

/// AES-CBC, 16 bytes, encrypt.
fn create() -> Vec<u32> {
    let mut words = vec![2, 3, 0, 0, 3, 16, 1];
    words.resize(16, 0);
    words.push(1);
    words
}

fn answer(guest: &Guest, number: u16) -> Vec<u8> {
    let handle = guest.device.handle();
    let kicks = handle.kicks_to_serve().unwrap();
    let [(1, kick)] = kicks.as_slice() else { panic!("the last queue's kick alone") };
    let mut fds = [rustix::event::PollFd::new(kick, rustix::event::PollFlags::IN)];
    let limit = rustix::event::Timespec { tv_sec: 5, tv_nsec: 0 };
    assert_eq!(rustix::event::poll(&mut fds, Some(&limit)).unwrap(), 1, "whoever watches is woken");
    guest.machine.take_interrupts();
    handle.serve_kick(1);
    assert_eq!(guest.load(USED + 2, 2), (number + 1).to_le_bytes());
    assert!(guest.machine.take_interrupts() > 0);
    guest.load(0xa000, 16)
}

#[test]
fn sessions_of_a_crypto_device_are_the_backends_and_end_with_a_reset() {
    let (backend, guest) = crypto(Script::normal());
    start(&guest);
    let told: Vec<_> =
        backend.seen().into_iter().filter(|seen| seen.request == Request::SET_VRING_ADDR).collect();
    assert_eq!((told.len(), told[0].payload[0]), (1, 0), "the control queue is not told of");
    let handle = guest.device.handle();
    handle.serve_kick(1);
    request(&guest, 0, &create(), &[0xaa; 16], 16);
    assert_eq!(answer(&guest, 0), [7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    let sent =
        backend.seen().into_iter().find(|seen| seen.request == Request::CREATE_CRYPTO_SESSION).unwrap();
    assert_eq!((&sent.payload[12..16], &sent.payload[56..72]), (&[3, 0, 0, 0][..], &[0xaa; 16][..]));
    // A session that the driver does not hold, then a session of its own.
    request(&guest, 1, &[3, 0, 0, 0, 9, 0], &[], 1);
    assert_eq!(answer(&guest, 1)[0], 4);
    request(&guest, 2, &[3, 0, 0, 0, 7, 0], &[], 1);
    assert_eq!(answer(&guest, 2)[0], 0);
    let closed = || backend.conversation().iter().filter(|name| *name == "CLOSE_CRYPTO_SESSION").count();
    assert_eq!(closed(), 1);
    request(&guest, 3, &create(), &[0; 16], 16);
    answer(&guest, 3);
    guest.write(0x70, 0);
    assert_eq!(closed(), 2, "a reset closes what is open");
    start(&guest);
    handle.serve_kick(1);
    request(&guest, 0, &create(), &[1; 16], 16);
    assert_eq!(answer(&guest, 0)[0], 7);
    assert_eq!((handle.stats().trapped.queue_notify, backend.breaches()), (0, vec![]));
}

#[test]
fn backend_that_refuses_a_session_or_dies_of_it_leaves_the_driver_with_an_answer() {
    let refuses =
        Script::normal().on(Request::CREATE_CRYPTO_SESSION, Act::Payload((-5_i64).to_ne_bytes().to_vec()));
    let (_backend, guest) = crypto(refuses);
    start(&guest);
    guest.device.handle().serve_kick(1);
    request(&guest, 0, &create(), &[0; 16], 16);
    assert_eq!(answer(&guest, 0)[8], 1);
    assert_eq!(guest.device.handle().phase(), PhaseReport::Running);

    let (_backend, guest) = crypto(Script::normal().on(Request::CREATE_CRYPTO_SESSION, Act::Close));
    start(&guest);
    guest.device.handle().serve_kick(1);
    request(&guest, 0, &create(), &[0; 16], 16);
    assert_eq!(answer(&guest, 0)[8], 1);
    assert!(matches!(guest.device.handle().phase(), PhaseReport::Broken(_)));
}

#[test]
fn driver_that_writes_nonsense_into_its_control_queue_has_to_reset() {
    let (backend, guest) = crypto(Script::normal());
    start(&guest);
    guest.store(AVAIL + 2, &100_u16.to_le_bytes());
    guest.device.handle().serve_kick(1);
    assert!(matches!(guest.device.handle().phase(), PhaseReport::NeedsReset(_)));
    assert_eq!(guest.machine.page_u32(0x70) & 0x40, 0x40);
    start(&guest);
    assert_eq!(backend.breaches(), Vec::<String>::new());
}

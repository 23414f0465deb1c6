//! Tests of a disk whose backend is killed under load, again and again: no request is lost, doubled or torn.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use transport::peer::Limits;
use transport::vhost_user::Connection;

use super::*;
use crate::virtio::backend::vhost_user::tests::{Daemon, Guest, order};
use crate::virtio::{OnLoss, PhaseReport};

const DESC: u64 = 0x1_0000;
const AVAIL: u64 = 0x1_2000;
const USED: u64 = 0x1_4000;
/// Header, status and data of request `slot`.
const REQUESTS: u64 = 0x10_0000;
const ROOM: u64 = 0x1_0000;
/// Descriptors of the ring.
const SIZE: u16 = 256;
/// Sectors of a block; each block has at most one request at a time.
const BLOCK: u64 = 16;
const BLOCKS: usize = 128;

fn random(seed: &mut u64, below: usize) -> usize {
    *seed ^= *seed << 13;
    *seed ^= *seed >> 7;
    *seed ^= *seed << 17;
    usize::try_from(*seed >> 33).unwrap() % below
}

#[derive(Clone, Copy, Debug)]
struct Pending {
    block: usize,
    sectors: usize,
    /// The number that is written; `None` for a read.
    writes: Option<u64>,
}

/// A driver with many requests in flight, which records what the disk must contain.
struct Load<'a> {
    guest: &'a Guest,
    seed: u64,
    /// Free slots; the last one is used first, as in Linux.
    free: Vec<u16>,
    pending: Vec<Option<Pending>>,
    busy: [bool; BLOCKS],
    /// The number last written to each sector of each block.
    disk: Vec<u64>,
    available: u16,
    used: u16,
    done: usize,
    serial: u64,
    /// The number of requests that were used before a request that was made available earlier.
    overtakings: usize,
    order: std::collections::VecDeque<u16>,
}

/// The contents of a sector, made from a number. A torn sector would differ somewhere.
fn sector(number: u64) -> Vec<u8> {
    number.to_le_bytes().repeat(64)
}

impl<'a> Load<'a> {
    fn new(guest: &'a Guest, slots: u16) -> Self {
        let sectors = BLOCKS * usize::try_from(BLOCK).unwrap();
        Self {
            guest,
            seed: 0x9e37_79b9_7f4a_7c15,
            free: (0..slots).collect(),
            pending: vec![None; slots.into()],
            busy: [false; BLOCKS],
            disk: vec![0; sectors],
            available: 0,
            used: 0,
            done: 0,
            serial: 0,
            overtakings: 0,
            order: std::collections::VecDeque::new(),
        }
    }

    fn submit(&mut self) {
        let block = random(&mut self.seed, BLOCKS);
        if self.busy[block] {
            return;
        }
        let Some(slot) = self.free.pop() else { return };
        let sectors = 1 + random(&mut self.seed, usize::try_from(BLOCK).unwrap());
        let write = random(&mut self.seed, 3) > 0;
        let writes = write.then(|| {
            self.serial += 1;
            self.serial
        });
        self.busy[block] = true;
        self.pending[usize::from(slot)] = Some(Pending { block, sectors, writes });
        self.order.push_back(slot);
        let at = REQUESTS + u64::from(slot) * ROOM;
        let first = u64::try_from(block).unwrap() * BLOCK;
        self.guest.store(at, &[&u32::from(write).to_le_bytes()[..], &[0; 4], &first.to_le_bytes()].concat());
        self.guest.store(at + 16, &[0xff]);
        if let Some(number) = writes {
            self.guest.store(at + 0x1000, &sector(number).repeat(sectors));
        }
        let head = slot * 3;
        let flags = if write { 1 } else { 3 };
        let descriptors =
            [(at, 16, 1, head + 1), (at + 0x1000, 512 * sectors, flags, head + 2), (at + 16, 1, 2, 0)];
        for (index, (at, length, flags, next)) in (head..).zip(descriptors) {
            let length = u32::try_from(length).unwrap();
            let flags: u16 = flags;
            let bytes =
                [&at.to_le_bytes()[..], &length.to_le_bytes(), &flags.to_le_bytes(), &next.to_le_bytes()];
            self.guest.store(DESC + 16 * u64::from(index), &bytes.concat());
        }
        self.guest.store(AVAIL + 4 + 2 * u64::from(self.available % SIZE), &head.to_le_bytes());
        self.available = self.available.wrapping_add(1);
        self.guest.store(AVAIL + 2, &self.available.to_le_bytes());
        assert!(self.guest.kick(), "kicks end in the kernel, backend or not");
    }

    /// Takes the used requests. A head that is not in flight was used twice.
    fn reap(&mut self) {
        let used = u16::from_le_bytes(self.guest.load(USED + 2, 2).try_into().unwrap());
        while self.used != used {
            let entry = self.guest.load(USED + 4 + 8 * u64::from(self.used % SIZE), 4);
            let head = u16::try_from(u32::from_le_bytes(entry.try_into().unwrap())).unwrap();
            let slot = head / 3;
            let done = self.pending.get_mut(usize::from(slot)).and_then(Option::take);
            let Some(Pending { block, sectors, writes }) = done else {
                panic!("head {head} was used twice, after {} requests", self.done);
            };
            let at = REQUESTS + u64::from(slot) * ROOM;
            assert_eq!(self.guest.load(at + 16, 1), [0], "status of the request");
            let first = block * usize::try_from(BLOCK).unwrap();
            let known = &mut self.disk[first..first + sectors];
            match writes {
                Some(number) => known.fill(number),
                None => {
                    let data = self.guest.load(at + 0x1000, 512 * sectors);
                    let expected: Vec<u8> = known.iter().flat_map(|number| sector(*number)).collect();
                    assert!(data == expected, "block {block} reads other than it was written");
                }
            }
            if self.order.front() != Some(&slot) {
                self.overtakings += 1;
            }
            self.order.retain(|other| *other != slot);
            self.busy[block] = false;
            self.free.push(slot);
            self.used = self.used.wrapping_add(1);
            self.done += 1;
        }
        self.guest.machine.take_interrupts();
    }

    /// Keeps the queue full until `count` more requests are done.
    fn run(&mut self, count: usize) {
        let goal = self.done + count;
        let mut last = (Instant::now(), self.done);
        while self.done < goal {
            self.submit();
            self.reap();
            if self.done > last.1 {
                last = (Instant::now(), self.done);
            }
            let waited = last.0.elapsed();
            assert!(waited < Duration::from_secs(15), "{:?} lost after {}", self.pending, self.done);
        }
    }

    /// Lets everything finish.
    fn settle(&mut self) {
        let begin = Instant::now();
        while self.pending.iter().any(Option::is_some) {
            self.reap();
            assert!(begin.elapsed() < Duration::from_secs(15), "{:?} lost after {}", self.pending, self.done);
        }
    }
}

fn reconnect(reconnect: &Reconnect, guest: &Guest, socket: &Path) {
    let begin = Instant::now();
    loop {
        let limits = Limits::new(Duration::from_secs(5));
        let connection = Connection::connect(socket, &limits);
        let attempt = connection.map_err(|error| ReconnectError::from(OpenError::from(error)));
        match attempt.and_then(|connection| reconnect.attempt(&guest.device.handle(), connection, drop)) {
            Ok(()) => return,
            Err(error) => {
                assert!(!error.is_final() && begin.elapsed() < Duration::from_secs(10), "{error:?}");
            }
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Kills the daemon `rounds` times with `slots` requests in flight. Returns the number of overtakings.
fn kill_under_load(name: &str, rounds: usize, slots: u16) -> Option<usize> {
    let mut daemon = Daemon::start(name)?;
    let opened = daemon.open(&order(""));
    let again = opened.reconnect.clone();
    let (guest, _channel, hang_up) = Guest::on_loss(opened, OnLoss::Recover);
    // The load's numbers begin at zero.
    let sectors = BLOCKS * usize::try_from(BLOCK).unwrap();
    std::fs::write(daemon.folder.join("disk"), vec![0; 512 * sectors]).unwrap();
    guest.start_driver_with(SIZE, [DESC, AVAIL, USED]);
    let mut load = Load::new(&guest, slots);
    let mut in_flight = 0;
    for round in 0..rounds {
        let pause = Duration::from_micros(u64::try_from(random(&mut load.seed, 20_000)).unwrap());
        let killed = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(pause);
                daemon.kill();
                killed.store(true, Ordering::Release);
            });
            while !killed.load(Ordering::Acquire) {
                load.submit();
                load.reap();
            }
        });
        let mut fds = [PollFd::new(&hang_up, PollFlags::IN)];
        assert_eq!(poll(&mut fds, Some(&Timespec { tv_sec: 5, tv_nsec: 0 })).unwrap(), 1);
        hang_up.take();
        assert_eq!(poll(&mut fds, Some(&Timespec::default())).unwrap(), 0, "told once");
        guest.device.handle().connection_ended();
        load.reap();
        in_flight += load.order.len();
        (0..round % 3 * usize::from(slots)).for_each(|_| load.submit());
        daemon.start_again();
        reconnect(&again, &guest, &daemon.folder.join("s"));
        guest.device.handle().connection_ended();
        assert_eq!(guest.device.handle().phase(), PhaseReport::Running, "round {round} {:?}", load.order);
    }
    load.run(100);
    load.settle();
    let stats = guest.device.handle().stats();
    assert_eq!(stats.recoveries, u64::try_from(rounds).unwrap());
    assert_eq!((stats.trapped.queue_notify, stats.trapped.interrupt_ack), (0, 0));
    println!("{name}: {} requests, {} overtakings, {in_flight} cut off", load.done, load.overtakings);
    Some(load.overtakings)
}

/// None of these backends has an inflight area.
#[test]
fn disk_that_is_killed_under_load_one_request_at_a_time_loses_nothing() {
    kill_under_load("kill-one", 10, 1);
}

#[test]
fn disk_that_is_killed_under_load_with_many_requests_loses_nothing() {
    if let Some(overtakings) = kill_under_load("kill-many", 40, 20) {
        assert!(overtakings > 0, "it finished everything in order, and so proves little");
    }
}

#[test]
#[ignore = "takes a minute: a soak"]
fn disk_that_is_killed_five_hundred_times_loses_nothing() {
    kill_under_load("kill-soak", 500, 20);
}

//! Against Open vSwitch with DPDK, which we did not write, by `tests/backends/fetch`: two machines at its ports, who listen, as
//! its ports of type `dpdkvhostuserclient` like it. It comes back after it was killed, and so do both sessions.

#![cfg(test)]

mod support;
#[path = "../../tests/src/switch.rs"]
#[allow(dead_code, unreachable_pub, reason = "the whole-machine tests use all of it")]
mod switch;

use std::time::{Duration, Instant};

use support::fetched::fetched;
use support::iommu::{BUFFERS_AT, FAR, Iommu, buffers, far};
use support::queue::{Part, Queue};
use support::{GuestMemory, Scratch, eventually};
use switch::{Programs, Switch};
use transport::peer::Limits;
use transport::peer::socket::Listener;
use transport::vhost_user::features::bit;
use transport::vhost_user::{
    BackendChannel, Connection, LiveSession, ProtocolFeatures, RingBase, RingSwitch, Wanted,
};

const VERSION_1: u64 = 1 << 32;
const MULTIQUEUE: u64 = 1 << 22;
const HEADER: usize = 12;
/// Buffers of each ring.
const BUFFERS: u16 = 8;
const BUFFER: u32 = 2048;
/// What is sent until the way is open.
const HELLO: u16 = u16::MAX;
const LIMIT: Duration = Duration::from_secs(60);

fn switch(scratch: &Scratch, options: &[&str]) -> Option<Switch> {
    Some(Switch::new(Programs::find(fetched)?, &scratch.0, options))
}

/// A machine at a port, its guest's memory and its rings: of each pair the first receives.
struct Machine {
    listener: Listener,
    memory: GuestMemory,
    queues: Vec<Queue>,
    /// Of each receiving ring, how many used entries were looked at.
    seen: Vec<u16>,
    address: [u8; 6],
    features: u64,
    live: Option<LiveSession>,
    iommu: Option<(Iommu, BackendChannel)>,
}

impl Machine {
    fn new(switch: &Switch, port: u16, pairs: u16, features: u64) -> Self {
        let iova = if features >> bit::ACCESS_PLATFORM & 1 == 1 { FAR } else { 0 };
        let queue = |n: u16| Queue::new(n, 0x1_0000 * u64::from(1 + n)).behind(iova);
        let mut machine = Self {
            listener: Listener::bind(&switch.port(port)).unwrap(),
            memory: GuestMemory::new(2 << 20),
            queues: (0..2 * pairs).map(queue).collect(),
            seen: vec![0; pairs.into()],
            address: [2, 0, 0, 0, 0, 1 + u8::try_from(port).unwrap()],
            features: VERSION_1 | features | if pairs > 1 { MULTIQUEUE } else { 0 },
            live: None,
            iommu: None,
        };
        for pair in 0..pairs {
            (0..BUFFERS).for_each(|slot| machine.provide(2 * pair, slot));
        }
        machine
    }

    fn buffer(ring: u16, slot: u16) -> u64 {
        BUFFERS_AT + 0x1_0000 * u64::from(ring) + u64::from(BUFFER) * u64::from(slot)
    }

    /// Gives a ring a buffer to receive into.
    fn provide(&mut self, ring: u16, slot: u16) {
        let part = Part::Write(Self::buffer(ring, slot), BUFFER);
        self.queues[usize::from(ring)].offer(&self.memory, slot, &[part]);
    }

    /// Waits for the switch to connect, and has it go on from where the rings say that they are.
    fn attach(&mut self) {
        let mut wanted = Wanted::default().and(ProtocolFeatures::RARP);
        if self.features >> bit::ACCESS_PLATFORM & 1 == 1 {
            wanted = wanted.adjust("+access_platform").unwrap();
        }
        let mut session =
            Connection::accept(&self.listener, &Limits::new(LIMIT)).unwrap().negotiate(&wanted).unwrap();
        let features = session.offered().accept(self.features).unwrap();
        assert!(session.protocol().contains(ProtocolFeatures::RARP));
        assert!(session.queue_num() >= u16::try_from(self.queues.len() / 2).unwrap());
        if features.has(bit::ACCESS_PLATFORM) {
            session = session.with_iova_map(far(&self.memory));
            self.iommu = Some((Iommu::of(&session), session.take_backend_channel().unwrap()));
        }
        let rings: Vec<_> =
            self.queues.iter().map(|queue| queue.ring(RingBase(queue.used(&self.memory).into()))).collect();
        self.live = Some(session.go_live(features, &self.memory.map, &rings).unwrap());
    }

    fn live(&mut self) -> &mut LiveSession {
        self.live.as_mut().unwrap()
    }

    /// Frame `number` of this machine to the one with this address; the higher the number, the longer.
    fn frame(&self, to: [u8; 6], number: u16) -> Vec<u8> {
        let mut frame = [&to, &self.address, &[0x88, 0xb5][..], &number.to_be_bytes()].concat();
        let length = 60 + usize::from(number) * 13 % 1400;
        frame.extend((frame.len()..length).map(|n| u8::try_from((n + usize::from(number)) % 251).unwrap()));
        frame
    }

    fn send(&mut self, pair: u16, frame: &[u8]) {
        let ring = 2 * pair + 1;
        let queue = &mut self.queues[usize::from(ring)];
        eventually("a frame is taken", LIMIT, || {
            queue.offered.wrapping_sub(queue.used(&self.memory)) < BUFFERS
        });
        let slot = queue.offered % BUFFERS;
        let at = Self::buffer(ring, slot);
        self.memory.write(at, &[&[0; HEADER], frame].concat());
        queue.offer(&self.memory, slot, &[Part::Read(at, u32::try_from(HEADER + frame.len()).unwrap())]);
        queue.kick.ring().unwrap();
    }

    /// What has come since the last time but for greetings, each with the ring it came by; misses are answered.
    fn received(&mut self) -> Vec<(u16, Vec<u8>)> {
        if let Some((iommu, channel)) = &mut self.iommu {
            drop(channel.serve(iommu));
        }
        let mut frames = Vec::new();
        for pair in 0..u16::try_from(self.seen.len()).unwrap() {
            let (ring, queue) = (2 * pair, &self.queues[usize::from(2 * pair)]);
            let (at, used) = (queue.used_ring() + 4, queue.used(&self.memory));
            while self.seen[usize::from(pair)] != used {
                let seen = &mut self.seen[usize::from(pair)];
                let entry = self.memory.read(at + 8 * u64::from(*seen % Queue::SIZE), 8);
                *seen = seen.wrapping_add(1);
                let word = |n: usize| u32::from_le_bytes(entry[n..n + 4].try_into().unwrap());
                let (slot, length) = (u16::try_from(word(0)).unwrap(), usize::try_from(word(4)).unwrap());
                let frame = self.memory.read(Self::buffer(ring, slot) + HEADER as u64, length - HEADER);
                if frame[14..16] != HELLO.to_be_bytes() {
                    frames.push((ring, frame));
                }
                self.provide(ring, slot);
            }
        }
        frames
    }
}

/// Sends greetings until one arrives: a port that is not ready yet drops them, and so does one that waits for a translation.
fn meet(from: &mut Machine, to: &mut Machine) {
    let hello = from.frame(to.address, HELLO);
    let begun = Instant::now();
    let before = to.seen.clone();
    while to.seen == before {
        assert!(begun.elapsed() < LIMIT, "nothing crosses the switch");
        from.send(0, &hello);
        let sent = Instant::now();
        while to.seen == before && sent.elapsed() < Duration::from_millis(50) {
            assert_eq!((from.received(), to.received()), (vec![], vec![]));
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// Sends frames by each pair in turn, all of which must arrive in order and unchanged; gives the rings that they came by.
fn cross(from: &mut Machine, to: &mut Machine, count: u16) -> Vec<u16> {
    let pairs = u16::try_from(from.seen.len()).unwrap();
    let mut rings = Vec::new();
    for number in 0..count {
        let frame = from.frame(to.address, number);
        from.send(number % pairs, &frame);
        let begun = Instant::now();
        let mut came = Vec::new();
        while came.is_empty() {
            assert!(begun.elapsed() < LIMIT, "frame {number} does not arrive");
            std::thread::sleep(Duration::from_micros(200));
            came = to.received();
            assert_eq!(from.received(), vec![], "to whom it was not sent");
        }
        let [(ring, came)] = &came[..] else { panic!("{} frames instead of {number}", came.len()) };
        assert!(*came == frame, "frame {number} differs");
        rings.push(*ring);
    }
    rings
}

/// A switch that connected to both machines, and lets through what they send.
fn connected(switch: &mut Switch, machines: &mut [Machine; 2]) {
    switch.start();
    let begun = Instant::now();
    machines.iter_mut().for_each(Machine::attach);
    let [left, right] = machines;
    meet(left, right);
    meet(right, left);
    println!("{:?} until both ways are open", begun.elapsed());
}

#[test]
fn frames_cross_a_switch_that_connects_and_comes_back_after_it_was_killed() {
    let scratch = Scratch::new();
    let Some(mut switch) = switch(&scratch, &[]) else { return };
    let mut machines = [0, 1].map(|port| Machine::new(&switch, port, 1, 0));
    for round in 0..3 {
        connected(&mut switch, &mut machines);
        let [left, right] = &mut machines;
        assert_eq!(cross(left, right, 100), [0; 100], "round {round}");
        assert_eq!(cross(right, left, 100), [0; 100], "round {round}");
        // The other machine sees what the switch is told for this one. Frame type RARP, from the address of which it tells.
        left.live().send_rarp([2, 0, 0, 0, 0, 9]).unwrap();
        let mut came = Vec::new();
        eventually("the address is announced", LIMIT, || {
            came = right.received();
            !came.is_empty()
        });
        assert_eq!((came.len(), &came[0].1[6..14]), (1, &[2, 0, 0, 0, 0, 9, 0x80, 0x35][..]), "{came:?}");
        switch.kill();
        for machine in [left, right] {
            assert!(machine.live().switch_rings(&[0], RingSwitch::Enabled).unwrap_err().is_fatal());
            machine.live = None;
        }
        // What is sent while nobody is there waits: the next one takes it.
        let [left, right] = &mut machines;
        let frame = left.frame(right.address, HELLO);
        (0..BUFFERS / 2).for_each(|_| left.send(0, &frame));
        assert_eq!(left.queues[1].offered - left.queues[1].used(&left.memory), BUFFERS / 2);
    }
}

#[test]
fn two_pairs_of_rings_are_both_served_and_one_that_is_switched_off_is_left_alone() {
    let scratch = Scratch::new();
    let Some(mut switch) = switch(&scratch, &[]) else { return };
    let mut machines = [0, 1].map(|port| Machine::new(&switch, port, 2, 0));
    connected(&mut switch, &mut machines);
    let [left, right] = &mut machines;
    assert!(left.live().session().queue_num() >= 2);
    let by_all = cross(left, right, 100);
    println!("by the rings {:?}", [0, 2].map(|ring| by_all.iter().filter(|other| **other == ring).count()));
    // Its one thread has one ring to send into, which it changes when that is switched off.
    let (used, other) = if by_all.contains(&0) { (0, 2) } else { (2, 0) };
    right.live().switch_rings(&[used], RingSwitch::Disabled).unwrap();
    meet(left, right);
    assert_eq!(cross(left, right, 100), [other; 100]);
    right.live().switch_rings(&[used], RingSwitch::Enabled).unwrap();
    cross(right, left, 100);
    let (_, bases) = right.live.take().unwrap().stop().unwrap();
    let reached: Vec<_> =
        right.queues.iter().map(|queue| RingBase(queue.used(&right.memory).into())).collect();
    assert_eq!(bases, reached);
}

#[test]
fn behind_an_iommu_the_switch_asks_for_what_it_misses() {
    let scratch = Scratch::new();
    let Some(mut switch) = switch(&scratch, &["vhost-iommu-support=true"]) else { return };
    let mut machines = [0, 1].map(|port| Machine::new(&switch, port, 1, 1 << bit::ACCESS_PLATFORM));
    connected(&mut switch, &mut machines);
    let [left, right] = &mut machines;
    cross(left, right, 50);
    let misses = |machine: &Machine| machine.iommu.as_ref().unwrap().0.misses.get();
    let told = misses(right);
    // What is taken back is asked for again.
    right.live().revoke(&buffers()).unwrap();
    meet(left, right);
    cross(left, right, 50);
    println!("{told} misses before the translation was taken back, {} after", misses(right) - told);
    assert!(misses(right) > told, "it went on with a translation that was taken back");
}

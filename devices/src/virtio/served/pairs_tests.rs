use super::*;
use crate::virtio::types::table::{CTRL_VQ, MQ};

use std::time::Duration;

use transport::peer::Limits;
use transport::testing::{Act, Offer, Script, ScriptedBackend};
use transport::vhost_user::request::Request;
use transport::vhost_user::{Connection, ProtocolFeatures};

use crate::virtio::backend::vhost_user::Order;
use crate::virtio::backend::vhost_user::tests::Guest;
use crate::virtio::recovery::candidate::{Opened, open};
use crate::virtio::types::model::Wishes;
use crate::virtio::types::table::DeviceType;
use crate::virtio::{OnLoss, PhaseReport};

const BOTH: u32 = 1 << CTRL_VQ | 1 << MQ;
const SIZE: u16 = 8;
/// The control queue of a card with two pairs.
const CONTROL: u16 = 4;

#[test]
fn rings_follow_what_the_driver_says_and_nonsense_changes_nothing() {
    let mut pairs = Pairs::of(9);
    let idle = |pairs: &mut Pairs| {
        assert_eq!(pairs.take_idle(), None, "nothing has started");
        pairs.started();
        pairs.take_idle().unwrap()
    };
    assert_eq!(idle(&mut pairs), 2..8);
    assert_eq!(pairs.asked(&[4, 0, 3, 0]), Some(3));
    assert_eq!(pairs.step(3), (2..6, RingSwitch::Enabled));
    pairs.use_pairs(3);
    assert_eq!(idle(&mut pairs), 6..8);
    let nonsense =
        [&[4, 0, 0, 0][..], &[4, 0, 5, 0], &[4, 0, 0, 1], &[4, 1, 1, 0], &[0, 0, 1, 0], &[4, 0, 1], &[]];
    for request in nonsense {
        assert_eq!(pairs.asked(request), None, "{request:?}");
    }
    assert_eq!(pairs.step(3), (6..6, RingSwitch::Disabled));
    assert_eq!(pairs.step(2), (4..6, RingSwitch::Disabled));
    pairs.reset();
    assert_eq!(idle(&mut pairs), 2..8);
}

fn offer(features: u32, pairs: u64) -> Offer {
    let offer = Offer::default();
    let protocol = offer.protocol.without(ProtocolFeatures::CONFIG);
    Offer { features: offer.features | u64::from(features) | 1 << 34, protocol, queue_num: pairs, ..offer }
}

fn order(queues: u16) -> Order {
    let wishes = Wishes { queues: Some(queues), ..Wishes::default() };
    Order::new(DeviceType::named("net").unwrap(), wishes, "").unwrap()
}

fn connect(offer: Offer, script: Script) -> (ScriptedBackend, Connection) {
    let (backend, socket) = ScriptedBackend::pair(offer, script).unwrap();
    let limits = Limits::new(Duration::from_secs(5));
    (backend, Connection::from_stream(socket, "scripted", &limits).unwrap())
}

fn card(script: Script) -> (ScriptedBackend, Opened) {
    let (backend, connection) = connect(offer(BOTH, 2), script);
    (backend, open(connection, &order(4)).unwrap())
}

/// The guest address of a queue's descriptors. The available and the used ring follow, each one page further
/// on.
fn place(queue: u16) -> u64 {
    0x1_0000 + 0x4000 * u64::from(queue)
}

/// Starts a driver with these features and this number of queues.
fn start(guest: &Guest, features: u32, queues: u16) {
    for status in [0, 1, 3] {
        guest.write(0x70, status);
    }
    for (half, features) in [(1, 1), (0, features)] {
        guest.write(0x24, half);
        guest.write(0x20, features);
    }
    guest.write(0x70, 0xb);
    for queue in 0..queues {
        guest.store(place(queue), &[0; 0x3000]);
        guest.write(0x30, queue.into());
        guest.write(0x38, SIZE.into());
        for (offset, page) in [0x80, 0x90, 0xa0].into_iter().zip([0, 0x1000, 0x2000]) {
            guest.write(offset, u32::try_from(place(queue) + page).unwrap());
        }
        guest.write(0x44, 1);
    }
    guest.write(0x70, 0xf);
}

/// Serves the control queue as the control loop does, as long as its kick rings.
fn serve(guest: &Guest) {
    let handle = guest.device.handle();
    let kicks = handle.kicks_to_serve().unwrap();
    let [(CONTROL, kick)] = kicks.as_slice() else { panic!("the last queue's kick alone") };
    handle.serve_kick(CONTROL);
    while kick.take().unwrap() > 0 {
        handle.serve_kick(CONTROL);
    }
}

/// Asks for `pairs` pairs and returns the answer. `number` counts the requests from 0.
fn ask(guest: &Guest, number: u16, pairs: u16) -> u8 {
    ask_at(guest, CONTROL, number, pairs)
}

/// Like `ask`, on this queue.
fn ask_at(guest: &Guest, queue: u16, number: u16, pairs: u16) -> u8 {
    let at = place(queue);
    guest.store(at + 0x3000, &[&SET_PAIRS[..], &pairs.to_le_bytes(), &[0xff]].concat());
    let descriptor = |index: u64, offset: u64, length: u32, flags: u16| {
        let bytes =
            [&(at + 0x3000 + offset).to_le_bytes()[..], &length.to_le_bytes(), &flags.to_le_bytes(), &[1, 0]];
        guest.store(at + 16 * index, &bytes.concat());
    };
    descriptor(0, 0, 4, 1);
    descriptor(1, 4, 1, 2);
    guest.store(at + 0x1000 + 4 + 2 * u64::from(number % SIZE), &[0, 0]);
    guest.store(at + 0x1000 + 2, &(number + 1).to_le_bytes());
    serve(guest);
    assert_eq!(guest.load(at + 0x2000 + 2, 2), (number + 1).to_le_bytes());
    guest.load(at + 0x3004, 1)[0]
}

/// The rings that were switched, and how, in order.
fn switched(backend: &ScriptedBackend) -> Vec<(u8, u8)> {
    let seen = backend.seen().into_iter().filter(|seen| seen.request == Request::SET_VRING_ENABLE);
    seen.map(|seen| (seen.payload[0], seen.payload[4])).collect()
}

const STARTED: [(u8, u8); 6] = [(0, 1), (1, 1), (2, 1), (3, 1), (2, 0), (3, 0)];

#[test]
fn driver_has_as_many_rings_served_as_it_asks_for() {
    let (backend, opened) = card(Script::normal());
    assert_eq!((opened.model.queues, opened.model.config[8]), (5, 2));
    assert_eq!(
        opened.model.features.bits() & (1 << 34 | u64::from(BOTH)),
        u64::from(BOTH),
        "no packed rings"
    );
    let (guest, _channel, _hang_up) = Guest::new(opened);
    start(&guest, BOTH, 5);
    assert_eq!(switched(&backend), STARTED[..4], "no more than the start on the vCPU");
    serve(&guest);
    assert_eq!(switched(&backend), STARTED, "a driver uses one pair until it says more");
    assert_eq!(ask(&guest, 0, 2), OK);
    assert_eq!(switched(&backend)[6..], [(2, 1), (3, 1)]);
    assert_eq!(ask(&guest, 1, 3), ERROR);
    assert_eq!(ask(&guest, 2, 2), OK);
    assert_eq!(ask(&guest, 3, 1), OK);
    assert_eq!(switched(&backend)[8..], [(2, 0), (3, 0)]);
    assert_eq!(ask(&guest, 4, 2), OK);
    assert_eq!(ask(&guest, 5, 1), OK);
    // Queues that stop briefly for a change of memory are switched again as they were.
    let before = switched(&backend).len();
    guest.device.handle().change_memory(guest.ram()).unwrap();
    serve(&guest);
    assert_eq!(switched(&backend)[before..], STARTED);
    // The next driver begins with one again.
    assert_eq!(ask(&guest, 6, 2), OK);
    let before = switched(&backend).len();
    start(&guest, BOTH, 5);
    serve(&guest);
    assert_eq!(switched(&backend)[before..], STARTED);
    // Nothing is switched for a driver that knows of only one pair.
    start(&guest, 0, 2);
    serve(&guest);
    assert_eq!(switched(&backend)[before + 6..], [(0, 1), (1, 1)]);
    assert_eq!((guest.device.handle().phase(), backend.breaches()), (PhaseReport::Running, vec![]));
}

#[test]
fn driver_that_takes_the_control_queue_alone_finds_it_behind_one_pair() {
    let (backend, opened) = card(Script::normal());
    let (guest, _channel, _hang_up) = Guest::new(opened);
    let handle = guest.device.handle();
    start(&guest, 1 << CTRL_VQ, 3);
    assert_eq!(handle.phase(), PhaseReport::Running);
    assert_eq!(switched(&backend), [(0, 1), (1, 1)], "the backend has no ring 2");
    let kicks = handle.kicks_to_serve().unwrap();
    kicks[0].1.take().unwrap();
    assert!(guest.machine.guest_writes(0xd000_0050, 2));
    assert_eq!(kicks[0].1.take().unwrap(), 1, "its kicks come to us");
    guest.machine.take_interrupts();
    assert_eq!(ask_at(&guest, 2, 0, 2), ERROR, "the driver did not take several pairs");
    assert_eq!(guest.machine.take_interrupts(), 1);
    assert_eq!(switched(&backend).len(), 2);
    // For the next driver, the queue is a ring of the backend again.
    start(&guest, BOTH, 5);
    kicks[0].1.take().unwrap();
    assert!(guest.machine.guest_writes(0xd000_0050, 2));
    assert_eq!(kicks[0].1.take().unwrap(), 0);
    assert_eq!(ask(&guest, 0, 2), OK);
    assert_eq!((handle.phase(), backend.breaches()), (PhaseReport::Running, vec![]));
}

#[test]
fn next_backend_serves_the_rings_that_the_driver_uses() {
    let (first, opened) = card(Script::normal());
    let mut backends = vec![first];
    let reconnect = opened.reconnect.clone();
    let (guest, _channel, _hang_up) = Guest::on_loss(opened, OnLoss::Recover);
    let mut comes_back = |expected: &[(u8, u8)]| {
        let (next, connection) = connect(offer(BOTH, 2), Script::normal());
        reconnect.attempt(&guest.device.handle(), connection, drop).unwrap();
        serve(&guest);
        assert_eq!(switched(&next), expected);
        backends.push(next);
    };
    let lose = || guest.device.handle().peer_lost("it crashed");
    start(&guest, BOTH, 5);
    assert_eq!(ask(&guest, 0, 2), OK);
    lose();
    comes_back(&STARTED[..4]);
    // The control queue continues at its position, and does not wait for a backend.
    assert_eq!(ask(&guest, 1, 1), OK);
    lose();
    comes_back(&STARTED);
    lose();
    assert_eq!(ask(&guest, 2, 2), OK);
    comes_back(&STARTED[..4]);
    lose();
    start(&guest, BOTH, 5);
    assert_eq!(ask(&guest, 0, 2), OK);
    start(&guest, BOTH, 5);
    comes_back(&STARTED);
}

#[test]
fn backend_that_dies_of_a_switch_leaves_the_driver_with_an_answer() {
    let (_backend, opened) = card(Script::normal().on_nth(Request::SET_VRING_ENABLE, 7, Act::Close));
    let (guest, _channel, _hang_up) = Guest::new(opened);
    start(&guest, BOTH, 5);
    assert_eq!(ask(&guest, 0, 2), ERROR);
    let handle = guest.device.handle();
    assert!(matches!(handle.phase(), PhaseReport::Broken(_)));
    // This stays so until the driver resets the device.
    let kicks = handle.kicks_to_serve().unwrap();
    let [(CONTROL, kick)] = kicks.as_slice() else { panic!("the last queue's kick alone") };
    assert_eq!(kick.take().unwrap(), 0);
    guest.write(0x50, 0);
    guest.write(0x50, CONTROL.into());
    assert_eq!(kick.take().unwrap(), 1, "whoever watches is woken");
    assert_eq!(ask(&guest, 1, 2), ERROR);
    guest.write(0x70, 0);
    let before = guest.load(place(CONTROL) + 0x2002, 2);
    guest.store(place(CONTROL) + 0x1002, &3_u16.to_le_bytes());
    handle.serve_kick(CONTROL);
    assert_eq!(guest.load(place(CONTROL) + 0x2002, 2), before, "rings of a driver that is gone");
}

#[test]
fn card_whose_backend_has_one_pair_has_no_control_queue() {
    for (features, pairs) in [(0, 2), (1 << MQ, 2), (1 << CTRL_VQ, 2), (BOTH, 1)] {
        let (_backend, connection) = connect(offer(features, pairs), Script::normal());
        let model = open(connection, &order(4)).unwrap().model;
        let queues = u16::try_from(2 * pairs).unwrap();
        assert_eq!(
            (model.queues, model.features.bits() & u64::from(BOTH)),
            (queues, 0),
            "{features:#x} {pairs}"
        );
    }
    for (queues, shown) in [(2, 2), (3, 3), (5, 5), (6, 7), (256, 255)] {
        let (_backend, connection) = connect(offer(BOTH, 128), Script::normal());
        assert_eq!(open(connection, &order(queues)).unwrap().model.queues, shown, "{queues}");
    }
}

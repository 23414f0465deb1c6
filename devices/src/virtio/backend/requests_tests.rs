use super::*;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use transport::memory::{GuestAddr, USER_BIAS};
use transport::peer::Limits;
use transport::testing::{Offer, Script, ScriptedBackend};
use transport::vhost_user::features::bit;
use transport::vhost_user::request::BackendRequest;
use transport::vhost_user::request::Request;
use transport::vhost_user::{BackendRequests, Connection, ProtocolFeatures, Served};
use zerocopy::IntoBytes;

use crate::testing::memory;
use crate::virtio::PhaseReport;
use crate::virtio::backend::vhost_user::tests::{Guest, eventually, order};
use crate::virtio::backend::vhost_user::{OpenError, Order};
use crate::virtio::recovery::candidate::{Opened, open};
use crate::virtio::ring::address::Iommu;

const LIMIT: Duration = Duration::from_secs(5);

fn connect(offer: Offer, order: &Order) -> (ScriptedBackend, Result<Opened, OpenError>) {
    let (backend, socket) = ScriptedBackend::pair(offer, Script::normal()).unwrap();
    let connection = Connection::from_stream(socket, "scripted", &Limits::new(LIMIT)).unwrap();
    (backend, open(connection, order))
}

/// Serves the channel as the machine does.
struct Asked<'a>(&'a Answers);

impl BackendRequests for Asked<'_> {
    fn config_changed(&self) {}

    fn iotlb(&self, message: Iotlb) -> Result<(), Refused> {
        self.0.iotlb(&message)
    }

    fn vring_call(&self, ring: u32) -> Result<(), Refused> {
        self.0.vring_call(ring)
    }
}

/// Lets the backend send a request. Returns the answer's code and the number of descriptors in it.
fn ask(
    own: &mut OwnChannel,
    backend: &ScriptedBackend,
    request: BackendRequest,
    payload: &[u8],
) -> (u64, usize) {
    backend.request(request, payload, &[]).unwrap();
    eventually("the request", || {
        !matches!(own.channel.serve(&Asked(&own.answers)).unwrap(), Served::Requests(0))
    });
    backend.answer(LIMIT).unwrap()
}

fn behind_iommu() -> (ScriptedBackend, Guest, OwnChannel) {
    let offer = Offer::default();
    let features = offer.features | 1 << bit::ACCESS_PLATFORM;
    let order = order("").behind(Arc::new(Iommu::Shuffled.map(&memory())));
    let (backend, opened) = connect(Offer { features, ..offer }, &order);
    let (guest, channel, _hang_up) = Guest::new(opened.unwrap());
    guest.takes_high.store(3, Ordering::Relaxed);
    (backend, guest, channel.unwrap())
}

fn iotlb(backend: &ScriptedBackend) -> Vec<(bool, Vec<u8>)> {
    let seen = backend.seen().into_iter().filter(|seen| seen.request == Request::IOTLB_MSG);
    seen.map(|seen| (seen.asked, seen.payload)).collect()
}

const MIB: u64 = 1 << 20;

fn miss(iova: u64) -> Vec<u8> {
    Iotlb { iova, size: 0, user: 0, permission: 3, kind: 1, padding: [0; 6] }.as_bytes().to_vec()
}

fn message(iova: u64, size: u64, user: u64, permission: u8, kind: u8) -> Vec<u8> {
    Iotlb { iova, size, user, permission, kind, padding: [0; 6] }.as_bytes().to_vec()
}

#[test]
fn behind_an_iommu_misses_are_answered_while_the_queues_run_and_taken_back_when_they_stop() {
    let (backend, guest, mut own) = behind_iommu();
    assert_eq!(ask(&mut own, &backend, BackendRequest::IOTLB_MSG, &miss(0)), (1, 0), "nothing runs yet");
    guest.start_driver();
    assert_eq!(guest.device.handle().phase(), PhaseReport::Running);
    let pieces = [message(0, 2 * MIB, USER_BIAS + 2 * MIB, 3, 2), message(2 * MIB, 2 * MIB, USER_BIAS, 3, 2)];
    assert_eq!(iotlb(&backend), pieces.clone().map(|piece| (true, piece)), "announced");

    // The answer comes even while another thread holds the device's lock.
    let answered = guest.device.handle().with(|_| {
        let answered = ask(&mut own, &backend, BackendRequest::IOTLB_MSG, &miss(2 * MIB + 5));
        eventually("the update", || iotlb(&backend).len() == 3);
        answered
    });
    assert_eq!(answered, (0, 0));
    assert_eq!(iotlb(&backend)[2], (false, pieces[1].clone()), "nobody waits for an acknowledgement");
    assert_eq!(ask(&mut own, &backend, BackendRequest::IOTLB_MSG, &miss(4 * MIB)), (1, 0), "outside memory");
    let failed = message(0, 0, 0, 3, 4);
    assert_eq!(ask(&mut own, &backend, BackendRequest::IOTLB_MSG, &failed), (1, 0), "no miss");

    guest.write(0x70, 0);
    assert_eq!(
        iotlb(&backend)[3..],
        [(true, message(0, 4 * MIB, 0, 0, 3))],
        "taken back, touching ones as one"
    );
    assert_eq!(ask(&mut own, &backend, BackendRequest::IOTLB_MSG, &miss(0)), (1, 0));
    guest.start_driver();
    assert_eq!(ask(&mut own, &backend, BackendRequest::IOTLB_MSG, &miss(0)), (0, 0));
    assert_eq!(backend.breaches(), Vec::<String>::new());
}

#[test]
fn behind_an_iommu_rings_are_where_the_translations_lead() {
    let (backend, guest, _own) = behind_iommu();
    // The last page of the first piece and the first page of the second piece are not adjacent in guest
    // memory.
    guest.start_driver_with(16, [2 * MIB - 0x1000, 0x2000, 0x3000]);
    assert_eq!(guest.device.handle().phase(), PhaseReport::Running);
    let address = backend.seen().into_iter().find(|seen| seen.request == Request::SET_VRING_ADDR).unwrap();
    assert_eq!(address.payload[8..16], (2 * MIB - 0x1000).to_ne_bytes(), "told as the driver gave it");
    guest.start_driver_with(256, [2 * MIB - 0x800, 0x2000, 0x3000]);
    assert!(matches!(guest.device.handle().phase(), PhaseReport::NeedsReset(_)), "across two pieces");
    let map = Iommu::Shuffled.map(&memory());
    let space = crate::virtio::ring::address::Space { memory: &memory(), translations: Some(&map) };
    assert_eq!(space.guest(GuestAddr(0), 1), Some(GuestAddr(2 * MIB)));
}

#[test]
fn driver_that_takes_no_translations_goes_without_them() {
    let (backend, guest, mut own) = behind_iommu();
    guest.takes_high.store(1, Ordering::Relaxed);
    guest.start_driver();
    assert_eq!(guest.device.handle().phase(), PhaseReport::Running);
    assert!(iotlb(&backend).is_empty());
    assert_eq!(ask(&mut own, &backend, BackendRequest::IOTLB_MSG, &miss(0)), (1, 0));
}

#[test]
fn backend_without_what_an_iommu_needs_is_refused() {
    let default = Offer::default();
    let with = default.features | 1 << bit::ACCESS_PLATFORM;
    let no_acks = default.protocol.without(ProtocolFeatures::REPLY_ACK);
    for offer in [default.clone(), Offer { features: with, protocol: no_acks, ..default }] {
        let (_backend, opened) = connect(offer, &order("").behind(Arc::new(Iommu::Identity.map(&memory()))));
        let error = opened.err().unwrap();
        assert!(matches!(error, OpenError::Unfit { .. }) && error.hint().is_some(), "{error}");
    }
}

#[test]
fn notifications_by_message_are_passed_on_in_both_directions() {
    let offer = Offer::default();
    let protocol = offer.protocol.with(ProtocolFeatures::INBAND_NOTIFICATIONS);
    // In-band notifications are only used on request, as they put us on the path of every request.
    let (_backend, opened) = connect(Offer { protocol, ..offer.clone() }, &order(""));
    let (guest, _channel, _hang_up) = Guest::new(opened.unwrap());
    assert!(guest.device.handle().kicks_to_serve().unwrap().is_empty());

    let (backend, opened) = connect(Offer { protocol, ..offer.clone() }, &order("+inband_notifications"));
    let opened = opened.unwrap();
    let reconnect = opened.reconnect.clone();
    let (guest, channel, _hang_up) = Guest::on_loss(opened, crate::virtio::OnLoss::Recover);
    let (handle, mut own) = (guest.device.handle(), channel.unwrap());
    guest.start_driver();
    let said = |request| backend.seen().iter().filter(|seen| seen.request == request).count();
    assert_eq!((said(Request::SET_VRING_KICK), said(Request::SET_VRING_CALL)), (0, 0), "no eventfds");
    assert_eq!(said(Request::VRING_KICK), 1, "which starts the ring");
    let queues: Vec<_> = handle.kicks_to_serve().unwrap().into_iter().map(|(queue, _)| queue).collect();
    assert_eq!(queues, [0, 1]);
    assert!(guest.kick(), "the guest's kick still ends in the kernel");
    handle.serve_kick(0);
    assert_eq!(said(Request::VRING_KICK), 2);

    guest.machine.take_interrupts();
    let call = |ring: u32| [ring.to_ne_bytes(), 0_u32.to_ne_bytes()].concat();
    assert_eq!(ask(&mut own, &backend, BackendRequest::VRING_CALL, &call(0)), (0, 0));
    assert_eq!(guest.machine.take_interrupts(), 1);
    for beyond in [2, 256, u32::MAX] {
        assert_eq!(ask(&mut own, &backend, BackendRequest::VRING_CALL, &call(beyond)), (1, 0), "{beyond}");
    }
    assert_eq!(guest.machine.take_interrupts(), 0);
    guest.write(0x70, 0);
    handle.serve_kick(0);
    assert_eq!((said(Request::VRING_KICK), backend.breaches()), (2, vec![]), "nothing runs");

    // A second backend that wants eventfds would get no kicks, as our thread reads them.
    guest.start_driver();
    handle.peer_lost("it crashed");
    let (_second, socket) = ScriptedBackend::pair(offer, Script::normal()).unwrap();
    let connection = Connection::from_stream(socket, "second", &Limits::new(LIMIT)).unwrap();
    let error = reconnect.attempt(&handle, connection, drop).err().unwrap();
    assert!(error.is_final() && matches!(handle.phase(), PhaseReport::Broken(_)), "{error}");
}

#[test]
fn channel_of_a_lost_backend_has_no_power_though_its_end_stays_open() {
    let protocol = Offer::default().protocol.with(ProtocolFeatures::INBAND_NOTIFICATIONS);
    let offer = Offer { protocol, ..Offer::default() };
    let (backend, opened) = connect(offer, &order("+inband_notifications"));
    let (guest, channel, _hang_up) = Guest::new(opened.unwrap());
    let mut own = channel.unwrap();
    guest.start_driver();
    let call = [0_u32.to_ne_bytes(), 0_u32.to_ne_bytes()].concat();
    assert_eq!(ask(&mut own, &backend, BackendRequest::VRING_CALL, &call), (0, 0));
    // A request that it has sent already has no effect either.
    backend.request(BackendRequest::VRING_CALL, &call, &[]).unwrap();
    guest.device.handle().peer_lost("its main connection ended");
    guest.machine.take_interrupts();
    let OwnChannel { channel, answers } = &mut own;
    while !matches!(channel.serve(&Asked(answers)), Ok(Served::HungUp) | Err(_)) {}
    assert_eq!(guest.machine.take_interrupts(), 0);
}

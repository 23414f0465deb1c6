use super::*;

use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::Ordering;

use transport::peer::Limits;
use transport::testing::{Act, Offer, Script, ScriptedBackend};
use transport::vhost_user::Connection;
use transport::vhost_user::request::Request;

use crate::virtio::backend::vhost_user::OpenError;
use crate::virtio::backend::vhost_user::tests::Guest;
use crate::virtio::recovery::candidate::{Opened, open};
use crate::virtio::{OnLoss, PhaseReport};

const LIMIT: Duration = Duration::from_secs(5);

fn connect(offer: Offer, script: Script, order: &Order) -> (ScriptedBackend, Result<Opened, OpenError>) {
    let (backend, socket) = ScriptedBackend::pair(offer, script).unwrap();
    let connection = Connection::from_stream(socket, "scripted", &Limits::new(LIMIT)).unwrap();
    (backend, open(connection, order))
}

/// A network backend without a configuration, with these additional features.
fn net_offer(features: u64, protocol: ProtocolFeatures) -> Offer {
    let offer = Offer::default();
    let config = ProtocolFeatures::CONFIG.with(ProtocolFeatures::MQ);
    Offer {
        features: offer.features | features,
        protocol: offer.protocol.without(config).with(protocol),
        ..offer
    }
}

fn net(mtu: u16) -> Order {
    let net = DeviceType::named("net").unwrap().with_mtu(mtu).unwrap();
    Order::new(net, Wishes::default(), "").unwrap()
}

fn payloads(backend: &ScriptedBackend, request: Request) -> Vec<Vec<u8>> {
    let seen = backend.seen().into_iter().filter(|seen| seen.request == request);
    seen.map(|seen| seen.payload).collect()
}

#[test]
fn mtu_of_the_user_goes_to_the_backend_and_to_the_guest() {
    let (backend, opened) = connect(net_offer(1 << 3, ProtocolFeatures::MTU), Script::normal(), &net(9000));
    let model = opened.unwrap().model;
    assert_eq!(payloads(&backend, Request::NET_SET_MTU), [9000_u64.to_ne_bytes()]);
    assert_eq!((model.config.get(10..12), model.features.has(3)), (Some(&9000_u16.to_le_bytes()[..]), true));
    // A backend that cannot be told the address learns it from the guest's frames.
    let (backend, opened) = connect(net_offer(1 << 3, ProtocolFeatures::NONE), Script::normal(), &net(1400));
    assert!(opened.unwrap().model.features.has(3) && payloads(&backend, Request::NET_SET_MTU).is_empty());
    let (_, opened) = connect(net_offer(0, ProtocolFeatures::MTU), Script::normal(), &net(1400));
    assert!(matches!(opened, Err(OpenError::Unfit { .. })));
    // The user did not ask for it, and a field without a configuration is not shown.
    let order = Order::new(DeviceType::named("net").unwrap(), Wishes::default(), "").unwrap();
    let (backend, opened) = connect(net_offer(1 << 3, ProtocolFeatures::MTU), Script::normal(), &order);
    assert!(!opened.unwrap().model.features.has(3) && payloads(&backend, Request::NET_SET_MTU).is_empty());
    assert!(DeviceType::named("net").unwrap().with_mtu(67).is_err());
    assert!(DeviceType::named("blk").unwrap().with_mtu(1500).is_err());
}

#[test]
fn address_of_the_user_goes_to_the_guest_and_the_backend_is_not_told_of_the_feature() {
    let mac = [2, 0, 0, 0, 0, 9];
    let card = DeviceType::named("net").unwrap().with_mac(mac).unwrap();
    let order = Order::new(card, Wishes::default(), "").unwrap();
    let (backend, opened) = connect(net_offer(0, ProtocolFeatures::RARP), Script::normal(), &order);
    let opened = opened.unwrap();
    assert_eq!((opened.model.config.get(..6), opened.model.features.has(5)), (Some(&mac[..]), true));
    let reconnect = opened.reconnect.clone();
    let (guest, _channel, _hang_up) = Guest::on_loss(opened, OnLoss::Recover);
    guest.takes.store(1 << 5, Ordering::Relaxed);
    guest.start_driver();
    assert_eq!(backend.breaches(), Vec::<String>::new());
    // The guest's address is announced again where the next backend is.
    let handle = guest.device.handle();
    handle.peer_lost("it crashed");
    let offer = net_offer(0, ProtocolFeatures::RARP);
    let (second, socket) = ScriptedBackend::pair(offer, Script::normal()).unwrap();
    let connection = Connection::from_stream(socket, "second", &Limits::new(LIMIT)).unwrap();
    reconnect.attempt(&handle, connection, drop).unwrap();
    assert_eq!(payloads(&second, Request::SEND_RARP), [[2, 0, 0, 0, 0, 9, 0, 0]]);
    for backend in [backend, second] {
        let told = payloads(&backend, Request::SET_FEATURES);
        let told = told.iter().map(|bits| u64::from_ne_bytes(bits[..].try_into().unwrap()));
        assert!(told.clone().count() > 0 && told.fold(0, |all, bits| all | bits) & 1 << 5 == 0);
        assert_eq!(backend.breaches(), Vec::<String>::new());
    }
    // The user's address replaces the backend's.
    let mut offer = net_offer(1 << 5, ProtocolFeatures::CONFIG);
    offer.config = vec![7; 24];
    let (_, opened) = connect(offer, Script::normal(), &order);
    assert_eq!(opened.unwrap().model.config.get(..7), Some(&[2, 0, 0, 0, 0, 9, 7][..]));
    assert!(DeviceType::named("net").unwrap().with_mac([1, 0, 0, 0, 0, 9]).is_err());
    assert!(DeviceType::named("blk").unwrap().with_mac(mac).is_err());
}

#[test]
fn address_is_announced_after_a_take_over_where_backend_and_guest_leave_that_to_us() {
    let mac = [2, 0, 0, 0, 0, 9];
    let config = ProtocolFeatures::CONFIG.with(ProtocolFeatures::RARP);
    let mut offer = net_offer(1 << 5, config);
    offer.config = [&mac[..], &[0; 18]].concat();
    let order = Order::new(DeviceType::named("net").unwrap(), Wishes::default(), "").unwrap();
    let (_first, opened) = connect(offer.clone(), Script::normal(), &order);
    let opened = opened.unwrap();
    let reconnect = opened.reconnect.clone();
    let (guest, _channel, _hang_up) = Guest::on_loss(opened, OnLoss::Recover);
    for (takes, announced) in [(1 << 5, vec![[2, 0, 0, 0, 0, 9, 0, 0].to_vec()]), (0, vec![])] {
        guest.takes.store(takes, Ordering::Relaxed);
        guest.start_driver();
        let handle = guest.device.handle();
        handle.peer_lost("it crashed");
        let (second, socket) = ScriptedBackend::pair(offer.clone(), Script::normal()).unwrap();
        let connection = Connection::from_stream(socket, "second", &Limits::new(LIMIT)).unwrap();
        reconnect.attempt(&handle, connection, drop).unwrap();
        assert_eq!(handle.phase(), PhaseReport::Running);
        assert_eq!(payloads(&second, Request::SEND_RARP), announced);
        assert_eq!(second.breaches(), Vec::<String>::new());
    }
}

#[test]
fn display_is_handed_to_each_backend_anew() {
    let folder = std::env::temp_dir().join(format!("outboard-display-{}", std::process::id()));
    let _stale = std::fs::remove_file(&folder);
    let listener = UnixListener::bind(&folder).unwrap();
    let gpu = Order::new(DeviceType::named("gpu").unwrap(), Wishes::default(), "").unwrap();
    let display = Display::Path(folder.clone());
    // The socket must block: a backend that writes a picture waits until the display has read it.
    let flags = rustix::fs::fcntl_getfl(display.socket(Duration::from_secs(1)).unwrap()).unwrap();
    assert!(!flags.contains(rustix::fs::OFlags::NONBLOCK));
    listener.accept().unwrap();
    let order = gpu.clone().drawing_on(display);
    for _ in 0..2 {
        let (backend, opened) = connect(Offer::default(), Script::normal(), &order);
        opened.unwrap();
        let seen = backend.seen().into_iter().find(|seen| seen.request == Request::GPU_SET_SOCKET).unwrap();
        assert_eq!(seen.fds, 1);
        listener.accept().unwrap();
    }
    drop(listener);
    let (_, opened) = connect(Offer::default(), Script::normal(), &order);
    let error = opened.err().unwrap();
    assert!(matches!(error, OpenError::Display { .. }) && error.hint().is_some(), "{error}");
    std::fs::remove_file(folder).unwrap();
    // An inherited socket, and a backend that refuses it.
    let (ours, _display) = UnixStream::pair().unwrap();
    let order = gpu.drawing_on(Display::Open(Arc::new(ours.into())));
    let (backend, opened) = connect(Offer::default(), Script::normal(), &order);
    assert!(opened.is_ok() && backend.conversation().contains(&"GPU_SET_SOCKET".to_owned()));
    let refuses = Script::normal().on(Request::GPU_SET_SOCKET, Act::Refuse(1));
    assert!(matches!(connect(Offer::default(), refuses, &order).1, Err(OpenError::Peer(_))));
}

#[test]
fn a_device_that_outlives_its_backend_has_packed_rings_only_on_request() {
    const PACKED: u64 = 1 << 34;
    let order = |changes| Order::new(DeviceType::named("net").unwrap(), Wishes::default(), changes).unwrap();
    let rows = [
        (order(""), PACKED),
        (order("").recoverable(), 0),
        (order("").recoverable().with_notifiers(), 0),
        (order("+ring_packed").recoverable(), PACKED),
    ];
    for (order, shown) in rows {
        let (_backend, opened) = connect(net_offer(PACKED, ProtocolFeatures::NONE), Script::normal(), &order);
        assert_eq!(opened.unwrap().model.features.bits() & PACKED, shown, "{order:?}");
    }
}

//! The backend's own channel: served without blocking, whatever comes.

#![cfg(test)]

mod support;

use std::cell::RefCell;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use support::open_fds;
use transport::peer::Limits;
use transport::testing::{Act, Offer, Script, ScriptedBackend};
use transport::vhost_user::backend_requests::NotifierArea;
use transport::vhost_user::message::{Header, Uuid};
use transport::vhost_user::request::BackendRequest;
use transport::vhost_user::request::Request;
use transport::vhost_user::{
    BackendChannel, BackendRequests, Connection, ProtocolFeatures, Refused, Served, Session, Wanted,
};
use zerocopy::IntoBytes;

#[derive(Default)]
struct Machine {
    calls: RefCell<Vec<String>>,
    object: Option<OwnedFd>,
}

impl Machine {
    fn note(&self, what: impl Into<String>) {
        self.calls.borrow_mut().push(what.into());
    }

    fn take(&self) -> Vec<String> {
        self.calls.take()
    }
}

impl BackendRequests for Machine {
    fn config_changed(&self) {
        self.note("config");
    }

    fn host_notifier(&self, ring: u8, area: Option<NotifierArea>) -> Result<(), Refused> {
        area.as_ref().map_or(Ok(()), NotifierArea::check)?;
        let area = area.map_or("none".to_owned(), |area| format!("{:#x}+{:#x}", area.offset, area.size));
        self.note(format!("notifier {ring} {area}"));
        if ring < 2 { Ok(()) } else { Err(Refused) }
    }

    fn shared_object_lookup(&self, uuid: Uuid) -> Result<OwnedFd, Refused> {
        self.note(format!("lookup {}", uuid.bytes[0]));
        self.object.as_ref().ok_or(Refused)?.try_clone().map_err(|_| Refused)
    }
}

fn start() -> (ScriptedBackend, Session, BackendChannel) {
    let all =
        ProtocolFeatures::HOST_NOTIFIER.with(ProtocolFeatures::SHARED_OBJECT).with(ProtocolFeatures::SHMEM);
    let all = all.with(ProtocolFeatures::BACKEND_SEND_FD);
    let mut offer = Offer::default();
    offer.protocol = offer.protocol.with(all);
    let (backend, stream) = ScriptedBackend::pair(offer, Script::normal()).unwrap();
    let connection = Connection::from_stream(stream, "scripted", &Limits::default()).unwrap();
    let mut session = connection.negotiate(&Wanted::default().and(all)).unwrap();
    let channel = session.take_backend_channel().unwrap();
    assert!(session.take_backend_channel().is_none(), "given once");
    (backend, session, channel)
}

/// One test counts this process's descriptors: the others wait.
static COUNTING: Mutex<()> = Mutex::new(());

/// What comes at once, on a machine that has other things to do.
const SOON: Duration = Duration::from_secs(20);

#[test]
fn requests_are_handled_answered_and_leak_nothing() {
    let _alone = COUNTING.lock();
    let before = open_fds();
    {
        let (backend, _session, mut channel) = start();
        let mut machine = Machine::default();
        assert_eq!(channel.serve(&machine).unwrap(), Served::Requests(0));

        backend.request(BackendRequest::CONFIG_CHANGE_MSG, &[], &[]).unwrap();
        assert_eq!(channel.serve(&machine).unwrap(), Served::Requests(1));
        assert_eq!((machine.take(), backend.answer(SOON).unwrap()), (vec!["config".into()], (0, 0)));

        let file = std::fs::File::open("/dev/zero").unwrap();
        let area = |ring: u64| [ring, 4096, 8192].map(u64::to_ne_bytes).concat();
        for (ring, code) in [(1, 0), (2, 1)] {
            backend.request(BackendRequest::VRING_HOST_NOTIFIER_MSG, &area(ring), &[file.as_fd()]).unwrap();
            channel.serve(&machine).unwrap();
            assert_eq!(machine.take(), [format!("notifier {ring} 0x2000+0x1000")]);
            assert_eq!(backend.answer(SOON).unwrap(), (code, 0));
        }
        for bad in [[1, 4096, 100], [1, 4095, 0], [1, 8192, 0], [1, 0, 0], [1, 4096, u64::MAX - 4095]] {
            let bad = bad.map(u64::to_ne_bytes).concat();
            backend.request(BackendRequest::VRING_HOST_NOTIFIER_MSG, &bad, &[file.as_fd()]).unwrap();
            channel.serve(&machine).unwrap();
            assert_eq!((machine.take(), backend.answer(SOON).unwrap()), (vec![], (1, 0)));
        }
        backend.request(BackendRequest::VRING_HOST_NOTIFIER_MSG, &area(0x101), &[]).unwrap();
        channel.serve(&machine).unwrap();
        assert_eq!((machine.take(), backend.answer(SOON).unwrap()), (vec!["notifier 1 none".into()], (0, 0)));

        backend.request(BackendRequest::SHARED_OBJECT_LOOKUP, &[7; 16], &[]).unwrap();
        channel.serve(&machine).unwrap();
        assert_eq!(backend.answer(SOON).unwrap(), (1, 0));
        machine.object = Some(file.into());
        backend.request(BackendRequest::SHARED_OBJECT_LOOKUP, &[7; 16], &[]).unwrap();
        channel.serve(&machine).unwrap();
        assert_eq!(backend.answer(SOON).unwrap(), (0, 1));
        machine.take();

        malformed_requests_are_refused_and_the_channel_goes_on(&backend, &mut channel, &machine);
        split_and_joined_messages_are_the_same(&backend, &mut channel, &machine);
        a_flood_is_served_in_batches(&backend, &mut channel, &machine);

        backend.hang_up();
        let begin = Instant::now();
        while channel.serve(&machine).unwrap() != Served::HungUp {
            assert!(begin.elapsed() < SOON);
        }
    }
    broken_frames_end_the_channel();
    a_peer_that_does_not_take_answers_is_cut_off();
    assert_eq!(open_fds(), before);
}

fn malformed_requests_are_refused_and_the_channel_goes_on(
    backend: &ScriptedBackend,
    channel: &mut BackendChannel,
    machine: &Machine,
) {
    let file = std::fs::File::open("/dev/zero").unwrap();
    let many = [file.as_fd(); 5];
    let area = [0x4000u64, 4096, 0].map(u64::to_ne_bytes).concat();
    let cases: [(BackendRequest, &[u8], usize, &str); 9] = [
        (BackendRequest(0), &[], 0, "request 0"),
        (BackendRequest(77), &[1; 40], 2, "unknown, with fds"),
        (BackendRequest::CONFIG_CHANGE_MSG, &[0; 8], 0, "payload where none is due"),
        (BackendRequest::CONFIG_CHANGE_MSG, &[], 1, "fd where none is due"),
        (BackendRequest::VRING_HOST_NOTIFIER_MSG, &area[..23], 1, "short"),
        (BackendRequest::VRING_HOST_NOTIFIER_MSG, &area, 1, "flags beyond bit 8"),
        (BackendRequest::VRING_HOST_NOTIFIER_MSG, &[0; 24], 0, "no fd"),
        (BackendRequest::SHMEM_MAP, &[0; 40], 5, "too many fds"),
        (BackendRequest::VRING_CALL, &[0; 8], 0, "not negotiated"),
    ];
    for (request, payload, fds, what) in cases {
        backend.request(request, payload, &many[..fds]).unwrap();
        assert_eq!(channel.serve(machine).unwrap(), Served::Requests(1), "{what}");
        assert_eq!(backend.answer(SOON).unwrap(), (1, 0), "{what}");
        assert_eq!(machine.take(), Vec::<String>::new(), "{what}");
    }
}

fn split_and_joined_messages_are_the_same(
    backend: &ScriptedBackend,
    channel: &mut BackendChannel,
    machine: &Machine,
) {
    let message = Header::request(BackendRequest::CONFIG_CHANGE_MSG.0, 0);
    for byte in message.as_bytes() {
        assert_eq!(channel.serve(machine).unwrap(), Served::Requests(0));
        backend.send_on_channel(&[*byte], &[]).unwrap();
    }
    assert_eq!(channel.serve(machine).unwrap(), Served::Requests(1));
    let three = message.as_bytes().repeat(3);
    backend.send_on_channel(&three, &[]).unwrap();
    assert_eq!(channel.serve(machine).unwrap(), Served::Requests(3));
    assert_eq!(machine.take().len(), 4);
}

fn a_flood_is_served_in_batches(backend: &ScriptedBackend, channel: &mut BackendChannel, machine: &Machine) {
    let message = Header::request(BackendRequest::CONFIG_CHANGE_MSG.0, 0);
    backend.send_on_channel(&message.as_bytes().repeat(1000), &[]).unwrap();
    assert!(matches!(channel.serve(machine).unwrap(), Served::Requests(n) if n < 1000));
    let begin = Instant::now();
    let mut handled = machine.take().len();
    while handled < 1000 {
        channel.serve(machine).unwrap();
        handled += machine.take().len();
        assert!(begin.elapsed() < SOON);
    }
    assert_eq!(handled, 1000);
}

fn broken_frames_end_the_channel() {
    let frame = |flags: u32, size: u32| Header { request: 2, flags, size };
    for (header, what) in [
        (frame(5, 8), "a reply"),
        (frame(2, 0), "another version"),
        (frame(0x11, 0), "reserved flags"),
        (frame(1, 1025), "too long"),
        (frame(1, 0x8000_0000), "far too long"),
        (frame(1, u32::MAX), "as long as can be"),
    ] {
        let (backend, _session, mut channel) = start();
        let file = std::fs::File::open("/dev/zero").unwrap();
        // What follows in the same segment stays in the socket after a shutdown, and must not be served.
        let more = Header::request(BackendRequest::CONFIG_CHANGE_MSG.0, 0);
        let bytes = [header.as_bytes(), more.as_bytes()].concat();
        backend.send_on_channel(&bytes, &[file.as_fd()]).unwrap();
        let error = channel.serve(&Machine::default()).expect_err(what);
        assert!(
            error.to_string().starts_with("vhost-user backend scripted sent CONFIG_CHANGE_MSG with"),
            "{error}"
        );
        assert_eq!(channel.serve(&Machine::default()).unwrap(), Served::HungUp, "{what}");
    }
    let (backend, _session, mut channel) = start();
    backend.send_on_channel(&[2, 0, 0], &[]).unwrap();
    channel.serve(&Machine::default()).unwrap();
    backend.hang_up();
    let begin = Instant::now();
    let error = loop {
        assert!(begin.elapsed() < SOON);
        if let Err(error) = channel.serve(&Machine::default()) {
            break error;
        }
    };
    assert!(error.to_string().contains("in the middle of a message"), "{error}");
}

fn a_peer_that_does_not_take_answers_is_cut_off() {
    let (backend, _session, mut channel) = start();
    let message = Header::asking(BackendRequest::CONFIG_CHANGE_MSG.0, 0).as_bytes().repeat(60);
    let machine = Machine::default();
    let begin = Instant::now();
    let error = loop {
        assert!(begin.elapsed() < SOON);
        backend.send_on_channel(&message, &[]).unwrap();
        if let Err(error) = channel.serve(&machine) {
            break error;
        }
    };
    assert!(error.to_string().contains("did not take CONFIG_CHANGE_MSG"), "{error}");
}

/// libvhost-user waits for the answer to its own request in the middle of ours.
#[test]
fn the_channel_is_served_while_a_request_waits() {
    let _alone = COUNTING.lock();
    let all = ProtocolFeatures::HOST_NOTIFIER.with(ProtocolFeatures::BACKEND_SEND_FD);
    let mut offer = Offer::default();
    offer.protocol = offer.protocol.with(all);
    let pause = Duration::from_secs(2);
    let script = Script::normal().on(Request::GET_CONFIG, Act::Delay(pause));
    let (backend, stream) = ScriptedBackend::pair(offer, script).unwrap();
    let connection = Connection::from_stream(stream, "scripted", &Limits::new(SOON)).unwrap();
    let mut session = connection.negotiate(&Wanted::default().and(all)).unwrap();
    let mut channel = session.take_backend_channel().unwrap();
    let begin = Instant::now();
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| session.read_config(60));
        backend.request(BackendRequest::CONFIG_CHANGE_MSG, &[], &[]).unwrap();
        let machine = Machine::default();
        while channel.serve(&machine).unwrap() == Served::Requests(0) {
            assert!(begin.elapsed() < SOON);
        }
        assert_eq!(backend.answer(SOON).unwrap(), (0, 0));
        assert!(begin.elapsed() < pause, "answered before the main request was");
        waiting.join().unwrap().unwrap();
    });
}

/// The channel outlives the connection on the backend's side; here it has no power any more, and what lies in it is not
/// served.
#[test]
fn a_channel_ends_with_its_connection_whoever_ends_that() {
    let _alone = COUNTING.lock();
    let before = open_fds();
    for way in ["dropped", "lost"] {
        let script = Script::normal().on(Request::GET_STATUS, Act::Close);
        let offer =
            Offer { protocol: Offer::default().protocol.with(ProtocolFeatures::STATUS), ..Offer::default() };
        let (backend, stream) = ScriptedBackend::pair(offer, script).unwrap();
        let connection = Connection::from_stream(stream, "scripted", &Limits::default()).unwrap();
        let mut session = connection.negotiate(&Wanted::default()).unwrap();
        let mut channel = session.take_backend_channel().unwrap();
        let machine = Machine::default();
        backend.request(BackendRequest::CONFIG_CHANGE_MSG, &[], &[]).unwrap();
        assert_eq!(channel.serve(&machine).unwrap(), Served::Requests(1), "{way}");
        machine.take();
        backend.request(BackendRequest::CONFIG_CHANGE_MSG, &[], &[]).unwrap();
        match way {
            "lost" => {
                session.status().unwrap_err();
                assert_eq!(channel.serve(&machine).unwrap(), Served::HungUp, "{way}");
                drop(session);
            }
            _ => drop(session),
        }
        assert_eq!(channel.serve(&machine).unwrap(), Served::HungUp, "{way}");
        assert!(machine.take().is_empty(), "{way}: what waited in the channel was served");
        assert!(channel.has_ended());
        assert!(backend.answer(SOON).is_ok_and(|answer| answer == (0, 0)), "{way}: to the first request");
        assert!(backend.answer(SOON).is_err(), "{way}: the backend sees the end");
    }
    assert_eq!(open_fds(), before);
}

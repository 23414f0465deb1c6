//! Fds that are not what they should be, wherever a backend hands one over: refused or kept harmless, in no time, and none
//! is left open. Memory is counted, too.

#![cfg(test)]

mod support;

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use support::{GuestMemory, Rings, open_fds};
use transport::peer::Limits;
use transport::testing::{Act, FdKind, Offer, Script, ScriptedBackend};
use transport::vhost_user::backend_requests::NotifierArea;
use transport::vhost_user::message::{ShmemArea, Uuid};
use transport::vhost_user::request::BackendRequest;
use transport::vhost_user::request::Request;
use transport::vhost_user::{
    BackendRequests, Connection, ProtocolFeatures as P, Refused, Served, Session, Wanted,
};

const DEADLINE: Duration = Duration::from_secs(2);
const KINDS: [FdKind; 7] = [
    FdKind::Eventfd,
    FdKind::Pipe,
    FdKind::Socket,
    FdKind::Directory,
    FdKind::Path,
    FdKind::Memfd(0),
    FdKind::Memfd(100),
];

/// Descriptors are counted for the whole process: one test at a time.
static ALONE: Mutex<()> = Mutex::new(());

fn session(features: P, script: Script) -> (ScriptedBackend, Session) {
    let offer = Offer::default();
    let offer = Offer { protocol: offer.protocol.with(features), ..offer };
    let (backend, stream) = ScriptedBackend::pair(offer, script).unwrap();
    let connection = Connection::from_stream(stream, "scripted", &Limits::new(DEADLINE)).unwrap();
    (backend, connection.negotiate(&Wanted::default().and(features)).unwrap())
}

/// Does `act` with each wrong fd: bounded, and nothing stays open.
fn with_each(kinds: &[FdKind], act: impl Fn(FdKind)) {
    let _alone = ALONE.lock();
    for kind in kinds {
        let (before, begun) = (open_fds(), Instant::now());
        act(*kind);
        assert!(begun.elapsed() < DEADLINE * 2, "{kind:?}: {:?}", begun.elapsed());
        // The scripted backend's thread closes its own.
        support::eventually("descriptors are closed", DEADLINE, || open_fds() == before);
    }
}

#[test]
fn an_inflight_area_of_a_wrong_kind_is_refused() {
    let kinds = [&KINDS[..], &[FdKind::ReadOnly(1 << 20)]].concat();
    with_each(&kinds, |kind| {
        let script = Script::normal().on(Request::GET_INFLIGHT_FD, Act::FdOf(kind));
        let (_backend, session) = session(P::INFLIGHT_SHMFD, script);
        let (memory, rings) = (GuestMemory::new(2 << 20), Rings::new());
        let features = session.offered().accept(0).unwrap();
        let lost = session.go_live(features, &memory.map, &rings.rings(0)).err();
        let lost = lost.unwrap_or_else(|| panic!("{kind:?} is no memory"));
        assert!(lost.error().to_string().contains("GET_INFLIGHT_FD"), "{kind:?}: {}", lost.error());
    });
}

#[test]
fn a_state_pipe_of_a_wrong_kind_is_an_error_of_the_transfer() {
    with_each(&KINDS, |kind| {
        // Bit 8 is clear: the backend's own fd is to be read.
        let script = Script::normal().on(Request::SET_DEVICE_STATE_FD, Act::FdOf(kind));
        let (_backend, mut session) = session(P::DEVICE_STATE, script);
        assert!(session.save_state(&mut Vec::new(), 1 << 20).is_err(), "{kind:?}");
    });
}

/// Keeps what it is given until it is dropped.
#[derive(Default)]
struct Machine(Mutex<Vec<OwnedFd>>);

impl BackendRequests for Machine {
    fn config_changed(&self) {}

    fn host_notifier(&self, _ring: u8, area: Option<NotifierArea>) -> Result<(), Refused> {
        let area = area.ok_or(Refused)?;
        area.check()?;
        self.0.lock().unwrap().push(area.fd);
        Ok(())
    }

    fn shmem_map(&self, area: ShmemArea, fd: OwnedFd) -> Result<(), Refused> {
        if transport::peer::fds::file_size(&fd) < area.fd_offset.saturating_add(area.len) {
            return Err(Refused);
        }
        self.0.lock().unwrap().push(fd);
        Ok(())
    }

    fn shared_object_add(&self, _uuid: Uuid) -> Result<(), Refused> {
        Ok(())
    }
}

#[test]
fn requests_of_a_backend_with_wrong_fds_are_answered_and_the_channel_goes_on() {
    let words = |words: &[u64]| words.iter().flat_map(|word| word.to_ne_bytes()).collect::<Vec<_>>();
    with_each(&KINDS, |kind| {
        let (backend, mut session) = session(
            P::HOST_NOTIFIER.with(P::SHMEM).with(P::BACKEND_SEND_FD).with(P::SHARED_OBJECT),
            Script::normal(),
        );
        let mut channel = session.take_backend_channel().unwrap();
        let machine = Machine::default();
        let fd = kind.make().unwrap();
        for (request, payload) in [
            (BackendRequest::VRING_HOST_NOTIFIER_MSG, words(&[0, 4096, 4096])),
            (BackendRequest::SHMEM_MAP, words(&[0, 0, 0, 4096, 1])),
        ] {
            backend.request(request, &payload, &[fd.as_fd()]).unwrap();
            assert_eq!(channel.serve(&machine).unwrap(), Served::Requests(1), "{request} {kind:?}");
            let (answer, fds) = backend.answer(DEADLINE).unwrap();
            assert_eq!(fds, 0);
            // A device file has no size, so a notifier's place in it cannot be judged here.
            assert!(answer != 0 || request == BackendRequest::VRING_HOST_NOTIFIER_MSG, "{request} {kind:?}");
        }
        // An fd where none is due is closed, and so is a second one; the channel goes on.
        for (request, payload, fds) in [
            (BackendRequest::CONFIG_CHANGE_MSG, vec![], 1),
            (BackendRequest::SHARED_OBJECT_ADD, vec![7; 16], 3),
            (BackendRequest::SHMEM_MAP, words(&[0, 0, 0, 4096, 1]), 2),
        ] {
            backend.request(request, &payload, &vec![fd.as_fd(); fds]).unwrap();
            assert_eq!(channel.serve(&machine).unwrap(), Served::Requests(1), "{request} {kind:?}");
            assert_ne!(backend.answer(DEADLINE).unwrap().0, 0, "{request} {kind:?}");
        }
        backend.request(BackendRequest::SHARED_OBJECT_ADD, &[7; 16], &[]).unwrap();
        assert_eq!(channel.serve(&machine).unwrap(), Served::Requests(1));
        assert_eq!(backend.answer(DEADLINE).unwrap(), (0, 0));
    });
}

#[test]
fn descriptors_that_find_no_room_end_the_channel_with_a_hint_and_leak_nothing() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let _alone = ALONE.lock();
    let before = open_fds();
    let (backend, mut session) = session(P::SHMEM.with(P::BACKEND_SEND_FD), Script::normal());
    let mut channel = session.take_backend_channel().unwrap();
    let fd = FdKind::Memfd(4096).make().unwrap();
    let words = [0_u64, 0, 0, 4096, 1].into_iter().flat_map(u64::to_ne_bytes).collect::<Vec<_>>();
    backend.request(BackendRequest::SHMEM_MAP, &words, &[fd.as_fd()]).unwrap();
    let usual = getrlimit(Resource::Nofile);
    // Every number is taken: the control data is truncated.
    setrlimit(Resource::Nofile, Rlimit { current: Some(3), ..usual }).unwrap();
    let served = channel.serve(&Machine::default());
    setrlimit(Resource::Nofile, usual).unwrap();
    let error = served.unwrap_err();
    assert!(error.to_string().contains("SHMEM_MAP"), "{error}");
    assert!(error.hint().is_some_and(|hint| hint.contains("ulimit")), "{error:?}");
    assert_eq!(channel.serve(&Machine::default()).unwrap(), Served::HungUp);
    drop((backend, session, channel, fd));
    support::eventually("descriptors are closed", DEADLINE, || open_fds() == before);
}

/// Resident memory of this process, in KiB.
fn resident() -> u64 {
    let text = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = text.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
fn a_flood_of_answers_or_of_requests_takes_no_memory() {
    let _alone = ALONE.lock();
    let flood = |answers: usize| {
        let script = Script::normal().on(Request::GET_QUEUE_NUM, Act::Flood(answers));
        let offer = Offer::default();
        let (_backend, stream) = ScriptedBackend::pair(offer, script).unwrap();
        let connection = Connection::from_stream(stream, "scripted", &Limits::new(DEADLINE)).unwrap();
        assert!(connection.negotiate(&Wanted::default()).is_err());
    };
    flood(1000);
    let before = resident();
    flood(1_000_000);
    let (backend, mut session) = session(P::NONE, Script::normal());
    let mut channel = session.take_backend_channel().unwrap();
    let machine = Machine::default();
    let begun = Instant::now();
    for _ in 0..10_000 {
        backend.request(BackendRequest::CONFIG_CHANGE_MSG, &[], &[]).unwrap();
        assert_eq!(channel.serve(&machine).unwrap(), Served::Requests(1));
        backend.answer(DEADLINE).unwrap();
    }
    println!("10 000 configuration changes in {:?}", begun.elapsed());
    let after = resident();
    assert!(after < before + 4096, "{before} KiB before, {after} after");
}

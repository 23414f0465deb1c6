use super::*;
use std::time::{Duration, Instant};

use devices::virtio::backend::vhost_user::{Order, VhostUser};
use devices::virtio::recovery::candidate::open;
use devices::virtio::types::model::Wishes;
use devices::virtio::types::table::DeviceType;
use rustix::fs::{MemfdFlags, memfd_create};
use transport::peer::Limits;
use transport::testing::{Offer, Script, ScriptedBackend};
use transport::vhost_user::request::BackendRequest;
use transport::vhost_user::{Connection, ProtocolFeatures};

const LIMIT: Duration = Duration::from_secs(20);
const LOOKUP: BackendRequest = BackendRequest::SHARED_OBJECT_LOOKUP;
const ADD: BackendRequest = BackendRequest::SHARED_OBJECT_ADD;
const REMOVE: BackendRequest = BackendRequest::SHARED_OBJECT_REMOVE;

/// A backend: our end of its connection.
struct Side(ScriptedBackend, VhostUser);

impl std::ops::Deref for Side {
    type Target = ScriptedBackend;

    fn deref(&self) -> &ScriptedBackend {
        &self.0
    }
}

fn backend(peers: &Peers, device: usize) -> Side {
    let offer = Offer::default();
    let protocol = offer.protocol.with(ProtocolFeatures::SHARED_OBJECT);
    let (backend, socket) = ScriptedBackend::pair(Offer { protocol, ..offer }, Script::normal()).unwrap();
    let connection = Connection::from_stream(socket, "scripted", &Limits::new(LIMIT)).unwrap();
    let order = Order::new(DeviceType::named("blk").unwrap(), Wishes::default(), "").unwrap();
    let opened = open(connection, &order).unwrap();
    peers.add(device, opened.channel.unwrap()).unwrap();
    Side(backend, opened.backend)
}

fn ask(backend: &ScriptedBackend, request: BackendRequest, uuid: u8) -> (u64, usize) {
    backend.request(request, &[uuid; 16], &[]).unwrap();
    backend.answer(LIMIT).unwrap()
}

/// The jobs that the attendants of two devices received, each with the device's number.
type Jobs = Arc<Mutex<Vec<(usize, Job)>>>;

fn peers() -> (Peers, Jobs) {
    let (peers, jobs) = (Peers::new(2).unwrap(), Jobs::default());
    for device in [0, 1] {
        let jobs = Arc::clone(&jobs);
        peers.attend(device, move |job| {
            jobs.lock().unwrap().push((device, job));
            true
        });
    }
    (peers, jobs)
}

/// A lookup whose answer is outstanding.
struct Wanted {
    exporter: usize,
    uuid: Uuid,
    answer: Box<dyn FnOnce(Result<OwnedFd, Refused>) + Send>,
}

fn lookup(jobs: &Jobs) -> Wanted {
    let begun = Instant::now();
    loop {
        assert!(begun.elapsed() < LIMIT, "no lookup");
        if let Some((exporter, Job::Lookup(uuid, answer))) = jobs.lock().unwrap().pop() {
            return Wanted { exporter, uuid, answer };
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn objects_go_from_one_backend_to_another_by_the_attendant_of_its_device() {
    let (peers, jobs) = peers();
    let (exporter, asker) = (backend(&peers, 0), backend(&peers, 1));
    assert_eq!(ask(&asker, LOOKUP, 7), (1, 0), "nobody has it");
    assert_eq!(ask(&exporter, ADD, 7), (0, 0));
    assert_eq!(ask(&asker, ADD, 7), (1, 0), "it is somebody else's");
    assert_eq!(ask(&asker, REMOVE, 7), (1, 0));
    assert_eq!(ask(&exporter, LOOKUP, 7), (1, 0), "its own, it would have to answer while it waits");

    asker.request(LOOKUP, &[7; 16], &[]).unwrap();
    let wanted = lookup(&jobs);
    assert_eq!((wanted.exporter, wanted.uuid.bytes), (0, [7; 16]));
    // The thread serves other requests meanwhile, also those of the backend that has the object.
    assert_eq!(ask(&exporter, ADD, 8), (0, 0));
    (wanted.answer)(Ok(memfd_create("object", MemfdFlags::CLOEXEC).unwrap()));
    assert_eq!(asker.answer(LIMIT).unwrap(), (0, 1));
    // The channel is served again as well.
    assert_eq!(ask(&asker, ADD, 9), (0, 0));
    asker.request(LOOKUP, &[8; 16], &[]).unwrap();
    (lookup(&jobs).answer)(Err(Refused));
    assert_eq!(asker.answer(LIMIT).unwrap(), (1, 0));
}

#[test]
fn backends_that_wait_for_each_other_are_not_asked() {
    let (peers, jobs) = peers();
    let (a, b) = (backend(&peers, 0), backend(&peers, 1));
    assert_eq!((ask(&a, ADD, 1), ask(&b, ADD, 2)), ((0, 0), (0, 0)));
    a.request(LOOKUP, &[2; 16], &[]).unwrap();
    let wanted = lookup(&jobs);
    assert_eq!(ask(&b, LOOKUP, 1), (1, 0), "its owner waits itself");
    (wanted.answer)(Err(Refused));
    assert_eq!(a.answer(LIMIT).unwrap(), (1, 0));
    b.request(LOOKUP, &[1; 16], &[]).unwrap();
    (lookup(&jobs).answer)(Err(Refused));
    assert_eq!(b.answer(LIMIT).unwrap(), (1, 0));
}

#[test]
fn objects_go_with_their_backend() {
    let (peers, jobs) = peers();
    let (exporter, asker) = (backend(&peers, 0), backend(&peers, 1));
    assert_eq!(ask(&exporter, ADD, 1), (0, 0));
    exporter.hang_up();
    let begun = Instant::now();
    while ask(&asker, ADD, 1) != (0, 0) {
        assert!(begun.elapsed() < LIMIT);
    }
    // The objects are also forgotten when the backend is gone while it waits for a lookup's answer.
    let gone = backend(&peers, 0);
    assert_eq!(ask(&gone, ADD, 2), (0, 0));
    gone.request(LOOKUP, &[1; 16], &[]).unwrap();
    let wanted = lookup(&jobs);
    drop(gone);
    (wanted.answer)(Ok(memfd_create("object", MemfdFlags::CLOEXEC).unwrap()));
    let begun = Instant::now();
    while ask(&asker, ADD, 2) != (0, 0) {
        assert!(begun.elapsed() < LIMIT);
    }
}

#[test]
fn lookup_that_no_attendant_carries_out_is_refused() {
    let (peers, jobs) = peers();
    let (exporter, asker) = (backend(&peers, 0), backend(&peers, 1));
    assert_eq!(ask(&exporter, ADD, 1), (0, 0));
    asker.request(LOOKUP, &[1; 16], &[]).unwrap();
    drop(lookup(&jobs));
    assert_eq!(asker.answer(LIMIT).unwrap(), (1, 0));
    peers.attend(0, |_| false);
    assert_eq!(ask(&asker, LOOKUP, 1), (1, 0), "the device has ended");
}

/// A lost backend keeps its channel open and silent. Its objects are forgotten, and its channels are closed
/// except the last one.
#[test]
fn channels_of_lost_connections_cost_nothing_and_say_nothing() {
    let (peers, _jobs) = peers();
    let mut lost = Vec::new();
    for _ in 0..100 {
        let Side(backend, connection) = backend(&peers, 0);
        assert_eq!(ask(&backend, ADD, 3), (0, 0), "the one before has this object no more");
        drop(connection);
        lost.push(backend);
    }
    let now = backend(&peers, 0);
    assert_eq!(ask(&now, ADD, 3), (0, 0));
    let is_open = |backend: &ScriptedBackend| backend.request(REMOVE, &[3; 16], &[]).is_ok();
    let closed = lost.iter().take(99).filter(|backend| !is_open(backend)).count();
    assert_eq!(closed, 99);
    // The request comes after the end of its connection. It is not served, and the channel ends.
    let begun = Instant::now();
    while lost.last().is_some_and(is_open) {
        assert!(begun.elapsed() < LIMIT);
    }
    assert_eq!(ask(&backend(&peers, 1), ADD, 3), (1, 0), "it is the new one's still");
}

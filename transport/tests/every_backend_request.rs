//! Each request of a backend, on its own channel: it reaches the machine decoded, and its answer goes back; without the
//! feature that it needs it is refused and reaches nobody.

#![cfg(test)]

use std::cell::RefCell;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use transport::peer::Limits;
use transport::testing::{Offer, Script, ScriptedBackend};
use transport::vhost_user::backend_requests::NotifierArea;
use transport::vhost_user::message::{Iotlb, ShmemArea, Uuid};
use transport::vhost_user::request::BackendRequest;
use transport::vhost_user::{BackendRequests, Connection, ProtocolFeatures as P, Refused, Served, Wanted};

const SOON: Duration = Duration::from_secs(20);

/// Says yes to all, and notes what it was asked.
#[derive(Default)]
struct Machine(RefCell<Vec<String>>);

impl Machine {
    fn yes(&self, what: String) -> Result<(), Refused> {
        self.0.borrow_mut().push(what);
        Ok(())
    }
}

impl BackendRequests for Machine {
    fn config_changed(&self) {
        self.0.borrow_mut().push("config".into());
    }
    fn host_notifier(&self, ring: u8, area: Option<NotifierArea>) -> Result<(), Refused> {
        self.yes(format!("notifier {ring} {}", area.is_some()))
    }
    fn iotlb(&self, message: Iotlb) -> Result<(), Refused> {
        self.yes(format!("iotlb {:#x} {}", message.iova, message.kind))
    }
    fn vring_call(&self, ring: u32) -> Result<(), Refused> {
        self.yes(format!("call {ring}"))
    }
    fn vring_error(&self, ring: u32) -> Result<(), Refused> {
        self.yes(format!("error {ring}"))
    }
    fn shared_object_add(&self, uuid: Uuid) -> Result<(), Refused> {
        self.yes(format!("add {}", uuid.bytes[0]))
    }
    fn shared_object_remove(&self, uuid: Uuid) -> Result<(), Refused> {
        self.yes(format!("remove {}", uuid.bytes[0]))
    }
    fn shared_object_lookup(&self, uuid: Uuid) -> Result<OwnedFd, Refused> {
        self.yes(format!("lookup {}", uuid.bytes[0]))?;
        std::fs::File::open("/dev/null").map(OwnedFd::from).map_err(|_| Refused)
    }
    fn shmem_map(&self, area: ShmemArea, _fd: OwnedFd) -> Result<(), Refused> {
        self.yes(format!("map {} {:#x}+{:#x}", area.shmid, area.shm_offset, area.len))
    }
    fn shmem_unmap(&self, area: ShmemArea) -> Result<(), Refused> {
        self.yes(format!("unmap {} {:#x}+{:#x}", area.shmid, area.shm_offset, area.len))
    }
}

fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

/// Request, payload, fds, what it needs, what the machine hears, fds that come back.
type Case = (BackendRequest, Vec<u8>, usize, P, &'static str, usize);

fn cases() -> Vec<Case> {
    use BackendRequest as R;
    let miss = [words(&[0x5000, 0, 0]), vec![3, 1, 0, 0, 0, 0, 0, 0]].concat();
    // shmid and padding, offset in the file, offset in the region, length, flags (bit 0: writable).
    let area = words(&[1, 0x1000, 0x2000, 0x3000, 1]);
    let send_fd = P::BACKEND_SEND_FD;
    vec![
        (R::IOTLB_MSG, miss, 0, P::BACKEND_REQ, "iotlb 0x5000 1", 0),
        (R::CONFIG_CHANGE_MSG, vec![], 0, P::CONFIG, "config", 0),
        (
            R::VRING_HOST_NOTIFIER_MSG,
            words(&[1, 4096, 0]),
            1,
            P::HOST_NOTIFIER.with(send_fd),
            "notifier 1 true",
            0,
        ),
        (R::VRING_CALL, words(&[1]), 0, P::INBAND_NOTIFICATIONS, "call 1", 0),
        (R::VRING_ERR, words(&[1]), 0, P::INBAND_NOTIFICATIONS, "error 1", 0),
        (R::SHARED_OBJECT_ADD, vec![7; 16], 0, P::SHARED_OBJECT.with(send_fd), "add 7", 0),
        (R::SHARED_OBJECT_REMOVE, vec![8; 16], 0, P::SHARED_OBJECT.with(send_fd), "remove 8", 0),
        (R::SHARED_OBJECT_LOOKUP, vec![9; 16], 0, P::SHARED_OBJECT.with(send_fd), "lookup 9", 1),
        (R::SHMEM_MAP, area.clone(), 1, P::SHMEM.with(send_fd), "map 1 0x2000+0x3000", 0),
        (R::SHMEM_UNMAP, area, 0, P::SHMEM.with(send_fd), "unmap 1 0x2000+0x3000", 0),
    ]
}

/// What the machine hears of one request, and the answer, over a connection with these protocol features.
fn asked(case: &Case, features: P) -> (Vec<String>, (u64, usize)) {
    let (request, payload, fds, ..) = case;
    let protocol = features.with(P::REPLY_ACK).with(P::BACKEND_REQ);
    let offer = Offer { protocol, ..Offer::default() };
    let (backend, stream) = ScriptedBackend::pair(offer, Script::normal()).unwrap();
    let wanted = Wanted::default().and(features);
    let connection = Connection::from_stream(stream, "scripted", &Limits::default()).unwrap();
    let mut session = connection.negotiate(&wanted).unwrap();
    let mut channel = session.take_backend_channel().unwrap();
    let file = std::fs::File::open("/dev/zero").unwrap();
    backend.request(*request, payload, &vec![file.as_fd(); *fds]).unwrap();
    let machine = Machine::default();
    assert_eq!(channel.serve(&machine).unwrap(), Served::Requests(1), "{request}");
    (machine.0.take(), backend.answer(SOON).unwrap())
}

#[test]
fn each_request_of_a_backend_reaches_the_machine_and_is_answered() {
    for case in cases() {
        let (heard, answer) = asked(&case, case.3);
        assert_eq!(heard, [case.4], "{}", case.0);
        assert_eq!(answer, (0, case.5), "{}", case.0);
    }
}

#[test]
fn without_its_feature_no_request_of_a_backend_reaches_the_machine() {
    // The first needs no more than the channel itself.
    for case in &cases()[1..] {
        let (heard, answer) = asked(case, P::NONE);
        assert!(heard.is_empty() && answer.0 != 0 && answer.1 == 0, "{}: {heard:?} {answer:?}", case.0);
    }
}

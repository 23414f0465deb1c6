//! Kicks and calls as messages (`features=+inband_notifications`): a backend that only takes notes. Needs
//! KVM's interface only.

// Functions beside the tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::time::Duration;

use outboard_tests::launch::{Launch, STEP, first_device};
use outboard_tests::scratch::Scratch;
use outboard_tests::{need, place, wait};
use rustix::process::Signal;
use transport::testing::{Offer, Script, ScriptedBackend};
use transport::vhost_user::ProtocolFeatures;
use transport::vhost_user::request::BackendRequest;
use transport::vhost_user::request::Request;

#[test]
fn a_kick_of_the_guest_becomes_a_message_and_a_message_an_interrupt() {
    need!(place::kvm());
    let (offer, scratch) = (Offer::default(), Scratch::new());
    let socket = scratch.path("scripted");
    let protocol = offer.protocol.with(ProtocolFeatures::INBAND_NOTIFICATIONS);
    let config = [&0x2000_u64.to_le_bytes()[..], &[0; 52]].concat();
    let backend =
        ScriptedBackend::listen(&socket, Offer { protocol, config, ..offer }, Script::normal()).unwrap();
    let device = format!("blk,socket={},features=+inband_notifications", socket.display());
    let line = first_device("blk").arg("n", 1).arg("timeout", 60);
    let vm = Launch::payload(&line).arg("--vhost-user").arg(device).start();
    vm.expect("capacity=");
    let kicks = || backend.seen().iter().filter(|seen| seen.request == Request::VRING_KICK).count();
    // One starts the ring, the other one is the guest's.
    wait::until("the guest's kick", STEP, || (kicks() >= 2).then_some(()));
    backend.request(BackendRequest::VRING_CALL, &[0; 8], &[]).unwrap();
    assert_eq!(backend.answer(wait::patience(Duration::from_secs(5))).unwrap(), (0, 0));
    backend.request(BackendRequest::VRING_CALL, &[9, 0, 0, 0, 0, 0, 0, 0], &[]).unwrap();
    assert_eq!(
        backend.answer(wait::patience(Duration::from_secs(5))).unwrap(),
        (1, 0),
        "there is no such queue"
    );
    vm.signal(Signal::TERM);
    let ended = vm.end(STEP).with_code(143);
    assert_eq!(backend.breaches(), Vec::<String>::new(), "{ended}");
    assert_eq!(
        ended.stats().number("/devices/0/requests_through_vmm"),
        0,
        "vCPUs do not carry them\n{ended}"
    );
}

//! Tests of a whole device with a backend that misbehaves at each step. The device ends broken within the
//! deadline, with nothing left bound and no descriptor left open.

use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use transport::peer::Limits;
use transport::testing::{Act, Offer, Script, ScriptedBackend};
use transport::vhost_user::request::BackendRequest;
use transport::vhost_user::request::Request;
use transport::vhost_user::{BackendRequests, Connection, Served};

use super::tests::{Guest, eventually, order};
use super::*;
use crate::bus::BusDevice;
use crate::virtio::OnLoss;
use crate::virtio::PhaseReport;
use crate::virtio::backend::requests::OwnChannel;
use crate::virtio::recovery::candidate::{Opened, open};

/// Long enough for a correct exchange, even on a busy machine.
const DEADLINE: Duration = Duration::from_secs(1);
/// Slack for a busy machine. A wait without a bound would be longer.
const SLACK: Duration = Duration::from_secs(10);

/// VIRTIO_BLK_F_CONFIG_WCE, and the guest address offset of the configuration byte that a driver may write
/// with this feature.
const CONFIG_WCE: u32 = 11;
const WCE: u64 = 0x100 + 32;

/// Runs `check` on many cases at a time, as most of them mostly wait.
fn all_at_once<T: Sync>(cases: &[T], check: impl Fn(&T) + Sync) {
    for batch in cases.chunks(20) {
        std::thread::scope(|scope| {
            for case in batch {
                scope.spawn(|| check(case));
            }
        });
    }
}

/// Every request with every misdeed that `fits`.
fn cases<R: Copy>(requests: &[R], fits: impl Fn(R, &Act) -> bool) -> Vec<(R, Act)> {
    let pairs = requests.iter().flat_map(|request| misdeeds().into_iter().map(|act| (*request, act)));
    pairs.filter(|(request, act)| fits(*request, act)).collect()
}

/// The ways in which an answer can be wrong or missing.
fn misdeeds() -> Vec<Act> {
    vec![
        Act::Silent,
        Act::StopReading,
        Act::Close,
        Act::CloseAfter(7),
        Act::StallAfter(7),
        Act::Drip(Duration::from_millis(200)),
        Act::As(Request(200)),
        Act::Flags(0),
        Act::Flags(9),
        Act::ClaimSize(0),
        Act::ClaimSize(4096),
        Act::ClaimSize(u32::MAX),
        Act::Payload(vec![]),
        Act::Payload(vec![0; 300]),
        Act::Fds(1),
        Act::Fds(30),
    ]
}

/// The requests of a start, each with the number of earlier requests of that kind.
const START: [(Request, usize); 9] = [
    (Request::SET_FEATURES, 0),
    (Request::SET_MEM_TABLE, 0),
    (Request::SET_VRING_NUM, 0),
    (Request::SET_VRING_ADDR, 0),
    (Request::SET_VRING_BASE, 0),
    (Request::SET_VRING_CALL, 0),
    (Request::SET_VRING_KICK, 0),
    (Request::SET_VRING_ENABLE, 0),
    (Request::GET_FEATURES, 1),
];

struct Rig {
    guest: Guest,
    backend: ScriptedBackend,
    channel: Option<OwnChannel>,
}

fn connect(script: Script) -> (ScriptedBackend, Result<Opened, OpenError>) {
    let mut offer = Offer::default();
    offer.features |= 1 << CONFIG_WCE;
    let (backend, socket) = ScriptedBackend::pair(offer, script).unwrap();
    let connection = Connection::from_stream(socket, "scripted", &Limits::new(DEADLINE)).unwrap();
    (backend, open(connection, &order("")))
}

fn rig(script: Script) -> Rig {
    let (backend, opened) = connect(script);
    let (guest, channel, _hang_up) = Guest::new(opened.unwrap());
    Rig { guest, backend, channel }
}

impl Rig {
    fn is_broken(&self) -> bool {
        matches!(self.guest.device.handle().phase(), PhaseReport::Broken(_))
    }

    fn has_been_asked(&self, request: Request) -> bool {
        self.backend.seen().iter().any(|seen| seen.request == request)
    }

    #[track_caller]
    fn assert_broken(&self, begin: Instant, what: &str) {
        let Guest { device, machine, .. } = &self.guest;
        assert!(begin.elapsed() < DEADLINE * 2 + SLACK, "{what}: took {:?}", begin.elapsed());
        assert!(self.is_broken(), "{what}: {:?}", device.handle().phase());
        let status = machine.page_u32(0x70);
        assert!(status == 0 || status & 0x40 != 0, "{what}: NEEDS_RESET, unless just reset: {status:#x}");
        assert_eq!((machine.doorbells().len(), machine.routes().len()), (1, 1), "{what}");
        assert_eq!(self.backend.breaches(), Vec::<String>::new(), "{what}");
        // A driver that resets and tries again fails at once, and does not wait for a peer.
        let messages = device.handle().stats().backend.messages;
        self.guest.write(0x70, 0);
        assert_eq!(machine.page_u32(0x70), 0, "{what}");
        for status in [1, 3, 0xb] {
            self.guest.write(0x70, status);
        }
        assert_eq!(machine.page_u32(0x70), 3, "{what}");
        assert_eq!(device.handle().stats().backend.messages, messages, "{what}");
    }
}

#[test]
fn backend_that_misbehaves_while_starting_breaks_the_device_in_bounded_time() {
    let mut cases = cases(&START, |_, _| true);
    // The answer to GET_FEATURES only proves that the backend has reached this request; its value does not
    // matter.
    let refusals = START.iter().filter(|(request, _)| *request != Request::GET_FEATURES);
    cases.extend(refusals.map(|start| (*start, Act::Refuse(1))));
    all_at_once(&cases, |((request, nth), act)| {
        let what = format!("{request} {act:?}");
        let rig = rig(Script::normal().on_nth(*request, *nth, act.clone()));
        let begin = Instant::now();
        rig.guest.start_driver();
        rig.assert_broken(begin, &what);
        assert_eq!(rig.guest.device.handle().stats().activations, 0, "{what}");
    });
}

#[test]
fn backend_that_misbehaves_while_stopping_breaks_the_device_in_bounded_time() {
    let requests = [Request::GET_VRING_BASE, Request::RESET_DEVICE];
    all_at_once(&cases(&requests, |_, _| true), |(request, act)| {
        let what = format!("{request} {act:?}");
        let rig = rig(Script::normal().on(*request, act.clone()));
        rig.guest.start_driver();
        assert!(!rig.is_broken(), "{what}");
        let begin = Instant::now();
        rig.guest.write(0x70, 0);
        rig.assert_broken(begin, &what);
    });
}

#[test]
fn reset_of_the_driver_or_of_the_machine_reaches_the_backends_device() {
    let rig = rig(Script::normal());
    let resets = || rig.backend.seen().iter().filter(|seen| seen.request == Request::RESET_DEVICE).count();
    rig.guest.start_driver();
    assert_eq!(resets(), 0, "it has only just begun");
    rig.guest.write(0x70, 0);
    assert_eq!(resets(), 1);
    rig.guest.start_driver();
    rig.guest.device.handle().machine_reset();
    assert_eq!(resets(), 2);
    assert_eq!(rig.guest.device.handle().phase(), PhaseReport::Idle);
    assert_eq!(rig.backend.breaches(), Vec::<String>::new());
}

#[test]
fn backend_that_misbehaves_over_its_configuration_never_holds_the_driver_up() {
    let requests = [(Request::GET_CONFIG, 1), (Request::SET_CONFIG, 0)];
    all_at_once(&cases(&requests, |_, _| true), |((request, nth), act)| {
        let what = format!("{request} {act:?}");
        let rig = rig(Script::normal().on_nth(*request, *nth, act.clone()));
        rig.guest.start_driver();
        assert!(!rig.is_broken(), "{what}");
        let begin = Instant::now();
        rig.guest.device.write(WCE, &[1]);
        assert!(rig.has_been_asked(Request::SET_CONFIG), "{what}");
        if rig.is_broken() {
            rig.assert_broken(begin, &what);
        } else {
            // Some of these acts are refusals, which the connection survives.
            assert!(begin.elapsed() < DEADLINE * 2 + SLACK, "{what}");
            assert_eq!(rig.guest.machine.page_u32(0x70), 0xf, "{what}");
        }
    });
}

#[test]
fn configuration_write_and_what_came_of_it_have_one_deadline_together() {
    let slow = Act::Delay(DEADLINE * 7 / 10);
    let script = Script::normal().on(Request::SET_CONFIG, slow.clone()).on_nth(Request::GET_CONFIG, 1, slow);
    let rig = rig(script);
    rig.guest.start_driver();
    rig.guest.device.write(WCE, &[1]);
    let waited = rig.guest.device.handle().stats().backend.worst_wait;
    assert!(rig.is_broken(), "it waited for both");
    assert!(waited < DEADLINE, "{waited:?}");
}

#[test]
fn configuration_write_that_is_refused_changes_nothing_and_the_device_goes_on() {
    let rig = rig(Script::normal().on(Request::SET_CONFIG, Act::Refuse(1)));
    rig.guest.start_driver();
    let before = rig.guest.machine.page_bytes(0x100, 60);
    rig.guest.device.write(WCE, &[1]);
    assert!(rig.has_been_asked(Request::SET_CONFIG));
    assert_eq!(rig.guest.machine.page_bytes(0x100, 60), before);
    assert_eq!(rig.guest.device.handle().phase(), PhaseReport::Running);
}

#[test]
fn backend_that_misbehaves_on_connecting_is_an_error_in_bounded_time() {
    let requests = [
        Request::GET_FEATURES,
        Request::GET_PROTOCOL_FEATURES,
        Request::SET_OWNER,
        Request::GET_QUEUE_NUM,
        Request::SET_BACKEND_REQ_FD,
        Request::GET_CONFIG,
    ];
    // A backend without an answer at one size is asked again at another size.
    let retried = |request, act: &Act| request == Request::GET_CONFIG && *act == Act::Payload(vec![]);
    all_at_once(&cases(&requests, |request, act| !retried(request, act)), |(request, act)| {
        let what = format!("{request} {act:?}");
        let begin = Instant::now();
        let (_backend, opened) = connect(Script::normal().on(*request, act.clone()));
        assert!(begin.elapsed() < DEADLINE * 2 + SLACK, "{what}");
        assert!(opened.is_err(), "{what}");
    });
}

struct Noted(AtomicBool);

impl BackendRequests for Noted {
    fn config_changed(&self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn configuration_change_of_the_backend_reaches_the_guest() {
    let Rig { guest, backend, channel, .. } = rig(Script::normal());
    let (mut channel, noted) = (channel.unwrap(), Noted(false.into()));
    guest.start_driver();
    guest.machine.take_interrupts();
    backend.set_config(vec![7; 60]);
    backend.request(BackendRequest(2), &[], &[]).unwrap();
    eventually("CONFIG_CHANGE", || {
        assert!(matches!(channel.channel.serve(&noted), Ok(Served::Requests(_))));
        noted.0.load(Ordering::Relaxed)
    });
    guest.device.handle().config_changed();
    assert_eq!(guest.machine.page_bytes(0x100, 60), [7; 60]);
    assert_eq!((guest.machine.page_u32(0x60), guest.machine.take_interrupts()), (3, 1));
    guest.write(0x64, 3);
    assert_eq!(guest.machine.page_u32(0x60), 1);
}

#[test]
fn device_that_gives_a_silent_backend_up_has_another_one_searched_for_at_once() {
    use crate::virtio::core::state::Effort;
    use std::sync::atomic::{AtomicU32, Ordering};
    for on_loss in [OnLoss::Recover, OnLoss::Break] {
        let rig = rig(Script::normal().on(Request::SET_MEM_TABLE, Act::Silent));
        let (handle, asked) = (rig.guest.device.handle(), Arc::new(AtomicU32::new(0)));
        let seen = Arc::clone(&asked);
        handle.on_loss(on_loss);
        handle.search_with(
            Duration::ZERO,
            Box::new(move |effort| {
                seen.fetch_add(if effort == Effort::Once { 0x100 } else { 1 }, Ordering::Relaxed);
                true
            }),
        );
        rig.guest.start_driver();
        let (recovers, breaks) = (on_loss == OnLoss::Recover, on_loss == OnLoss::Break);
        assert_eq!(asked.load(Ordering::Relaxed), u32::from(recovers), "{on_loss:?}");
        rig.guest.write(0x70, 0);
        assert_eq!(asked.load(Ordering::Relaxed) >> 8, u32::from(breaks), "a broken one at its reset");
    }
}

#[test]
fn backend_that_goes_away_while_running_is_told_to_the_driver_once() {
    let rig = rig(Script::normal());
    rig.guest.start_driver();
    rig.guest.machine.take_interrupts();
    rig.backend.hang_up();
    let begin = Instant::now();
    rig.guest.device.handle().peer_lost("it went away");
    assert_eq!(rig.guest.machine.take_interrupts(), 1);
    rig.assert_broken(begin, "hang-up");
}

#[test]
fn driver_that_resets_again_and_again_finds_the_rings_started_and_stopped() {
    let rig = rig(Script::normal());
    for _ in 0..20 {
        rig.guest.start_driver();
        assert_eq!(
            rig.backend.with_ring(0, |ring| (ring.is_started(), ring.is_enabled())),
            Some((true, true))
        );
        rig.guest.write(0x70, 0);
        assert_eq!(rig.backend.with_ring(0, |ring| ring.is_started()), Some(false));
    }
    assert_eq!(rig.backend.breaches(), Vec::<String>::new());
    assert_eq!(rig.guest.device.handle().stats().resets, 20);
}

#[test]
fn backend_that_writes_to_memory_after_its_rings_were_stopped_harms_no_later_driver() {
    let rig = rig(Script::normal());
    for (round, byte) in [0xff, 0x55, 0x80, 0].into_iter().enumerate() {
        rig.guest.start_driver();
        let memory = rig.backend.memory().unwrap();
        let everything = vec![byte; usize::try_from(crate::testing::RAM).unwrap()];
        let scribble = || assert_eq!(rustix::io::pwrite(&memory, &everything, 0), Ok(everything.len()));
        // The backend writes while the rings run, during the stop, and after it.
        scribble();
        std::thread::scope(|scope| {
            scope.spawn(|| (0..8).for_each(|_| scribble()));
            rig.guest.write(0x70, 0);
        });
        scribble();
        assert_eq!(rig.guest.device.handle().phase(), PhaseReport::Idle, "round {round}");
    }
    rig.guest.start_driver();
    assert_eq!(rig.guest.device.handle().phase(), PhaseReport::Running);
    let bases = rig.backend.seen().into_iter().filter(|seen| seen.request == Request::SET_VRING_BASE);
    assert!(bases.map(|seen| seen.payload).all(|payload| payload == [0; 8]), "every driver begins anew");
    assert_eq!(rig.backend.breaches(), Vec::<String>::new());
}

fn open_descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

const LEAK_TEST: &str = "virtio::backend::vhost_user::faults::descriptors_come_back_after_every_fault";

#[test]
fn no_fault_leaks_a_descriptor() {
    // The count of descriptors needs a process of its own.
    let me = std::env::current_exe().unwrap();
    let run = Command::new(me).args(["--exact", "--ignored", LEAK_TEST]).output().unwrap();
    let text = String::from_utf8_lossy(&run.stdout);
    assert!(run.status.success() && text.contains("1 passed"), "{text}");
}

#[test]
#[ignore = "counts descriptors: run by no_fault_leaks_a_descriptor in a process of its own"]
fn descriptors_come_back_after_every_fault() {
    let before = open_descriptors();
    let stop = [(Request::GET_VRING_BASE, 0), (Request::RESET_DEVICE, 0)];
    let requests: Vec<_> = START.into_iter().chain(stop).collect();
    all_at_once(&cases(&requests, |_, _| true), |((request, nth), act)| {
        let rig = rig(Script::normal().on_nth(*request, *nth, act.clone()));
        rig.guest.start_driver();
        rig.guest.write(0x70, 0);
        assert!(rig.is_broken());
    });
    assert_eq!(open_descriptors(), before);
    let rig = rig(Script::normal());
    rig.guest.start_driver();
    let running = open_descriptors();
    for _ in 0..50 {
        rig.guest.write(0x70, 0);
        rig.guest.start_driver();
    }
    assert_eq!(rig.guest.device.handle().stats().activations, 51);
    assert_eq!(open_descriptors(), running);
}

//! A vfio-user server that frames, closes, delays and introduces itself wrong, one way a row: each is named, takes
//! bounded time, leaks nothing, and is either the end of the connection, or a refusal after which it goes on, or
//! harmless.

#![cfg(test)]

mod support;

use std::os::fd::AsFd;
use std::sync::PoisonError;
use std::time::Duration;

use support::open_fds;
use support::vfio_user::End::{Fails, Lost, LostAnywhere, Works};
use support::vfio_user::{ALONE, BRIEF, End, PATIENT, row};
use transport::peer::deadline::{Deadline, wait_readable};
use transport::peer::{Cause, Limits};
use transport::testing::FdKind;
use transport::testing::vfio_user::{Act, Offer, Script, ScriptedServer};
use transport::vfio_user::message::Command;
use transport::vfio_user::{Client, RegionIndex};

type C = Command;

/// A few of each kind of command: before the device, answered by a struct, by nothing, by data.
const STEPS: [Command; 9] = [
    C::VERSION,
    C::DEVICE_GET_INFO,
    C::DEVICE_GET_REGION_INFO,
    C::DMA_MAP,
    C::DEVICE_SET_IRQS,
    C::REGION_READ,
    C::DEVICE_RESET,
    C::DEVICE_FEATURE,
    C::DMA_UNMAP,
];

fn at_every_step(act: Act, end: impl Fn(Command) -> End) {
    for command in STEPS {
        let what = format!("{command} {act:?}");
        row(&what, Offer::default, Script::normal().on(command, act.clone()), PATIENT, &end(command));
    }
}

#[test]
fn the_normal_role_works_with_and_without_a_twin_socket() {
    row("normal", Offer::default, Script::normal(), PATIENT, &Works);
    row("twin", || Offer { twin: true, ..Offer::default() }, Script::normal(), PATIENT, &Works);
}

#[test]
fn replies_in_the_wrong_frame_end_the_connection() {
    at_every_step(Act::Id(0x4000), |_| LostAnywhere("an answer to nothing"));
    at_every_step(Act::As(Command(4711)), |_| LostAnywhere("with a message of request 4711"));
    for flags in [2, 0xf, 0x11, 0x31, 0x41, 0x8000_0001, u32::MAX] {
        at_every_step(Act::Flags(flags), |_| LostAnywhere("with flags"));
    }
    for size in [0, 1, 15] {
        at_every_step(Act::ClaimSize(size), |command| Lost(command, "bytes where 16"));
    }
    for size in [16 << 20, 0x8000_0000, u32::MAX] {
        at_every_step(Act::ClaimSize(size), |command| Lost(command, "bytes where 16"));
    }
    at_every_step(Act::Twice, |_| LostAnywhere("an answer to nothing"));
    at_every_step(Act::Flood(100_000), |_| LostAnywhere(""));
}

#[test]
fn stray_descriptors_end_the_connection_and_are_closed() {
    for count in [2, 9, 252] {
        at_every_step(Act::Fds(count), |_| LostAnywhere("file descriptors where"));
    }
    at_every_step(Act::FdsWithBody(3), |command| match command {
        // No body, no second message.
        C::DMA_MAP | C::DEVICE_SET_IRQS | C::DEVICE_RESET => Works,
        _ => LostAnywhere("file descriptors where"),
    });
}

#[test]
fn a_connection_that_closes_is_told_at_its_step() {
    at_every_step(Act::Close, |command| Lost(command, "closed the connection"));
    for bytes in [1, 15] {
        at_every_step(Act::CloseAfter(bytes), |command| match command {
            // Sent in two messages: the second may find the socket closed first.
            C::DEVICE_SET_IRQS => Lost(command, "closed the connection"),
            _ => Lost(command, "in the middle of a message"),
        });
    }
    row(
        "half a payload",
        Offer::default,
        Script::normal().on(C::DEVICE_GET_INFO, Act::CloseAfter(20)),
        PATIENT,
        &Lost(C::DEVICE_GET_INFO, "in the middle of a message"),
    );
    row(
        "the twin socket alone",
        || Offer { twin: true, ..Offer::default() },
        Script::normal().on(C::DMA_MAP, Act::CloseTwin),
        PATIENT,
        &Lost(C::DMA_MAP, "closed the connection"),
    );
}

#[test]
fn a_refusal_is_the_commands_own_and_the_connection_goes_on() {
    for errno in [0, 22, 95, u32::MAX] {
        for act in [Act::Refuse(errno), Act::RefuseWithoutReplyFlag(errno)] {
            at_every_step(act, |command| Fails(command, "refused"));
        }
    }
    for command in [C::DEVICE_GET_IRQ_INFO, C::REGION_WRITE_MULTI, C::MIG_DATA_READ, C::MIG_DATA_WRITE] {
        row(
            &format!("{command} refused"),
            Offer::default,
            Script::normal().on(command, Act::Refuse(22)),
            PATIENT,
            &Fails(command, "Invalid argument"),
        );
    }
}

#[test]
fn slow_dripping_and_late_answers_are_fine_within_the_deadline() {
    at_every_step(Act::Drip(Duration::ZERO), |_| Works);
    at_every_step(Act::Delay(Duration::from_millis(2)), |_| Works);
}

#[test]
fn silence_at_each_command_ends_at_the_deadline() {
    for command in C::ALL {
        if matches!(*command, C::REGION_WRITE | C::DMA_READ | C::DMA_WRITE) {
            continue;
        }
        for act in [Act::Silent, Act::StallAfter(7), Act::Flags(0)] {
            let what = format!("{command} {act:?}");
            let end = match act {
                // Before the version is agreed on, no command may come.
                Act::Flags(_) if *command == C::VERSION => Lost(*command, "with a message of request"),
                // Its reply has fds, which no command has.
                Act::Flags(_) if *command == C::DEVICE_GET_REGION_IO_FDS => {
                    Lost(*command, "file descriptors")
                }
                _ => Fails(*command, "did not answer"),
            };
            row(&what, Offer::default, Script::normal().on(*command, act), BRIEF, &end);
        }
    }
    let drip = Script::normal().on(C::DEVICE_GET_INFO, Act::Drip(Duration::from_millis(20)));
    row(
        "a drip past the deadline",
        Offer::default,
        drip,
        BRIEF,
        &Fails(C::DEVICE_GET_INFO, "did not answer"),
    );
}

#[test]
fn a_late_reply_is_discarded_and_never_taken_for_the_next_one() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let late = Act::Delay(BRIEF * 2);
    let script = Script::normal().on_nth(C::REGION_READ, 0, late);
    let (server, stream) = ScriptedServer::pair(Offer::default(), script).unwrap();
    let client = Client::from_stream(stream, "scripted", &Limits::new(PATIENT)).unwrap();
    client.write(RegionIndex(0), 0, &[1, 2, 3, 4, 5, 6, 7, 8]).unwrap();
    let mut data = [0; 4];
    let error = client.until(&Deadline::after(BRIEF)).read(RegionIndex(0), 0, &mut data).unwrap_err();
    assert!(error.is_silence() && matches!(error.cause(), Cause::Silent(_)), "{error}");
    client.read(RegionIndex(0), 4, &mut data).unwrap();
    assert_eq!(data, [5, 6, 7, 8]);
    assert_eq!(client.stats().late, 1);
    assert!(!client.is_lost());
    drop(server);
}

#[test]
fn versions_that_cannot_be_meant_end_the_connection() {
    let version = |payload: Vec<u8>, end: End| {
        let what = format!("VERSION {:?}", String::from_utf8_lossy(&payload[..payload.len().min(60)]));
        row(&what, Offer::default, Script::normal().on(C::VERSION, Act::Payload(payload)), PATIENT, &end);
    };
    for len in [0, 1, 3] {
        version(vec![0; len], Lost(C::VERSION, "bytes where"));
    }
    let with = |text: &[u8]| [&[0, 0, 1, 0], text].concat();
    for text in [
        &b"{}"[..],
        b"{\"capabilities\":{}}",
        b"{\"capab\0ilities\":{}}\0",
        b"\xff\xfe\0",
        b"[]\0",
        b"null\0",
        b"\"text\"\0",
        b"{\"capabilities\":[]}\0",
        b"{\"capabilities\":{\"max_msg_fds\":-1}}\0",
        b"{\"capabilities\":{\"max_msg_fds\":2.5}}\0",
        b"{\"capabilities\":{\"max_msg_fds\":\"8\"}}\0",
        b"{\"capabilities\":{\"twin_socket\":true}}\0",
    ] {
        version(with(text), Lost(C::VERSION, "answered VERSION with"));
    }
    for text in ["max_data_xfer_size\":0", "max_dma_maps\":0", "pgsizes\":0", "pgsizes\":3", "pgsizes\":2048"]
    {
        let text = format!("{{\"capabilities\":{{\"{text}}}}}\0");
        version(with(text.as_bytes()), Lost(C::VERSION, "answered VERSION with"));
    }
    for size in [1, 7] {
        let text = format!("{{\"capabilities\":{{\"max_data_xfer_size\":{size}}}}}\0");
        version(with(text.as_bytes()), Fails(C::VERSION, "a register has 8"));
    }
    version(with(&[b"[".repeat(60_000), b"\0".to_vec()].concat()), Lost(C::VERSION, "not JSON"));
    version(with(&[b"{\"a\":".repeat(10_000), b"\0".to_vec()].concat()), Lost(C::VERSION, "not JSON"));
    version(with(&vec![b' '; 1 << 20]), Lost(C::VERSION, "bytes where"));
    version([&[1, 0, 0, 0], &b"{}\0"[..]].concat(), Fails(C::VERSION, "it speaks version 1.0"));
    version([&[0, 0, 2, 0], &b"{}\0"[..]].concat(), Lost(C::VERSION, "minor version"));
    for twin in
        ["\"supported\":true", "\"supported\":true,\"fd_index\":0", "\"supported\":true,\"fd_index\":7"]
    {
        let text = format!("{{\"capabilities\":{{\"twin_socket\":{{{twin}}}}}}}\0");
        version(with(text.as_bytes()), Lost(C::VERSION, "fd_index"));
    }
    let offer = || Offer { twin: true, ..Offer::default() };
    let extra = Script::normal().on(C::VERSION, Act::NoFds);
    row("a twin socket without its fd", offer, extra, PATIENT, &Lost(C::VERSION, "fd_index"));
    for kind in [FdKind::Eventfd, FdKind::Pipe, FdKind::Directory, FdKind::Path, FdKind::Memfd(4096)] {
        let wrong = Script::normal().on(C::VERSION, Act::FdOf(kind));
        let end = Lost(C::VERSION, "a twin socket that is none");
        row(&format!("{kind:?} for a twin socket"), offer, wrong, PATIENT, &end);
    }
    let not = Script::normal().on(
        C::VERSION,
        Act::Payload(with(b"{\"capabilities\":{\"twin_socket\":{\"supported\":true,\"fd_index\":1}}}\0")),
    );
    row("a twin index past the fds", offer, not, PATIENT, &Lost(C::VERSION, "fd_index"));
    let early = [0u8, 0, 11, 0, 32, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0].to_vec();
    row(
        "a command before the version",
        Offer::default,
        Script::normal().on(C::VERSION, Act::Before(early)),
        PATIENT,
        &LostAnywhere("with a message of request 11"),
    );
}

#[test]
fn a_twin_socket_whose_other_end_is_gone_is_noticed() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let before = open_fds();
    let dead = Script::normal().on(C::VERSION, Act::FdOf(FdKind::Socket));
    let (server, stream) = ScriptedServer::pair(Offer { twin: true, ..Offer::default() }, dead).unwrap();
    let client = Client::from_stream(stream, "scripted", &Limits::new(PATIENT)).unwrap();
    // Whoever waits for an answer may have it before the other socket is looked at; the receiver looks at both.
    let mut receiver = client.receiver().unwrap();
    wait_readable(receiver.as_fd(), &Deadline::after(PATIENT)).unwrap();
    let error = receiver.serve().unwrap_err();
    assert!(error.is_fatal() && client.is_lost() && error.to_string().contains("closed"), "{error}");
    assert!(client.read(RegionIndex(0), 0, &mut [0; 4]).unwrap_err().is_fatal());
    drop(receiver);
    drop((client, server));
    assert_eq!(open_fds(), before);
}

#[test]
fn versions_of_odd_numbers_are_lowered_and_work() {
    for capabilities in [
        "",
        "\"max_msg_fds\":2147483648,\"write_multiple\":true",
        "\"max_msg_fds\":1,\"max_data_xfer_size\":9223372036854775808,\"write_multiple\":true",
        "\"max_data_xfer_size\":8,\"write_multiple\":true",
        "\"max_msg_fds\":1,\"max_msg_fds\":4,\"write_multiple\":true",
        "\"future\":{\"a\":[1,2,{\"b\":null}]},\"write_multiple\":true",
        "\"pgsizes\":2097152,\"write_multiple\":true",
    ] {
        let offer = || Offer { capabilities: capabilities.to_owned(), ..Offer::default() };
        let end =
            if capabilities.is_empty() { Fails(C::REGION_WRITE_MULTI, "does not offer") } else { Works };
        row(capabilities, offer, Script::normal(), PATIENT, &end);
    }
    let none = || Offer { capabilities: "\"max_msg_fds\":0".to_owned(), ..Offer::default() };
    row("no fds at all", none, Script::normal(), PATIENT, &Fails(C::DMA_MAP, "does not offer"));
    let few = || Offer { capabilities: "\"pgsizes\":1073741824".to_owned(), ..Offer::default() };
    row("pages of 1 GiB only", few, Script::normal(), PATIENT, &Fails(C::DMA_MAP, "pages of 0x40000000"));
}

#[test]
fn devices_that_claim_the_impossible_are_refused() {
    let info = |regions: u32, irqs: u32| {
        Act::Payload([16, 3, regions, irqs].into_iter().flat_map(u32::to_ne_bytes).collect())
    };
    for (regions, irqs) in [(u32::MAX, 5), (1025, 5), (9, u32::MAX)] {
        row(
            &format!("{regions} regions, {irqs} interrupt indexes"),
            Offer::default,
            Script::normal().on(C::DEVICE_GET_INFO, info(regions, irqs)),
            PATIENT,
            &Lost(C::DEVICE_GET_INFO, "count"),
        );
    }
    for (regions, irqs) in [(0, 0), (7, 5)] {
        let script = Script::normal().on(C::DEVICE_GET_INFO, info(regions, irqs));
        row(&format!("{regions} regions"), Offer::default, script, PATIENT, &Works);
    }
    for len in [0, 15] {
        let script = Script::normal().on(C::DEVICE_GET_INFO, Act::Payload(vec![0; len]));
        row("too short", Offer::default, script, PATIENT, &Lost(C::DEVICE_GET_INFO, "bytes where"));
    }
    for count in [2049, u32::MAX] {
        let patch = Act::Patch(12, count.to_ne_bytes().to_vec());
        let script = Script::normal().on(C::DEVICE_GET_IRQ_INFO, patch);
        let end = Lost(C::DEVICE_GET_IRQ_INFO, "interrupt count");
        row(&format!("{count} interrupts"), Offer::default, script, PATIENT, &end);
    }
    let other = Script::normal().on(C::DEVICE_GET_IRQ_INFO, Act::Patch(8, vec![9]));
    let end = Lost(C::DEVICE_GET_IRQ_INFO, "interrupt index 0x9");
    row("another interrupt index", Offer::default, other, PATIENT, &end);
}

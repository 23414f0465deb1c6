use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::*;
use crate::testing::Recorder;

fn call() -> Arc<Call> {
    Arc::new(Call::new().unwrap())
}

/// Serves the lines until there is nothing to serve, and checks how often the line was raised since the last
/// call.
fn raised(lines: &IntxLines, machine: &Recorder, gsi: u32, expected: u64) {
    serve(lines);
    let count: u64 = machine.take_raised().iter().filter(|(line, _)| *line == gsi).map(|(_, n)| n).sum();
    assert_eq!(count, expected, "line {gsi}");
}

fn is_signalled(lines: &IntxLines) -> bool {
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut [PollFd::from_borrowed_fd(lines.as_fd(), PollFlags::IN)], Some(&now)).unwrap() > 0
}

fn serve(lines: &IntxLines) {
    for _ in 0..10 {
        if !is_signalled(lines) {
            return;
        }
        lines.serve();
    }
    panic!("the lines are never served");
}

#[test]
fn signals_while_the_line_is_high_raise_it_once_more_after_its_end() {
    let machine = Recorder::default();
    let lines = IntxLines::new(machine.ports().interrupts).unwrap();
    let (first, second) = (call(), call());
    let _guards = [&first, &second].map(|call| lines.connect(21, Arc::clone(call)).unwrap());
    first.ring().unwrap();
    raised(&lines, &machine, 21, 1);
    // The signal may come from either function: it is unknown whether the guest has read that function's
    // status already.
    first.ring().unwrap();
    second.ring().unwrap();
    serve(&lines);
    raised(&lines, &machine, 21, 0);
    lines.status_read(21);
    machine.end_of_interrupt(21);
    raised(&lines, &machine, 21, 1);
    lines.status_read(21);
    machine.end_of_interrupt(21);
    serve(&lines);
    second.ring().unwrap();
    raised(&lines, &machine, 21, 1);
}

#[test]
fn a_line_that_is_lowered_before_the_guest_has_looked_is_raised_again() {
    let machine = Recorder::default();
    let lines = IntxLines::new(machine.ports().interrupts).unwrap();
    let call = call();
    let guard = lines.connect(21, Arc::clone(&call)).unwrap();
    call.ring().unwrap();
    raised(&lines, &machine, 21, 1);
    // As when the pin was masked while the line was raised.
    for _ in 0..3 {
        machine.end_of_interrupt(21);
        raised(&lines, &machine, 21, 1);
    }
    lines.status_read(21);
    machine.end_of_interrupt(21);
    call.ring().unwrap();
    raised(&lines, &machine, 21, 1);
    // The line is not raised again for a source that was disconnected.
    drop(guard);
    machine.end_of_interrupt(21);
    let other = self::call();
    let _guard = lines.connect(22, Arc::clone(&other)).unwrap();
    other.ring().unwrap();
    serve(&lines);
    assert_eq!(machine.take_raised(), [(21, 0), (22, 1)]);
}

#[test]
fn lines_are_apart_and_a_disconnected_call_keeps_its_signal() {
    let machine = Recorder::default();
    let lines = IntxLines::new(machine.ports().interrupts).unwrap();
    let (first, second) = (call(), call());
    let guard = lines.connect(20, Arc::clone(&first)).unwrap();
    let _other = lines.connect(22, Arc::clone(&second)).unwrap();
    second.ring().unwrap();
    raised(&lines, &machine, 22, 1);
    drop(guard);
    first.ring().unwrap();
    raised(&lines, &machine, 20, 0);
    assert_eq!(first.take().unwrap(), 1);
    first.ring().unwrap();
    let _guard = lines.connect(20, Arc::clone(&first)).unwrap();
    raised(&lines, &machine, 20, 1);
}

#[test]
fn a_source_that_was_taken_away_is_not_watched_and_the_lines_end() {
    let machine = Recorder::default();
    let lines = IntxLines::new(machine.ports().interrupts).unwrap();
    let call = call();
    drop(lines.connect(20, Arc::clone(&call)).unwrap());
    call.ring().unwrap();
    assert!(!is_signalled(&lines));
    drop(lines);
    assert_eq!(Arc::strong_count(&call), 1);
    assert!(machine.take_raised().is_empty(), "the line is given back");
}

#[test]
fn a_refused_line_is_told() {
    let machine = Recorder::default();
    machine.refuse_routes();
    let lines = IntxLines::new(machine.ports().interrupts).unwrap();
    assert!(lines.connect(20, call()).is_err());
}

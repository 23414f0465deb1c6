use std::time::{Duration, Instant};

use super::*;
use crate::testing::Recorder;

fn call() -> Arc<Call> {
    Arc::new(Call::new().unwrap())
}

/// Waits until the line was raised that often since the last time.
fn raised(machine: &Recorder, gsi: u32, expected: u64) {
    let until = Instant::now() + Duration::from_secs(20);
    let mut count = 0;
    while Instant::now() < until {
        count += machine.take_raised().iter().filter(|(line, _)| *line == gsi).map(|(_, n)| n).sum::<u64>();
        if count >= expected {
            assert_eq!(count, expected, "raised too often");
            return;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    panic!("line {gsi} was raised {count} times, not {expected}");
}

/// Until the thread has looked at everything.
fn settle(lines: &Arc<IntxLines>, calls: &[&Arc<Call>]) {
    let until = Instant::now() + Duration::from_secs(20);
    let idle = |call: &&Arc<Call>| {
        let mut fds = [PollFd::from_borrowed_fd(call.as_fd(), PollFlags::IN)];
        let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut fds, Some(&now)).unwrap() == 0
    };
    while !calls.iter().all(idle) {
        assert!(Instant::now() < until, "nobody takes the signals");
        std::thread::sleep(Duration::from_millis(1));
    }
    drop(lock(&lines.state));
}

#[test]
fn signals_while_the_line_is_high_raise_it_once_more_after_its_end() {
    let machine = Recorder::default();
    let lines = IntxLines::new(machine.ports().interrupts).unwrap();
    let (first, second) = (call(), call());
    let _guards = [&first, &second].map(|call| lines.connect(21, Arc::clone(call)).unwrap());
    first.ring().unwrap();
    raised(&machine, 21, 1);
    // Of whichever function they are: nobody knows whether the guest has looked there already.
    first.ring().unwrap();
    second.ring().unwrap();
    settle(&lines, &[&first, &second]);
    raised(&machine, 21, 0);
    lines.status_read(21);
    machine.end_of_interrupt(21);
    raised(&machine, 21, 1);
    lines.status_read(21);
    machine.end_of_interrupt(21);
    settle(&lines, &[&first, &second]);
    second.ring().unwrap();
    raised(&machine, 21, 1);
}

#[test]
fn a_line_that_is_lowered_before_the_guest_has_looked_is_raised_again() {
    let machine = Recorder::default();
    let lines = IntxLines::new(machine.ports().interrupts).unwrap();
    let call = call();
    let guard = lines.connect(21, Arc::clone(&call)).unwrap();
    call.ring().unwrap();
    raised(&machine, 21, 1);
    // As when the pin was masked.
    for _ in 0..3 {
        machine.end_of_interrupt(21);
        raised(&machine, 21, 1);
    }
    lines.status_read(21);
    machine.end_of_interrupt(21);
    call.ring().unwrap();
    raised(&machine, 21, 1);
    // Who does not interrupt any more has nothing to be looked at.
    drop(guard);
    machine.end_of_interrupt(21);
    let other = self::call();
    let _guard = lines.connect(22, Arc::clone(&other)).unwrap();
    other.ring().unwrap();
    // Both lines are served in one go.
    let until = Instant::now() + Duration::from_secs(20);
    let mut seen = Vec::new();
    while !seen.contains(&(22, 1)) {
        assert!(Instant::now() < until, "nobody serves the lines");
        seen.extend(machine.take_raised());
    }
    assert!(!seen.iter().any(|(gsi, times)| *gsi == 21 && *times > 0), "{seen:?}");
}

#[test]
fn lines_are_apart_and_a_disconnected_call_keeps_its_signal() {
    let machine = Recorder::default();
    let lines = IntxLines::new(machine.ports().interrupts).unwrap();
    let (first, second) = (call(), call());
    let guard = lines.connect(20, Arc::clone(&first)).unwrap();
    let _other = lines.connect(22, Arc::clone(&second)).unwrap();
    second.ring().unwrap();
    raised(&machine, 22, 1);
    drop(guard);
    first.ring().unwrap();
    raised(&machine, 20, 0);
    assert_eq!(first.take().unwrap(), 1);
    first.ring().unwrap();
    let _guard = lines.connect(20, Arc::clone(&first)).unwrap();
    raised(&machine, 20, 1);
}

#[test]
fn the_thread_ends_with_the_lines() {
    let machine = Recorder::default();
    let lines = IntxLines::new(machine.ports().interrupts).unwrap();
    let call = call();
    drop(lines.connect(20, Arc::clone(&call)).unwrap());
    let weak = Arc::downgrade(&lines);
    drop(lines);
    let until = Instant::now() + Duration::from_secs(20);
    while weak.strong_count() > 0 || Arc::strong_count(&call) > 1 {
        assert!(Instant::now() < until, "the thread holds on");
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(machine.take_raised().is_empty(), "the line is given back");
}

#[test]
fn a_refused_line_is_told() {
    let machine = Recorder::default();
    machine.refuse_routes();
    let lines = IntxLines::new(machine.ports().interrupts).unwrap();
    assert!(lines.connect(20, call()).is_err());
}

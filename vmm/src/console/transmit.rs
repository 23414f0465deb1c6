//! The serial port's output on its way to the reader. vCPU threads send bytes; the control loop passes on the
//! bytes that had to wait.

use std::io::Write;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use devices::serial::Transmitter;

use crate::console::outlet::Outlet;

/// The number of bytes that may wait for a reader before the guest is slowed down. A guest that sends on
/// although its transmitter is not empty may add the same number again. Without a reader, this many of the
/// newest bytes are kept.
const ROOM: usize = 1 << 20;

/// The longest time for which a vCPU is held that sends a byte although its transmitter is not empty.
const HOLD: Duration = Duration::from_millis(20);

/// The destination of the output, and the bytes that wait. The lock must never be held over a wait.
pub(crate) struct Transmit {
    sending: Mutex<Sending>,
    room: Condvar,
}

struct Sending {
    to: To,
    /// The number of bytes that were dropped unread.
    lost: usize,
    failed: bool,
}

enum To {
    /// A sink of the library's caller. The caller is responsible for the waits of its sink.
    Sink(Arc<Mutex<dyn Write + Send>>),
    Outlet(Outlet),
}

impl Sending {
    fn is_full(&self) -> bool {
        matches!(&self.to, To::Outlet(outlet) if outlet.waiting() >= ROOM && !outlet.is_nowhere())
    }

    /// Passes bytes on to the reader, and counts the bytes that are lost.
    fn send(&mut self, bytes: &[u8]) {
        let sent = match &mut self.to {
            To::Sink(sink) => {
                let mut sink = sink.lock().unwrap_or_else(PoisonError::into_inner);
                sink.write_all(bytes).and_then(|()| sink.flush())
            }
            To::Outlet(outlet) => outlet.push(bytes),
        };
        match (sent, &mut self.to) {
            (Ok(()), To::Outlet(outlet)) => {
                let limit = if outlet.is_nowhere() { ROOM } else { 2 * ROOM };
                let forgotten = outlet.forget(limit);
                if forgotten > 0 && self.lost == 0 {
                    log::warn!("the console is not read: its oldest output is lost from here on");
                }
                self.lost += forgotten;
                if std::mem::take(&mut self.failed) {
                    log::warn!("the console can be written again; {} bytes are lost", self.lost);
                    self.lost = 0;
                }
            }
            (Ok(()), To::Sink(_)) => {}
            (Err(error), to) => {
                self.lost += match to {
                    To::Outlet(outlet) => outlet.forget(0),
                    To::Sink(_) => bytes.len(),
                };
                if !std::mem::replace(&mut self.failed, true) {
                    log::warn!("the console cannot be written, and its output is lost from here on: {error}");
                }
            }
        }
    }
}

impl Transmit {
    fn new(to: To) -> Self {
        Self { sending: Mutex::new(Sending { to, lost: 0, failed: false }), room: Condvar::new() }
    }

    /// Output to a sink of the caller's.
    pub(crate) fn to_sink(sink: Arc<Mutex<dyn Write + Send>>) -> Self {
        Self::new(To::Sink(sink))
    }

    /// Output to a descriptor.
    pub(crate) fn to_outlet(outlet: Outlet) -> Self {
        Self::new(To::Outlet(outlet))
    }

    fn lock(&self) -> MutexGuard<'_, Sending> {
        self.sending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends the output to another client, or to no client.
    pub(crate) fn lead_to(&self, client: Option<OwnedFd>) {
        let mut sending = self.lock();
        if let To::Outlet(outlet) = &mut sending.to {
            outlet.lead_to(client);
        }
        sending.send(&[]);
        self.room.notify_all();
    }

    /// Called when the descriptor takes bytes again. True when the guest was slowed down until now and there
    /// is room again.
    pub(crate) fn pass_on(&self) -> bool {
        let mut sending = self.lock();
        let was_full = sending.is_full();
        sending.send(&[]);
        self.room.notify_all();
        was_full && !sending.is_full()
    }

    /// Calls `act` with the descriptor that becomes writable when more bytes can be passed on, if there is
    /// one.
    pub(crate) fn with_fd<T>(&self, act: impl FnOnce(BorrowedFd<'_>) -> T) -> Option<T> {
        match &self.lock().to {
            To::Outlet(outlet) => outlet.fd().map(act),
            To::Sink(_) => None,
        }
    }

    /// The number of bytes that wait for a present reader.
    pub(crate) fn waiting(&self) -> usize {
        match &self.lock().to {
            To::Outlet(outlet) if !outlet.is_nowhere() => outlet.waiting(),
            _ => 0,
        }
    }

    /// Called when the machine has ended: logs how many bytes are lost.
    pub(crate) fn finish(&self) {
        let mut sending = self.lock();
        sending.send(&[]);
        let To::Outlet(outlet) = &sending.to else { return };
        let rest = outlet.waiting();
        if rest > 0 || sending.lost > 0 {
            let lost = sending.lost;
            log::warn!("the last {rest} bytes of the console and {lost} before are lost: nobody read them");
        }
    }
}

impl Transmitter for Transmit {
    fn send(&self, byte: u8) {
        self.lock().send(&[byte]);
    }

    fn is_full(&self) -> bool {
        self.lock().is_full()
    }

    fn hold(&self) {
        let full = |sending: &mut Sending| sending.is_full();
        drop(self.room.wait_timeout_while(self.lock(), HOLD, full).unwrap_or_else(PoisonError::into_inner));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    fn feed(transmit: &Transmit, bytes: usize) {
        (0..bytes).for_each(|n| transmit.send(u8::try_from(n % 251).unwrap()));
    }

    #[test]
    fn the_first_client_gets_what_was_printed_before_it_came() {
        let transmit = Transmit::to_outlet(Outlet::nowhere());
        feed(&transmit, 1000);
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        transmit.lead_to(Some(ours.into()));
        let mut got = [0; 1000];
        theirs.read_exact(&mut got).unwrap();
        assert_eq!(usize::from(got[999]), 999 % 251);
    }

    #[test]
    fn without_a_client_the_newest_output_is_kept_and_the_guest_is_not_slowed_down() {
        let transmit = Transmit::to_outlet(Outlet::nowhere());
        feed(&transmit, ROOM + 100);
        assert!(!transmit.is_full());
        assert!(matches!(&transmit.lock().to, To::Outlet(outlet) if outlet.waiting() == ROOM));
        assert_eq!(transmit.lock().lost, 100);
    }

    #[test]
    fn a_client_that_does_not_read_slows_the_guest_down_until_it_reads() {
        let transmit = Transmit::to_outlet(Outlet::nowhere());
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        transmit.lead_to(Some(ours.into()));
        let mut sent = 0;
        while !transmit.is_full() {
            feed(&transmit, 251);
            sent += 251;
        }
        assert!(!transmit.pass_on());
        let begun = std::time::Instant::now();
        transmit.hold();
        assert!(begun.elapsed() >= HOLD);
        let (mut got, mut resumed) = (0, false);
        while got < sent {
            let mut some = [0; 1 << 16];
            let length = theirs.read(&mut some).unwrap();
            assert!(some[..length].iter().zip(got..).all(|(byte, n)| usize::from(*byte) == n % 251));
            got += length;
            resumed |= transmit.pass_on();
        }
        assert!(resumed && !transmit.is_full());
        assert_eq!(transmit.lock().lost, 0);
    }

    #[test]
    fn output_that_fails_is_counted_and_does_not_stop_the_guest() {
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        drop(reader);
        let outlet = Outlet::stream(std::os::fd::AsFd::as_fd(&writer)).unwrap();
        let transmit = Transmit::to_outlet(outlet);
        feed(&transmit, 10);
        assert_eq!(transmit.lock().lost, 10);
    }
}

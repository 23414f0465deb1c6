//! Reaches a running machine from another thread: commands go to the machine, events come from it.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, SyncSender, TrySendError, channel, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};

use devices::virtio::PhaseReport;

use crate::life::gate::Request;
use crate::stats::Stats;

/// How a machine ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// The guest powered it off.
    PowerOff,
    /// The guest reset it, and the configuration says that a reset ends the machine.
    Reset,
    /// The user or a [`Handle`] asked for the end.
    Quit,
    /// A signal with this number asked for the end.
    Signal(i32),
    /// The guest crashed. The first line of the text gives the reason, the other lines show the registers.
    Crash(String),
    /// The guest's kernel panicked and reported this through the pvpanic device.
    Panicked,
}

impl End {
    pub(crate) fn name(&self) -> &'static str {
        match self {
            End::PowerOff => "power-off",
            End::Reset => "reset",
            End::Quit => "quit",
            End::Signal(_) => "signal",
            End::Crash(_) => "crash",
            End::Panicked => "panicked",
        }
    }
}

impl From<Request> for End {
    fn from(request: Request) -> Self {
        match request {
            Request::Reset => End::Reset,
            Request::PowerOff => End::PowerOff,
            Request::Quit => End::Quit,
            Request::Signal(signal) => End::Signal(signal),
            Request::Crash(report) => End::Crash(report),
            Request::Panicked => End::Panicked,
        }
    }
}

/// A change in the life of a machine.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// A device has lost its backend. The device is recovering: it tries to find a backend again.
    DeviceLost {
        /// The device's name.
        id: String,
    },
    /// A device is broken: it has lost its peer, or the peer misbehaved.
    DeviceBroken {
        /// The device's name.
        id: String,
        /// The reason.
        why: String,
    },
    /// The backend of a device is found again.
    DeviceRecovered {
        /// The device's name.
        id: String,
    },
    /// The guest reset the machine. The machine starts again.
    GuestReset,
    /// The machine has ended.
    Ended(End),
}

/// The number of events that wait for one receiver. When so many wait, later events are lost to this
/// receiver.
const EVENTS: usize = 4096;

/// The receivers of events.
#[derive(Debug, Default)]
pub(crate) struct Listeners {
    senders: Mutex<Vec<SyncSender<Event>>>,
    /// The machine is ending. Devices lose their peers because of that, so such losses are not reported.
    ending: AtomicBool,
}

impl Listeners {
    /// Sends the event to every receiver. Called on any thread; never waits.
    pub(crate) fn tell(&self, event: &Event) {
        let mut listeners = self.senders.lock().unwrap_or_else(PoisonError::into_inner);
        listeners.retain(|listener| {
            !matches!(listener.try_send(event.clone()), Err(TrySendError::Disconnected(_)))
        });
    }
}

impl Listeners {
    /// Sends the new state of a device to every receiver, unless the machine is ending.
    pub(crate) fn tell_of(&self, id: &str, state: PhaseReport) {
        if self.ending.load(Ordering::Relaxed) {
            return;
        }
        let id = id.to_owned();
        self.tell(&match state {
            PhaseReport::Broken(why) => Event::DeviceBroken { id, why },
            PhaseReport::Recovering(_) => Event::DeviceLost { id },
            _ => Event::DeviceRecovered { id },
        });
    }

    /// The machine is ending: from now on the loss of a peer is not reported.
    pub(crate) fn end(&self) {
        self.ending.store(true, Ordering::Relaxed);
    }
}

/// A command to the machine.
#[derive(Debug)]
pub(crate) enum Command {
    /// End, as at Ctrl-A x.
    Quit,
    /// Send the statistics so far.
    Stats(Sender<Stats>),
}

/// The machine's end of the channel to its handles.
#[derive(Debug)]
pub(crate) struct Mailbox {
    commands: Receiver<Command>,
    wake: UnixStream,
    /// The receivers of events.
    pub(crate) listeners: Arc<Listeners>,
}

impl Mailbox {
    /// A socket that is readable when there are commands.
    pub(crate) fn wake(&self) -> &UnixStream {
        &self.wake
    }

    /// Takes the commands that have arrived.
    pub(crate) fn take(&mut self) -> Vec<Command> {
        if let Err(error) = self.wake.read(&mut [0; 64]) {
            log::debug!("cannot read the wake-up of a command: {error}");
        }
        self.commands.try_iter().collect()
    }
}

/// Reaches a machine from another thread.
#[derive(Clone, Debug)]
pub struct Handle {
    commands: Sender<Command>,
    wake: Arc<UnixStream>,
    listeners: Arc<Listeners>,
}

impl Handle {
    pub(crate) fn new() -> io::Result<(Self, Mailbox)> {
        let (ours, wake) = UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        wake.set_nonblocking(true)?;
        let (sender, commands) = channel();
        let listeners = Arc::new(Listeners::default());
        let handle = Handle { commands: sender, wake: Arc::new(ours), listeners: Arc::clone(&listeners) };
        Ok((handle, Mailbox { commands, wake, listeners }))
    }

    /// Sends a command. False when the machine has ended.
    fn send(&self, command: Command) -> bool {
        // The socket may be full of wake-ups that the machine has not read. They wake the machine for this
        // command too.
        self.commands.send(command).is_ok() && {
            let woken = (&*self.wake).write(&[0]);
            woken.map_or_else(|error| error.kind() == io::ErrorKind::WouldBlock, |_| true)
        }
    }

    /// Asks the machine to end, as Ctrl-A x does. Harmless when it has ended already.
    pub fn quit(&self) {
        if !self.send(Command::Quit) {
            log::debug!("the machine has ended already");
        }
    }

    /// The statistics so far. Waits until the machine runs. `None` when the machine has ended; its
    /// [`Outcome`](crate::machine::Outcome) then has the statistics.
    pub fn stats(&self) -> Option<Stats> {
        let (reply, stats) = channel();
        self.send(Command::Stats(reply)).then(|| stats.recv().ok()).flatten()
    }

    /// The events of the machine from now on. While 4096 events wait in the receiver, further events are lost
    /// to it.
    pub fn events(&self) -> Receiver<Event> {
        let (sender, events) = sync_channel(EVENTS);
        self.listeners.senders.lock().unwrap_or_else(PoisonError::into_inner).push(sender);
        events
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_listener_hears_until_it_is_gone_or_full() {
        let (handle, mailbox) = Handle::new().unwrap();
        let listeners = &mailbox.listeners;
        let (one, two) = (handle.events(), handle.events());
        listeners.tell(&Event::GuestReset);
        drop(two);
        (0..2 * EVENTS).for_each(|_| listeners.tell(&Event::Ended(End::Quit)));
        assert_eq!(listeners.senders.lock().unwrap().len(), 1);
        assert_eq!(one.recv().unwrap(), Event::GuestReset);
        assert_eq!(one.try_iter().count(), EVENTS - 1);
    }

    #[test]
    fn commands_arrive_in_order_and_a_machine_that_is_gone_is_told_of() {
        let (handle, mut mailbox) = Handle::new().unwrap();
        (0..3).for_each(|_| handle.quit());
        assert_eq!(mailbox.take().len(), 3);
        let another = handle.clone();
        let asker = std::thread::spawn(move || another.stats());
        loop {
            if let Some(Command::Stats(reply)) = mailbox.take().pop() {
                reply.send(Stats { boots: 7, ..Stats::default() }).unwrap();
                break;
            }
        }
        assert_eq!(asker.join().unwrap().unwrap().boots, 7);
        drop(mailbox);
        assert!(handle.stats().is_none());
    }
}

//! Waiting for replies and for room to send. One of the waiting threads reads the socket for all of them.
//!
//! Must never wait past the deadline. A thread that stops reading must never leave the other waiting threads
//! without a reader.

use std::sync::PoisonError;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::link::{Interest, Link, Side, lock};
use super::shared::{ClientStats, Shared, Submitted};
use super::table::Reply;
use crate::peer::deadline::Deadline;
use crate::peer::{Cause, Error, Step};
use crate::vfio_user::message::Command;

/// Bytes of commands that may wait for room in the socket. While more wait, the caller waits.
const COMMANDS_MOST: usize = 256 << 10;

/// How often a thread that waits for room checks whether it should read the socket instead.
const ROOM_STEP: Duration = Duration::from_millis(5);

impl Shared {
    /// Waits until `submitted` is answered. After the deadline, the reply is discarded on arrival.
    pub(crate) fn wait(&self, submitted: &Submitted, deadline: &Deadline) -> Result<Reply, Error> {
        let begin = Instant::now();
        let outcome = match self.wait_sent(submitted.command, submitted.number, deadline) {
            Ok(()) => self.wait_answered(submitted, deadline),
            Err(error) => {
                self.abandon(submitted.id);
                Err(error)
            }
        };
        let took = begin.elapsed();
        self.count(|stats| {
            let ClientStats { exchanges, refusals, .. } = stats;
            exchanges.waited(took);
            match &outcome {
                Ok(_) => exchanges.answers = exchanges.answers.saturating_add(1),
                Err(error) if matches!(error.cause(), Cause::Refused(_)) => {
                    exchanges.answers = exchanges.answers.saturating_add(1);
                    *refusals = refusals.saturating_add(1);
                }
                Err(_) => exchanges.failures = exchanges.failures.saturating_add(1),
            }
        });
        outcome
    }

    fn wait_answered(&self, submitted: &Submitted, deadline: &Deadline) -> Result<Reply, Error> {
        let Submitted { id, command, .. } = *submitted;
        let mut table = lock(&self.table);
        loop {
            if let Some(outcome) = table.take(id) {
                return outcome;
            }
            let Some(left) = deadline.remaining() else {
                table.abandon(id);
                return Err(self.error(command, Cause::Silent(deadline.limit())));
            };
            if table.led {
                table.followers = table.followers.saturating_add(1);
                let waited = self.answered.wait_timeout(table, left);
                table = waited.unwrap_or_else(PoisonError::into_inner).0;
                table.followers = table.followers.saturating_sub(1);
                continue;
            }
            table.led = true;
            drop(table);
            let lead = Lead::begin(self);
            self.lead(deadline, &mut || lock(&self.table).is_answered(id));
            drop(lead);
            table = lock(&self.table);
        }
    }

    /// Waits until message `number` was sent completely.
    pub(crate) fn wait_sent(&self, command: Command, number: u64, deadline: &Deadline) -> Result<(), Error> {
        let sent = || lock(&self.main.outgoing).is_sent(number);
        self.wait_out(command, &sent, deadline)
    }

    /// Waits until there is room for another command.
    pub(crate) fn make_room(&self, command: Command, deadline: &Deadline) -> Result<(), Error> {
        let room = || lock(&self.main.outgoing).unsent() <= COMMANDS_MOST;
        self.wait_out(command, &room, deadline)
    }

    /// Sends, and reads meanwhile when no other thread does: a server that waits for us to read does not read
    /// either.
    fn wait_out(
        &self,
        command: Command,
        enough: &dyn Fn() -> bool,
        deadline: &Deadline,
    ) -> Result<(), Error> {
        loop {
            if enough() {
                return Ok(());
            }
            {
                let mut table = lock(&self.table);
                if let Some(loss) = table.loss() {
                    let loss = loss.clone();
                    table.told();
                    return Err(loss);
                }
                if deadline.remaining().is_none() {
                    return Err(self.error(command, Cause::NotReading(deadline.limit())));
                }
                if !table.led {
                    table.led = true;
                    drop(table);
                    let lead = Lead::begin(self);
                    self.lead(deadline, &mut || enough() || self.is_lost());
                    drop(lead);
                    continue;
                }
            }
            let step = deadline.remaining().map_or(ROOM_STEP, |left| left.min(ROOM_STEP));
            let wait = Timespec::try_from(step).ok();
            let mut fds = [PollFd::new(&self.main.socket, PollFlags::OUT)];
            // The outcome of `poll` does not matter: the loop checks everything again.
            if poll(&mut fds, wait.as_ref()).is_ok() {
                self.flush(Side::Main)?;
            }
        }
    }

    /// Reads and sends until `done`, the deadline, or the end of the connection.
    fn lead(&self, deadline: &Deadline, done: &mut dyn FnMut() -> bool) {
        while !done() {
            let Some(left) = deadline.remaining() else { return };
            let Ok(timeout) = Timespec::try_from(left) else { return };
            let interest = |link: &Link| {
                let Interest { read, send } = link.interest();
                let reading = if read { PollFlags::IN } else { PollFlags::OUT };
                if send { reading | PollFlags::OUT } else { reading }
            };
            let mut fds = Vec::with_capacity(2);
            fds.push(PollFd::new(&self.main.socket, interest(&self.main)));
            if let Some(twin) = self.twin.get() {
                fds.push(PollFd::new(&twin.socket, interest(twin)));
            }
            match poll(&mut fds, Some(&timeout)) {
                Ok(0) | Err(rustix::io::Errno::INTR) => continue,
                Ok(_) => {}
                Err(errno) => {
                    self.lose(Error::new(&self.peer, Step::Idle, Cause::Io(errno.into())));
                    return;
                }
            }
            let writable = fds.iter().map(|fd| fd.revents().contains(PollFlags::OUT));
            let writable: Vec<bool> = writable.collect();
            let flushed = [Side::Main, Side::Twin]
                .into_iter()
                .zip(writable)
                .filter(|(_, writable)| *writable)
                .try_for_each(|(side, _)| self.flush(side));
            if flushed.is_err() {
                return;
            }
            let mut streams = lock(&self.streams);
            let mut enough = || done() || deadline.remaining().is_none();
            if self.pump(&mut streams, &mut enough).is_err() {
                return;
            }
        }
    }
}

/// The role of the thread that reads for all waiting threads. While it exists, the receiver does not read.
struct Lead<'a>(&'a Shared);

impl<'a> Lead<'a> {
    /// The caller must have set `Table::led` before.
    fn begin(shared: &'a Shared) -> Self {
        // A receiver that was reading has finished once this lock is ours, and sees `Table::led` the next
        // time.
        let streams = lock(&shared.streams);
        if let Some(watch) = lock(&shared.watch).as_mut() {
            watch.mute(&shared.main, shared.twin.get());
        }
        drop(streams);
        Self(shared)
    }
}

impl Drop for Lead<'_> {
    fn drop(&mut self) {
        let streams = lock(&self.0.streams);
        let mut table = lock(&self.0.table);
        table.led = false;
        let wake = table.followers > 0;
        drop(table);
        if let Some(watch) = lock(&self.0.watch).as_mut() {
            watch.unmute(&self.0.main, self.0.twin.get());
        }
        drop(streams);
        if wake {
            self.0.answered.notify_all();
        }
    }
}

//! vfio-user "Command Concurrency": the commands that are not answered yet, by message id.
//!
//! Must never give a reply to any thread but the one that sent the command. For that, an id stays in use
//! until its reply came, even when no thread waits for the reply any more. Limits the number of commands in
//! flight and their bytes.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use crate::peer::{Cause, Error, Peer, Step};
use crate::vfio_user::message::{Command, Fault, Header, Kind};

/// The most commands that may be unanswered at once.
const IN_FLIGHT_MOST: usize = 4096;

/// The most bytes of replies that may be outstanding at once. A single command may exceed it.
const REPLIES_MOST: u64 = 64 << 20;

/// The most that a reply may hold.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Expected {
    /// The largest payload.
    pub(crate) most: u32,
    /// The most fds.
    pub(crate) fds: usize,
}

impl Expected {
    /// No fds, and at most `most` bytes.
    pub(crate) fn bytes(most: u32) -> Self {
        Self { most, fds: 0 }
    }
}

/// A reply that is no error reply.
#[derive(Debug, Default)]
pub(crate) struct Reply {
    pub(crate) payload: Vec<u8>,
    pub(crate) fds: Vec<OwnedFd>,
}

struct Entry {
    command: Command,
    expected: Expected,
    sent: Instant,
    state: State,
}

impl Entry {
    fn is_overdue(&self, patience: Duration) -> bool {
        !matches!(self.state, State::Answered(_)) && self.sent.elapsed() > patience
    }
}

/// Called with the payload of a successful reply, on the thread that reads it. Must not block.
pub(crate) type Then = Box<dyn FnOnce(&[u8]) + Send>;

enum State {
    Waiting,
    /// No thread waits; the function is called when the reply comes.
    Then(Then),
    Answered(Result<Reply, Error>),
    /// No thread waits any more; the reply will be discarded.
    Abandoned,
}

/// How a reply was delivered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Delivered {
    /// A thread waits for the reply.
    InTime,
    /// No thread waits for the reply, so it was discarded.
    Late,
}

/// All commands without a reply, and why the connection ended.
pub(crate) struct Table {
    entries: HashMap<u16, Entry>,
    next: u16,
    /// Bytes that all outstanding replies may have together.
    charged: u64,
    /// Entries whose replies may bring fds.
    with_fds: usize,
    /// A waiting thread reads the socket for all waiting threads.
    pub(crate) led: bool,
    /// The number of other waiting threads.
    pub(crate) followers: usize,
    /// The calls to make as soon as the table is unlocked again, each with its payload.
    pub(crate) due: Vec<(Then, Vec<u8>)>,
    /// Why the connection ended.
    loss: Option<Error>,
    /// No thread has been given the loss as an error yet.
    untold: bool,
}

impl Table {
    pub(crate) fn new() -> Self {
        Self {
            entries: HashMap::new(),
            next: 0,
            charged: 0,
            with_fds: 0,
            led: false,
            followers: 0,
            due: Vec::new(),
            loss: None,
            untold: false,
        }
    }

    /// Takes an id for a command that is about to be sent. Fails when the commands in flight reach the limit
    /// of their number or of their bytes. The server is taken for hung then if a command has been unanswered
    /// for longer than `patience`: no waiting thread finds that out for a command whose reply none waits for.
    pub(crate) fn open(
        &mut self,
        command: Command,
        expected: Expected,
        patience: Duration,
    ) -> Result<u16, Cause> {
        if self.loss.is_some() {
            return Err(Cause::AlreadyLost);
        }
        let charge = u64::from(expected.most);
        let full = self.entries.len() >= IN_FLIGHT_MOST
            || !self.entries.is_empty() && self.charged.saturating_add(charge) > REPLIES_MOST;
        if full && self.entries.values().any(|entry| entry.is_overdue(patience)) {
            return Err(Cause::Silent(patience));
        }
        if full {
            return Err(Cause::Invalid("too many commands are unanswered"));
        }
        let id = self.unused();
        self.charged = self.charged.saturating_add(charge);
        self.with_fds = self.with_fds.saturating_add(usize::from(expected.fds > 0));
        let entry = Entry { command, expected, sent: Instant::now(), state: State::Waiting };
        self.entries.insert(id, entry);
        Ok(id)
    }

    /// Has `then` called when the command `id`, which is about to be sent, is answered successfully.
    pub(crate) fn then(&mut self, id: u16, then: Then) {
        if let Some(entry) = self.entries.get_mut(&id) {
            entry.state = State::Then(then);
        }
    }

    /// Takes an id for a message that is not answered.
    pub(crate) fn unused(&mut self) -> u16 {
        // The loop ends: far fewer ids are in use than exist.
        while self.entries.contains_key(&self.next) {
            self.next = self.next.wrapping_add(1);
        }
        let id = self.next;
        self.next = self.next.wrapping_add(1);
        id
    }

    fn remove(&mut self, id: u16) -> Option<Entry> {
        let entry = self.entries.remove(&id)?;
        self.charged = self.charged.saturating_sub(u64::from(entry.expected.most));
        self.with_fds = self.with_fds.saturating_sub(usize::from(entry.expected.fds > 0));
        Some(entry)
    }

    /// Frees the id of a command that was not sent.
    pub(crate) fn withdraw(&mut self, id: u16) {
        self.remove(id);
    }

    /// True when the next reply may bring fds.
    pub(crate) fn fds_are_due(&self) -> bool {
        self.with_fds > 0
    }

    /// True when this header is that of a reply that may bring fds.
    pub(crate) fn brings_fds(&self, header: &Header) -> bool {
        let entry = self.entries.get(&header.id).filter(|entry| entry.command.0 == header.command);
        header.kind() == Ok(Kind::Reply) && entry.is_some_and(|entry| entry.expected.fds > 0)
    }

    /// True for an error reply to a posted message. The specification has none, but the server crate
    /// `vfio_user` sends it.
    fn refuses_posted(&self, header: &Header) -> bool {
        let posted = [Command::REGION_WRITE, Command::REGION_WRITE_MULTI, Command::DEVICE_SET_IRQS];
        header.kind() == Ok(Kind::ErrorReply)
            && posted.contains(&Command(header.command))
            && !self.entries.contains_key(&header.id)
    }

    /// Judges a reply by its header, before anything is allocated for it. Returns the size of its payload.
    pub(crate) fn judge(&self, header: &Header) -> Result<u32, Fault> {
        if self.refuses_posted(header) {
            return header.judge_size(0);
        }
        let entry = self.entries.get(&header.id).ok_or(Fault::Unasked(header.id))?;
        if entry.command.0 != header.command {
            return Err(Fault::Request(u32::from(header.command)));
        }
        if matches!(entry.state, State::Answered(_)) {
            return Err(Fault::Unasked(header.id));
        }
        header.judge_size(entry.expected.most)
    }

    /// When the command with this id was sent.
    pub(crate) fn sent_at(&self, id: u16) -> Option<Instant> {
        self.entries.get(&id).map(|entry| entry.sent)
    }

    /// Hands a complete reply, already judged, to the thread that waits for it.
    pub(crate) fn deliver(
        &mut self,
        peer: &Peer,
        header: &Header,
        kind: Kind,
        reply: Reply,
    ) -> Result<Delivered, Fault> {
        self.judge(header)?;
        if self.refuses_posted(header) && reply.fds.is_empty() {
            return Ok(Delivered::Late);
        }
        let entry = self.entries.get_mut(&header.id).ok_or(Fault::Unasked(header.id))?;
        let most = entry.expected.fds;
        if reply.fds.len() > most {
            let most = u8::try_from(most).unwrap_or(u8::MAX);
            return Err(Fault::Fds { got: reply.fds.len(), least: 0, most });
        }
        if matches!(entry.state, State::Abandoned | State::Then(_)) {
            let entry = self.remove(header.id);
            if let Some(Entry { state: State::Then(then), .. }) = entry {
                if kind == Kind::Reply {
                    self.due.push((then, reply.payload));
                }
                return Ok(Delivered::InTime);
            }
            return Ok(Delivered::Late);
        }
        entry.state = State::Answered(match kind {
            Kind::ErrorReply => {
                let step = Step::Request(entry.command.into());
                Err(Error::new(peer, step, Cause::Refused(u64::from(header.errno))))
            }
            _ => Ok(reply),
        });
        Ok(Delivered::InTime)
    }

    /// True when command `id` is answered or unknown, so that there is nothing to wait for.
    pub(crate) fn is_answered(&self, id: u16) -> bool {
        self.entries.get(&id).is_none_or(|entry| matches!(entry.state, State::Answered(_)))
    }

    /// Takes the outcome of command `id`. A second call returns `None`.
    pub(crate) fn take(&mut self, id: u16) -> Option<Result<Reply, Error>> {
        if !self.is_answered(id) {
            return None;
        }
        match self.remove(id)?.state {
            State::Answered(outcome) => Some(outcome),
            State::Waiting | State::Abandoned | State::Then(_) => None,
        }
    }

    /// Marks command `id` as one that no thread waits for: its reply is discarded on arrival.
    pub(crate) fn abandon(&mut self, id: u16) {
        if self.loss.is_some() {
            self.remove(id);
            return;
        }
        match self.entries.get_mut(&id) {
            Some(entry) if matches!(entry.state, State::Waiting) => entry.state = State::Abandoned,
            _ => drop(self.remove(id)),
        }
    }

    /// The unanswered command that was sent first.
    pub(crate) fn oldest(&self) -> Option<Command> {
        let waiting = self.entries.values().filter(|entry| matches!(entry.state, State::Waiting));
        waiting.min_by_key(|entry| entry.sent).map(|entry| entry.command)
    }

    /// Ends the connection: each waiting thread gets the reason. When the peer just closed the connection,
    /// each thread's error names its own command as the step.
    pub(crate) fn lose(&mut self, peer: &Peer, error: &Error) -> Error {
        if let Some(first) = &self.loss {
            return first.clone();
        }
        self.untold = true;
        for entry in self.entries.values_mut() {
            if matches!(entry.state, State::Waiting) {
                self.untold = false;
                let step = Step::Request(entry.command.into());
                entry.state = State::Answered(Err(match error.cause() {
                    Cause::Closed => Error::new(peer, step, Cause::Closed),
                    Cause::AlreadyLost => Error::new(peer, step, Cause::AlreadyLost),
                    _ => error.clone(),
                }));
            }
        }
        let gone: Vec<u16> = self
            .entries
            .iter()
            .filter(|(_, entry)| matches!(entry.state, State::Abandoned | State::Then(_)))
            .map(|(id, _)| *id)
            .collect();
        for id in gone {
            self.remove(id);
        }
        self.loss = Some(error.clone());
        error.clone()
    }

    /// Fails when the connection has ended. The first caller after the end gets the reason itself.
    pub(crate) fn refuse(&mut self, peer: &Peer, command: Command) -> Result<(), Error> {
        match &self.loss {
            None => Ok(()),
            Some(loss) if self.untold => {
                self.untold = false;
                Err(loss.clone())
            }
            Some(_) => Err(Error::new(peer, Step::Request(command.into()), Cause::AlreadyLost)),
        }
    }

    /// Notes that a thread was given the reason why the connection ended.
    pub(crate) fn told(&mut self) {
        self.untold = false;
    }

    /// Why the connection ended, if it did.
    pub(crate) fn loss(&self) -> Option<&Error> {
        self.loss.as_ref()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::peer::Protocol;

    const PATIENT: Duration = Duration::from_secs(3600);

    fn peer() -> Peer {
        Peer::new(Protocol::VfioUser, "peer")
    }

    fn reply(id: u16, command: Command) -> Header {
        Header::reply(&Header::command(id, command, 0), 0)
    }

    #[test]
    fn an_id_is_not_used_again_before_its_late_reply_came() {
        let mut table = Table::new();
        let first = table.open(Command::REGION_READ, Expected::bytes(8), PATIENT).unwrap();
        table.abandon(first);
        for _ in 0..70_000 {
            let id = table.open(Command::REGION_READ, Expected::bytes(8), PATIENT).unwrap();
            assert_ne!(id, first);
            table.withdraw(id);
        }
        let header = reply(first, Command::REGION_READ);
        let delivered = table.deliver(&peer(), &header, Kind::Reply, Reply::default());
        assert_eq!(delivered, Ok(Delivered::Late));
        assert_eq!(table.judge(&header), Err(Fault::Unasked(first)), "a second one is nobody's");
    }

    #[test]
    fn the_refusal_of_a_posted_write_is_discarded_and_its_success_is_not() {
        let mut table = Table::new();
        let id = table.unused();
        let posted = Header::posted(id, Command::REGION_WRITE, 20);
        let refusal = Header::error_reply(&posted, 0);
        assert_eq!(table.judge(&refusal), Ok(0));
        let delivered = table.deliver(&peer(), &refusal, Kind::ErrorReply, Reply::default());
        assert_eq!(delivered, Ok(Delivered::Late));
        assert_eq!(table.judge(&Header::reply(&posted, 0)), Err(Fault::Unasked(id)));
        let read = Header::error_reply(&Header::command(id, Command::REGION_READ, 0), 0);
        assert_eq!(table.judge(&read), Err(Fault::Unasked(id)), "reads are never posted");
    }

    #[test]
    fn replies_go_to_who_asked_whatever_their_order() {
        let mut table = Table::new();
        let ids: Vec<u16> = (0..100)
            .map(|_| table.open(Command::REGION_READ, Expected::bytes(8), PATIENT).unwrap())
            .collect();
        for id in ids.iter().rev() {
            let reply_of = Reply { payload: id.to_ne_bytes().to_vec(), fds: Vec::new() };
            let header = reply(*id, Command::REGION_READ);
            table.deliver(&peer(), &header, Kind::Reply, reply_of).unwrap();
        }
        for id in ids {
            assert_eq!(table.take(id).unwrap().unwrap().payload, id.to_ne_bytes());
        }
    }

    #[test]
    fn numbers_and_bytes_in_flight_are_limited() {
        let mut table = Table::new();
        for _ in 0..IN_FLIGHT_MOST {
            table.open(Command::DEVICE_RESET, Expected::bytes(0), PATIENT).unwrap();
        }
        let full = table.open(Command::DEVICE_RESET, Expected::bytes(0), PATIENT);
        assert!(matches!(full, Err(Cause::Invalid(_))), "{full:?}");
        let hung = table.open(Command::DEVICE_RESET, Expected::bytes(0), Duration::ZERO);
        assert!(matches!(hung, Err(Cause::Silent(_))), "{hung:?}");
        let mut table = Table::new();
        let opened = (0..1000)
            .take_while(|_| table.open(Command::REGION_READ, Expected::bytes(1 << 20), PATIENT).is_ok());
        assert_eq!(opened.count(), 64);
    }

    #[test]
    fn the_end_of_the_connection_answers_everything() {
        let mut table = Table::new();
        let read = table.open(Command::REGION_READ, Expected::bytes(8), PATIENT).unwrap();
        let late = table.open(Command::DEVICE_RESET, Expected::bytes(8), PATIENT).unwrap();
        table.abandon(late);
        let error = Error::new(&peer(), Step::Idle, Cause::Closed);
        table.lose(&peer(), &error);
        let told = table.take(read).unwrap().unwrap_err();
        assert_eq!(told.step(), Step::Request(Command::REGION_READ.into()));
        assert!(matches!(
            table.open(Command::REGION_READ, Expected::bytes(8), PATIENT),
            Err(Cause::AlreadyLost)
        ));
        assert!(table.entries.is_empty());
    }
}

//! The thread of a scripted server, and the handle by which tests observe the server.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use zerocopy::{FromZeros, IntoBytes};

use super::role::{Frame, Reply, Seen, State};
use super::script::{Act, Ask, Offer, Script};
use crate::peer::deadline::Deadline;
use crate::testing::stream::{FOREVER, fill, park_until_closed, send_all, spare_fds};
use crate::vfio_user::message::{Command, Header, length};

/// The largest message that is read.
const MESSAGE_MOST: u32 = 4 << 20;

/// The client's reply to a command of the server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// Its header.
    pub header: Header,
    /// Its payload.
    pub payload: Vec<u8>,
    /// How many fds came with it.
    pub fds: usize,
}

/// A running scripted server. Dropping it disconnects and joins its thread.
#[derive(Debug)]
pub struct ScriptedServer {
    state: Arc<Mutex<State>>,
    answers: Arc<Mutex<Vec<Answer>>>,
    thread: Option<JoinHandle<()>>,
    path: Option<PathBuf>,
}

impl ScriptedServer {
    /// Serves one end of a socket pair and returns the other.
    pub fn pair(offer: Offer, script: Script) -> io::Result<(Self, UnixStream)> {
        let (ours, theirs) = UnixStream::pair()?;
        let mut server = Self::idle(offer);
        lock(&server.state).sockets.push(ours.try_clone()?);
        let (state, answers) = (Arc::clone(&server.state), Arc::clone(&server.answers));
        let thread = std::thread::Builder::new().name("server".into()).spawn(move || {
            Conversation::new(ours, &state, &answers, &script).run();
        })?;
        server.thread = Some(thread);
        Ok((server, theirs))
    }

    /// Listens on `path` and serves one connection after the other.
    pub fn listen(path: &Path, offer: Offer, script: Script) -> io::Result<Self> {
        let listener = UnixListener::bind(path)?;
        let mut server = Self::idle(offer);
        server.path = Some(path.to_owned());
        let (state, answers) = (Arc::clone(&server.state), Arc::clone(&server.answers));
        let thread = std::thread::Builder::new().name("server".into()).spawn(move || {
            while let Ok((stream, _)) = listener.accept() {
                let Ok(clone) = stream.try_clone() else { return };
                {
                    let mut state = lock(&state);
                    if state.stopping {
                        return;
                    }
                    state.sockets = vec![clone];
                    state.maps.clear();
                    state.vectors.clear();
                    state.twin = None;
                }
                Conversation::new(stream, &state, &answers, &script).run();
            }
        })?;
        server.thread = Some(thread);
        Ok(server)
    }

    fn idle(offer: Offer) -> Self {
        let state = Arc::new(Mutex::new(State { offer, migration: 2, ..State::default() }));
        Self { state, answers: Arc::default(), thread: None, path: None }
    }

    /// The commands so far, of all connections.
    pub fn seen(&self) -> Vec<Seen> {
        lock(&self.state).seen.clone()
    }

    /// How many times `command` came.
    pub fn count(&self, command: Command) -> usize {
        lock(&self.state).seen.iter().filter(|seen| seen.command == command).count()
    }

    /// The rules that the client broke. Should be empty.
    pub fn breaches(&self) -> Vec<String> {
        lock(&self.state).breaches.clone()
    }

    /// The mapped regions: address, size, and whether an fd came.
    pub fn maps(&self) -> Vec<(u64, u64, bool)> {
        lock(&self.state).maps.iter().map(|(at, size, fd)| (*at, *size, fd.is_some())).collect()
    }

    /// The armed interrupts: index and number.
    pub fn armed(&self) -> Vec<(u32, u32)> {
        lock(&self.state).vectors.iter().map(|(index, number, _)| (*index, *number)).collect()
    }

    /// Signals an interrupt; false when the interrupt is not armed.
    pub fn interrupt(&self, index: u32, number: u32) -> bool {
        let state = lock(&self.state);
        let found = state.vectors.iter().find(|vector| (vector.0, vector.1) == (index, number));
        found.is_some_and(|(_, _, fd)| rustix::io::write(fd, &1_u64.to_ne_bytes()).is_ok())
    }

    /// How many times the device was reset.
    pub fn resets(&self) -> u32 {
        lock(&self.state).resets
    }

    /// The bytes that were loaded as the device's state.
    pub fn loaded(&self) -> Vec<u8> {
        lock(&self.state).loaded.clone()
    }

    /// The contents of a region.
    pub fn region(&self, index: usize) -> Vec<u8> {
        lock(&self.state).offer.regions.get(index).map(|region| region.memory.clone()).unwrap_or_default()
    }

    /// Changes what the server offers from now on.
    pub fn change(&self, change: impl FnOnce(&mut Offer)) {
        change(&mut lock(&self.state).offer);
    }

    /// The client's replies so far to the commands of the script.
    pub fn answers(&self) -> Vec<Answer> {
        lock(&self.answers).clone()
    }

    /// Sends a command on the socket for the server's commands, at any time. The reply is not awaited. When
    /// it comes on the main socket, the thread adds it to [`ScriptedServer::answers`].
    pub fn ask(&self, ask: &Ask) -> io::Result<()> {
        let socket = {
            let state = lock(&self.state);
            let socket = state.twin.as_ref().or_else(|| state.sockets.first());
            socket.ok_or(io::ErrorKind::NotConnected)?.try_clone()?
        };
        send_ask(&socket, ask, 0x7000)
    }

    /// Closes the connection, as a server that dies does.
    pub fn hang_up(&self) {
        let mut state = lock(&self.state);
        state.twin = None;
        for socket in state.sockets.drain(..) {
            let _already_gone = socket.shutdown(Shutdown::Both);
        }
    }
}

impl Drop for ScriptedServer {
    fn drop(&mut self) {
        lock(&self.state).stopping = true;
        self.hang_up();
        if let Some(path) = &self.path {
            // Wakes up the listener, which then sees that it should stop.
            drop(UnixStream::connect(path));
            drop(std::fs::remove_file(path));
        }
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

fn lock<T>(state: &Mutex<T>) -> MutexGuard<'_, T> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

fn send_ask(socket: &UnixStream, ask: &Ask, id: u16) -> io::Result<()> {
    let header = Header { flags: ask.flags, ..Header::command(id, ask.command, length(ask.payload.len())) };
    let fds = spare_fds(ask.fds)?;
    let fds: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
    send_all(socket, &[header.as_bytes(), &ask.payload].concat(), &fds)
}

fn read_frame(stream: &UnixStream) -> io::Result<Option<Frame>> {
    let deadline = Deadline::after(FOREVER);
    let mut fds = Vec::new();
    let mut header = Header::new_zeroed();
    if !fill(stream, header.as_mut_bytes(), &mut fds, &deadline)? {
        return Ok(None);
    }
    let size = header.payload().filter(|size| *size <= MESSAGE_MOST).ok_or(io::ErrorKind::InvalidData)?;
    let mut payload = vec![0; usize::try_from(size).unwrap_or_default()];
    if !fill(stream, &mut payload, &mut fds, &deadline)? {
        return Ok(None);
    }
    Ok(Some(Frame { header, payload, fds }))
}

struct Conversation<'a> {
    stream: UnixStream,
    state: &'a Mutex<State>,
    answers: &'a Mutex<Vec<Answer>>,
    script: &'a Script,
    counts: BTreeMap<u16, usize>,
    /// Commands that came while the server waited for a reply.
    waiting: VecDeque<Frame>,
    next_id: u16,
}

impl<'a> Conversation<'a> {
    fn new(
        stream: UnixStream,
        state: &'a Mutex<State>,
        answers: &'a Mutex<Vec<Answer>>,
        script: &'a Script,
    ) -> Self {
        let (counts, waiting) = (BTreeMap::new(), VecDeque::new());
        Self { stream, state, answers, script, counts, waiting, next_id: 0 }
    }

    fn run(mut self) {
        while let Ok(Some(frame)) = self.next() {
            if self.converse(frame).is_err() {
                break;
            }
        }
        lock(self.state).twin = None;
        let _already_gone = self.stream.shutdown(Shutdown::Both);
    }

    fn next(&mut self) -> io::Result<Option<Frame>> {
        if let Some(frame) = self.waiting.pop_front() {
            return Ok(Some(frame));
        }
        read_frame(&self.stream)
    }

    fn note(&self, frame: &Frame) {
        let Frame { header, payload, fds } = frame;
        lock(self.answers).push(Answer { header: *header, payload: payload.clone(), fds: fds.len() });
    }

    fn converse(&mut self, frame: Frame) -> io::Result<()> {
        if frame.header.flags & 1 != 0 {
            self.note(&frame);
            return Ok(());
        }
        let command = Command(frame.header.command);
        let count = self.counts.entry(command.0).or_default();
        let act = self.script.act(command, *count).cloned();
        *count = count.saturating_add(1);
        let refusal = match act {
            Some(Act::Refuse(errno) | Act::RefuseWithoutReplyFlag(errno)) => Some(errno),
            _ => None,
        };
        let reply = lock(self.state).take(frame, refusal);
        self.play(reply, act)
    }

    fn asks(&mut self, asks: &[Ask], socket: &UnixStream) -> io::Result<()> {
        for ask in asks {
            self.next_id = self.next_id.wrapping_add(1);
            send_ask(socket, ask, self.next_id)?;
            if ask.flags != 0 {
                continue;
            }
            loop {
                let frame = read_frame(socket)?.ok_or(io::ErrorKind::UnexpectedEof)?;
                if frame.header.flags & 1 != 0 {
                    self.note(&frame);
                    break;
                }
                self.waiting.push_back(frame);
            }
        }
        Ok(())
    }

    /// The socket on which the server sends its commands.
    fn command_socket(&self) -> io::Result<UnixStream> {
        match &lock(self.state).twin {
            Some(twin) => twin.try_clone(),
            None => self.stream.try_clone(),
        }
    }

    fn send(&self, reply: &Reply) -> io::Result<()> {
        send_all(&self.stream, &reply.bytes(), &reply.borrowed())
    }

    fn play(&mut self, mut reply: Reply, act: Option<Act>) -> io::Result<()> {
        let part = |reply: &Reply, count: usize| {
            let bytes = reply.bytes();
            bytes.get(..count).map_or(bytes.clone(), <[u8]>::to_vec)
        };
        match act {
            // The reply is a refusal already.
            None | Some(Act::Refuse(_)) => {}
            Some(Act::RefuseWithoutReplyFlag(_)) => reply.header.flags = 0x20,
            Some(Act::Silent) => return Ok(()),
            Some(Act::StopReading) => return park_until_closed(&self.stream),
            Some(Act::Close) => return Err(io::ErrorKind::ConnectionAborted.into()),
            Some(Act::CloseTwin) => {
                if let Some(twin) = lock(self.state).twin.take() {
                    twin.shutdown(Shutdown::Both)?;
                }
                return Ok(());
            }
            Some(Act::CloseAfter(count)) => {
                send_all(&self.stream, &part(&reply, count), &[])?;
                return Err(io::ErrorKind::ConnectionAborted.into());
            }
            Some(Act::StallAfter(count)) => return send_all(&self.stream, &part(&reply, count), &[]),
            Some(Act::Drip(pause)) => {
                let fds = reply.borrowed();
                for (number, byte) in reply.bytes().iter().enumerate() {
                    send_all(&self.stream, &[*byte], if number == 0 { &fds } else { &[] })?;
                    std::thread::sleep(pause);
                }
                return Ok(());
            }
            Some(Act::Delay(pause)) => std::thread::sleep(pause),
            Some(Act::Id(bits)) => reply.header.id ^= bits,
            Some(Act::As(other)) => reply.header.command = other.0,
            Some(Act::Flags(flags)) => reply.header.flags = flags,
            Some(Act::ClaimSize(size)) => reply.header.size = size,
            Some(Act::Payload(payload)) => {
                reply.header.size = length(payload.len()).saturating_add(16);
                reply.payload = payload;
            }
            Some(Act::Patch(at, bytes)) => {
                let end = at.saturating_add(bytes.len());
                if let Some(place) = reply.payload.get_mut(at..end) {
                    place.copy_from_slice(&bytes);
                }
            }
            Some(Act::Fds(count)) => reply.fds.extend(spare_fds(count)?.into_iter().map(Arc::new)),
            Some(Act::NoFds) => reply.fds.clear(),
            Some(Act::FdOf(kind)) => reply.fds = vec![kind.make()?.into()],
            Some(Act::FdsWithBody(count)) => {
                send_all(&self.stream, reply.header.as_bytes(), &[])?;
                let fds = spare_fds(count)?;
                let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
                return send_all(&self.stream, &reply.payload, &fds);
            }
            Some(Act::Twice) => self.send(&reply)?,
            Some(Act::Unasked) => reply.due = true,
            Some(Act::Flood(count)) => {
                for _ in 0..count {
                    self.send(&reply)?;
                }
                return Err(io::ErrorKind::ConnectionAborted.into());
            }
            Some(Act::Asks(asks)) => {
                let socket = self.command_socket()?;
                self.asks(&asks, &socket)?;
            }
            Some(Act::AsksOnMain(asks)) => {
                let socket = self.stream.try_clone()?;
                self.asks(&asks, &socket)?;
            }
            Some(Act::FloodOfAsks(ask, count)) => {
                let socket = self.command_socket()?;
                for _ in 0..count {
                    send_ask(&socket, &ask, 1)?;
                }
            }
            Some(Act::Before(bytes)) => send_all(&self.stream, &bytes, &[])?,
        }
        if reply.due { self.send(&reply) } else { Ok(()) }
    }
}

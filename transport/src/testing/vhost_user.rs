//! A scripted vhost-user backend on a thread. It answers as the specification says, records the requests and
//! each breach of the front end's rules, and misbehaves where its script says.

use std::collections::BTreeMap;
use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use zerocopy::{FromZeros, IntoBytes};

use super::role::{Frame, Reply, RingView, Seen, State};
use super::script::{Act, Offer, Script};
use super::stream::{FOREVER, fill, park_until_closed, send_all, spare_fds};
use crate::peer::deadline::Deadline;
use crate::vhost_user::ProtocolFeatures;
use crate::vhost_user::message::{Header, length, parse};
use crate::vhost_user::request::BackendRequest;
use crate::vhost_user::request::Request;

/// The largest payload that is read.
const PAYLOAD_MOST: u32 = 65536;

/// A running scripted backend. Dropping it disconnects and joins its thread.
#[derive(Debug)]
pub struct ScriptedBackend {
    state: Arc<Mutex<State>>,
    thread: Option<JoinHandle<()>>,
    path: Option<std::path::PathBuf>,
}

impl ScriptedBackend {
    /// Serves one end of a socket pair and returns the other.
    pub fn pair(offer: Offer, script: Script) -> io::Result<(Self, UnixStream)> {
        let (ours, theirs) = UnixStream::pair()?;
        let state = Arc::new(Mutex::new(State { offer, ..State::default() }));
        let shared = Arc::clone(&state);
        lock(&state).sockets.push(ours.try_clone()?);
        let thread = std::thread::Builder::new().name("backend".into()).spawn(move || {
            converse(&ours, &shared, &script);
        })?;
        Ok((Self { state, thread: Some(thread), path: None }, theirs))
    }

    /// Listens on `path` and serves one connection after the other.
    pub fn listen(path: &Path, offer: Offer, script: Script) -> io::Result<Self> {
        let listener = UnixListener::bind(path)?;
        let state = Arc::new(Mutex::new(State { offer, ..State::default() }));
        let shared = Arc::clone(&state);
        let thread = std::thread::Builder::new().name("backend".into()).spawn(move || {
            while let Ok((stream, _)) = listener.accept() {
                let Ok(clone) = stream.try_clone() else { return };
                {
                    let mut state = lock(&shared);
                    if state.stopping {
                        return;
                    }
                    state.sockets = vec![clone];
                    state.rings.clear();
                    state.negotiated = ProtocolFeatures::NONE;
                }
                converse(&stream, &shared, &script);
            }
        })?;
        Ok(Self { state, thread: Some(thread), path: Some(path.to_owned()) })
    }

    /// Connects to a front end that listens on `path`.
    pub fn dial(path: &Path, offer: Offer, script: Script) -> io::Result<Self> {
        let stream = UnixStream::connect(path)?;
        let state = Arc::new(Mutex::new(State { offer, ..State::default() }));
        let shared = Arc::clone(&state);
        lock(&state).sockets.push(stream.try_clone()?);
        let thread = std::thread::Builder::new().name("backend".into()).spawn(move || {
            converse(&stream, &shared, &script);
        })?;
        Ok(Self { state, thread: Some(thread), path: None })
    }

    /// The requests so far, of all connections.
    pub fn seen(&self) -> Vec<Seen> {
        lock(&self.state).seen.clone()
    }

    /// The names of the requests so far.
    pub fn conversation(&self) -> Vec<String> {
        lock(&self.state).seen.iter().map(|seen| seen.request.to_string()).collect()
    }

    /// The rules that the front end broke. Should be empty.
    pub fn breaches(&self) -> Vec<String> {
        lock(&self.state).breaches.clone()
    }

    /// Calls `look` with the state of ring `index`.
    pub fn with_ring<T>(&self, index: u32, look: impl FnOnce(&RingView) -> T) -> Option<T> {
        lock(&self.state).rings.get(&index).map(look)
    }

    /// The features that the front end acknowledged.
    pub fn features(&self) -> u64 {
        lock(&self.state).features
    }

    /// The device status that the front end set.
    pub fn status(&self) -> u64 {
        lock(&self.state).status
    }

    /// The bytes that were loaded as the device's state, at the first call only.
    pub fn take_loaded_state(&self) -> Vec<u8> {
        let mover = lock(&self.state).mover.take();
        mover.and_then(|mover| mover.join().ok()).unwrap_or_default()
    }

    /// Replaces the configuration space without notifying the front end.
    pub fn set_config(&self, config: Vec<u8>) {
        lock(&self.state).offer.config = config;
    }

    /// Shortens the file of the inflight area.
    pub fn cut_inflight_area(&self, size: u64) -> io::Result<()> {
        let area = lock(&self.state).inflight.as_ref().ok_or(io::ErrorKind::NotFound)?.try_clone()?;
        Ok(rustix::fs::ftruncate(area, size)?)
    }

    /// The file of guest memory's first region.
    pub fn memory(&self) -> io::Result<OwnedFd> {
        lock(&self.state).kept.first().ok_or(io::ErrorKind::NotFound)?.try_clone()
    }

    /// The call eventfd of ring `index`.
    pub fn call(&self, index: u32) -> io::Result<OwnedFd> {
        lock(&self.state)
            .rings
            .get(&index)
            .and_then(RingView::call)
            .ok_or(io::ErrorKind::NotFound)?
            .try_clone()
    }

    /// The kick eventfd of ring `index`.
    pub fn kick(&self, index: u32) -> io::Result<OwnedFd> {
        lock(&self.state)
            .rings
            .get(&index)
            .and_then(RingView::kick)
            .ok_or(io::ErrorKind::NotFound)?
            .try_clone()
    }

    /// Closes the connection, as a backend that dies does.
    pub fn hang_up(&self) {
        let mut state = lock(&self.state);
        state.channel = None;
        for socket in state.sockets.drain(..) {
            let _already_gone = socket.shutdown(Shutdown::Both);
        }
    }

    /// Sends raw bytes and fds on the backend channel.
    pub fn send_on_channel(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let channel = self.channel()?;
        send_all(&channel, bytes, fds)
    }

    /// Sends a well-formed request on the backend channel.
    pub fn request(&self, request: BackendRequest, payload: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let header = Header::asking(request.0, length(payload.len()));
        self.send_on_channel(&[header.as_bytes(), payload].concat(), fds)
    }

    /// Reads one answer from the backend channel. Returns the code and the number of fds.
    pub fn answer(&self, limit: Duration) -> io::Result<(u64, usize)> {
        let channel = self.channel()?;
        let frame = read_frame(&channel, limit)?.ok_or(io::ErrorKind::UnexpectedEof)?;
        let code = parse::<u64>(&frame.payload).map_err(|_| io::ErrorKind::InvalidData)?;
        Ok((code, frame.fds.len()))
    }

    fn channel(&self) -> io::Result<UnixStream> {
        lock(&self.state).channel.as_ref().ok_or(io::ErrorKind::NotConnected)?.try_clone()
    }
}

impl Drop for ScriptedBackend {
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

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

fn converse(stream: &UnixStream, state: &Mutex<State>, script: &Script) {
    let mut counts: BTreeMap<Request, usize> = BTreeMap::new();
    loop {
        let frame = match read_frame(stream, FOREVER) {
            Ok(Some(frame)) => frame,
            Ok(None) | Err(_) => break,
        };
        let request = Request(frame.header.request);
        let count = counts.entry(request).or_default();
        let act = script.act(request, *count);
        *count = count.saturating_add(1);
        let answer = lock(state).take(frame);
        if play(stream, request, answer, act).is_err() {
            break;
        }
    }
    let _already_gone = stream.shutdown(Shutdown::Both);
}

fn read_frame(stream: &UnixStream, limit: Duration) -> io::Result<Option<Frame>> {
    let deadline = Deadline::after(limit);
    let mut fds = Vec::new();
    let mut header = Header::new_zeroed();
    if !fill(stream, header.as_mut_bytes(), &mut fds, &deadline)? {
        return Ok(None);
    }
    if header.size > PAYLOAD_MOST {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut payload = vec![0; usize::try_from(header.size).unwrap_or_default()];
    if !fill(stream, &mut payload, &mut fds, &deadline)? {
        return Ok(None);
    }
    Ok(Some(Frame { header, payload, fds }))
}

fn play(stream: &UnixStream, request: Request, mut reply: Reply, act: Option<&Act>) -> io::Result<()> {
    let part = |reply: &Reply, count: usize| reply.bytes().get(..count).map_or(reply.bytes(), <[u8]>::to_vec);
    match act {
        None => {}
        Some(Act::Silent) => return Ok(()),
        Some(Act::StopReading) => return park_until_closed(stream),
        Some(Act::Close) => return Err(io::ErrorKind::ConnectionAborted.into()),
        Some(Act::CloseAfter(count)) => {
            send_all(stream, &part(&reply, *count), &[])?;
            return Err(io::ErrorKind::ConnectionAborted.into());
        }
        Some(Act::StallAfter(count)) => return send_all(stream, &part(&reply, *count), &[]),
        Some(Act::Drip(pause)) => {
            for byte in reply.bytes() {
                send_all(stream, &[byte], &[])?;
                std::thread::sleep(*pause);
            }
            return Ok(());
        }
        Some(Act::Delay(pause)) => std::thread::sleep(*pause),
        Some(Act::As(other)) => reply.header.request = other.0,
        Some(Act::Flags(flags)) => reply.header.flags = *flags,
        Some(Act::ClaimSize(size)) => reply.header.size = *size,
        Some(Act::Payload(payload)) => {
            reply.payload.clone_from(payload);
            reply.header.size = length(payload.len());
        }
        Some(Act::Fds(count)) => reply.fds = spare_fds(*count)?,
        Some(Act::FdOf(kind)) => reply.fds = vec![kind.make()?],
        Some(Act::FdsWithBody(count)) => {
            send_all(stream, reply.header.as_bytes(), &[])?;
            let fds = spare_fds(*count)?;
            let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
            return send_all(stream, &reply.payload, &fds);
        }
        Some(Act::Refuse(code)) => reply.payload = code.to_ne_bytes().to_vec(),
        Some(Act::Twice) => send_all(stream, &reply.bytes(), &reply.borrowed())?,
        Some(Act::Unasked) => {
            reply = Reply { due: true, ..reply };
            reply.header = Header::reply(request.0, length(reply.payload.len()));
        }
        Some(Act::Flood(count)) => {
            for _ in 0..*count {
                send_all(stream, &reply.bytes(), &reply.borrowed())?;
            }
            return Err(io::ErrorKind::ConnectionAborted.into());
        }
    }
    if reply.due { send_all(stream, &reply.bytes(), &reply.borrowed()) } else { Ok(()) }
}

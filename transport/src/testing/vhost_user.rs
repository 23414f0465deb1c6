//! A scripted vhost-user back-end on a thread: answers as the specification says, notes what it saw and every
//! breach of the front end's own rules, and misbehaves where its script says.

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

use super::script::{Act, Offer, Script};
use crate::deadline::{Deadline, Waited, wait_readable, wait_writable};
use crate::scm;
use crate::vhost_user::ProtocolFeatures;
use crate::vhost_user::backend_req::BackendRequest;
use crate::vhost_user::message::{
    ConfigHead, Header, Inflight, ShmemHead, VringState, length, parse, parse_front,
};
use crate::vhost_user::request::{Answer, Needs, Request};

/// No test waits this long.
const FOREVER: Duration = Duration::from_secs(120);

/// The largest payload that is read.
const PAYLOAD_MOST: u32 = 65536;

/// A request as the back-end saw it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// Which.
    pub request: Request,
    /// need_reply was set.
    pub asked: bool,
    /// Its payload.
    pub payload: Vec<u8>,
    /// How many fds came with it.
    pub fds: usize,
}

/// What a back-end holds of one ring.
#[derive(Debug, Default)]
pub struct RingView {
    kick: Option<OwnedFd>,
    call: Option<OwnedFd>,
    base: u32,
    started: bool,
    enabled: bool,
}

impl RingView {
    /// True between SET_VRING_KICK and GET_VRING_BASE.
    pub fn is_started(&self) -> bool {
        self.started
    }

    /// True after SET_VRING_ENABLE 1, or without protocol features.
    pub fn is_enabled(&self) -> bool {
        self.enabled
    }

    /// Takes the count of the kick eventfd.
    pub fn take_kicks(&self) -> u64 {
        let mut count = [0; 8];
        match &self.kick {
            Some(kick) if rustix::io::read(kick, &mut count).is_ok() => u64::from_ne_bytes(count),
            _ => 0,
        }
    }

    /// Rings the call eventfd.
    pub fn ring_call(&self) -> io::Result<()> {
        let call = self.call.as_ref().ok_or(io::ErrorKind::NotFound)?;
        rustix::io::write(call, &1u64.to_ne_bytes())?;
        Ok(())
    }
}

#[derive(Debug, Default)]
struct State {
    offer: Offer,
    seen: Vec<Seen>,
    breaches: Vec<String>,
    rings: BTreeMap<u32, RingView>,
    features: u64,
    negotiated: ProtocolFeatures,
    status: u64,
    channel: Option<UnixStream>,
    kept: Vec<OwnedFd>,
    listening: bool,
    mover: Option<JoinHandle<Vec<u8>>>,
    sockets: Vec<UnixStream>,
    stopping: bool,
}

/// A running scripted back-end. Dropping it disconnects and joins its thread.
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

    /// What the front end did against its own rules: nothing, one hopes.
    pub fn breaches(&self) -> Vec<String> {
        lock(&self.state).breaches.clone()
    }

    /// Looks at ring `index`.
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

    /// What was loaded as the device's state, once.
    pub fn take_loaded_state(&self) -> Vec<u8> {
        let mover = lock(&self.state).mover.take();
        mover.and_then(|mover| mover.join().ok()).unwrap_or_default()
    }

    /// Replaces the configuration space without a word.
    pub fn set_config(&self, config: Vec<u8>) {
        lock(&self.state).offer.config = config;
    }

    /// Closes the connection, as a dying back-end does.
    pub fn hang_up(&self) {
        let mut state = lock(&self.state);
        state.channel = None;
        for socket in state.sockets.drain(..) {
            let _already_gone = socket.shutdown(Shutdown::Both);
        }
    }

    /// Sends raw bytes and fds on the back-end channel.
    pub fn send_on_channel(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let channel = self.channel()?;
        send_all(&channel, bytes, fds)
    }

    /// Sends a well-formed request on the back-end channel.
    pub fn request(&self, request: BackendRequest, payload: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let header = Header::asking(request.0, length(payload.len()));
        self.send_on_channel(&[header.as_bytes(), payload].concat(), fds)
    }

    /// Reads one answer from the back-end channel: the code, and how many fds came.
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
            // Wakes the listener up; it sees that it should stop.
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

struct Frame {
    header: Header,
    payload: Vec<u8>,
    fds: Vec<OwnedFd>,
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

fn fill(
    stream: &UnixStream,
    bytes: &mut [u8],
    fds: &mut Vec<OwnedFd>,
    deadline: &Deadline,
) -> io::Result<bool> {
    let mut rest = bytes;
    while !rest.is_empty() {
        match scm::receive(stream.as_fd(), rest, fds) {
            Ok(received) if received.bytes == 0 => return Ok(false),
            Ok(received) => rest = rest.get_mut(received.bytes..).unwrap_or_default(),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                if wait_readable(stream.as_fd(), deadline)? == Waited::TimedOut {
                    return Err(io::ErrorKind::TimedOut.into());
                }
            }
            Err(error) => return Err(error),
        }
    }
    Ok(true)
}

fn send_all(stream: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let deadline = Deadline::after(FOREVER);
    let mut rest = bytes;
    let mut fds = fds;
    while !rest.is_empty() {
        match scm::send(stream.as_fd(), rest, fds) {
            Ok(sent) => {
                rest = rest.get(sent..).unwrap_or_default();
                fds = &[];
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                wait_writable(stream.as_fd(), &deadline)?;
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// What a request is answered with; `due` when the specification wants an answer.
struct Reply {
    header: Header,
    payload: Vec<u8>,
    fds: Vec<OwnedFd>,
    due: bool,
}

impl Reply {
    fn bytes(&self) -> Vec<u8> {
        [self.header.as_bytes(), &self.payload].concat()
    }

    fn borrowed(&self) -> Vec<BorrowedFd<'_>> {
        self.fds.iter().map(AsFd::as_fd).collect()
    }
}

fn spare_fds(count: usize) -> io::Result<Vec<OwnedFd>> {
    (0..count).map(|_| Ok(std::fs::File::open("/dev/null")?.into())).collect()
}

/// The table with each user address moved up, as a back-end in postcopy returns it.
fn moved(table: &[u8]) -> Vec<u8> {
    let mut moved = table.to_vec();
    for region in moved.get_mut(8..).unwrap_or_default().chunks_exact_mut(32) {
        if let Some(user) = region.get_mut(16..24) {
            user.fill(0x77);
        }
    }
    moved
}

/// Writes the state to the pipe, or reads it.
fn move_state(pipe: OwnedFd, save: bool, offer: &Offer) -> JoinHandle<Vec<u8>> {
    use std::io::{Read, Write};
    let (state, pause) = (offer.state.clone(), offer.state_pause);
    std::thread::spawn(move || {
        std::thread::sleep(pause);
        let mut file = std::fs::File::from(pipe);
        let mut loaded = Vec::new();
        let outcome = if save { file.write_all(&state) } else { file.read_to_end(&mut loaded).map(drop) };
        if let Err(error) = outcome {
            log::debug!("scripted back-end: its state: {error}");
        }
        loaded
    })
}

fn park_until_closed(stream: &UnixStream) -> io::Result<()> {
    // Wakes up on hang-up only: nothing is asked for.
    let mut fds = [rustix::event::PollFd::new(stream, rustix::event::PollFlags::empty())];
    rustix::event::poll(&mut fds, None)?;
    Err(io::ErrorKind::UnexpectedEof.into())
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

impl State {
    /// Notes a request, does what it says, and makes its answer.
    fn take(&mut self, frame: Frame) -> Reply {
        let request = Request(frame.header.request);
        let asked = frame.header.wants_reply();
        self.judge(request, &frame);
        self.seen.push(Seen { request, asked, payload: frame.payload.clone(), fds: frame.fds.len() });
        let acks = self.negotiated.contains(ProtocolFeatures::REPLY_ACK);
        let due = match request.row().map(|row| row.answer) {
            // The table that comes back in postcopy is acknowledged by a message of its own.
            Some(Answer::Ack) if request == Request::SET_MEM_TABLE && self.listening => {
                frame.payload.len() > 8
            }
            Some(Answer::Ack) => asked && acks,
            _ => true,
        };
        let (payload, fds) = self.perform(request, frame);
        Reply { header: Header::reply(request.0, length(payload.len())), payload, fds, due }
    }

    /// The front end's own rules.
    fn judge(&mut self, request: Request, frame: &Frame) {
        let mut breach = |what: &str| self.breaches.push(format!("{request}: {what}"));
        let Some(row) = request.row() else { return breach("is not in the table") };
        let offered30 = self.offer.features & 1 << 30 != 0;
        let allowed = match row.needs {
            Needs::Nothing => true,
            Needs::ProtocolOffered => offered30,
            Needs::Features(needs) => self.negotiated.contains(needs),
        };
        if !allowed {
            breach("was not negotiated");
        }
        let table_ack = self.listening && request == Request::SET_MEM_TABLE && frame.payload.len() == 8;
        if !table_ack && !(usize::from(row.fds.0)..=usize::from(row.fds.1)).contains(&frame.fds.len()) {
            breach("has a wrong number of fds");
        }
        if frame.header.wants_reply() && !self.negotiated.contains(ProtocolFeatures::REPLY_ACK) {
            breach("wants a reply without REPLY_ACK");
        }
        if matches!(request, Request::GET_VRING_BASE | Request::GET_VRING_BASE_SKIP_DRAIN) {
            let state: Option<VringState> = parse(&frame.payload).ok();
            if !state.is_some_and(|state| self.rings.get(&state.index).is_some_and(|ring| ring.started)) {
                breach("ring is not started");
            }
        }
    }

    fn ring(&mut self, payload: &[u8]) -> (&mut RingView, u32) {
        // The index is the first word of every ring message; in kick and call messages bit 8 means no fd.
        let number = payload.first_chunk::<4>().map_or(0, |bytes| u32::from_ne_bytes(*bytes)) & 0xff;
        let enabled = self.features & 1 << 30 == 0;
        let ring = self.rings.entry(number).or_insert_with(|| RingView { enabled, ..RingView::default() });
        (ring, number)
    }

    fn perform(&mut self, request: Request, frame: Frame) -> (Vec<u8>, Vec<OwnedFd>) {
        let Frame { payload, fds, .. } = frame;
        let mut first = fds.into_iter();
        let number = parse::<u64>(&payload).unwrap_or_default();
        let num = parse::<VringState>(&payload).map_or(0, |state| state.num);
        let mut answer = 0u64;
        match request {
            Request::GET_FEATURES => answer = self.offer.features,
            Request::SET_FEATURES => self.features = number,
            Request::GET_PROTOCOL_FEATURES => answer = self.offer.protocol.bits(),
            Request::SET_PROTOCOL_FEATURES => self.negotiated = ProtocolFeatures::from_bits(number),
            Request::GET_QUEUE_NUM => answer = self.offer.queue_num,
            Request::GET_MAX_MEM_SLOTS => answer = self.offer.mem_slots,
            Request::GET_STATUS => answer = self.status,
            Request::SET_STATUS => self.status = number,
            Request::SET_BACKEND_REQ_FD => self.channel = first.next().map(UnixStream::from),
            Request::SET_VRING_BASE => self.ring(&payload).0.base = num,
            Request::SET_VRING_KICK => {
                let ring = self.ring(&payload).0;
                ring.kick = first.next();
                ring.started = true;
            }
            Request::SET_VRING_CALL => self.ring(&payload).0.call = first.next(),
            Request::SET_VRING_ENABLE => self.ring(&payload).0.enabled = num == 1,
            Request::GET_VRING_BASE | Request::GET_VRING_BASE_SKIP_DRAIN => {
                let (ring, index) = self.ring(&payload);
                let num = ring.base;
                *ring = RingView::default();
                return (VringState { index, num }.as_bytes().to_vec(), Vec::new());
            }
            Request::POSTCOPY_LISTEN => self.listening = true,
            Request::POSTCOPY_END => self.listening = false,
            Request::SET_MEM_TABLE if self.listening && payload.len() > 8 => {
                return (moved(&payload), Vec::new());
            }
            Request::SET_MEM_TABLE | Request::SET_LOG_BASE | Request::SET_INFLIGHT_FD => {
                self.kept = first.collect();
            }
            Request::GET_SHARED_OBJECT => return (Vec::new(), spare_fds(1).unwrap_or_default()),
            Request::CHECK_DEVICE_STATE => answer = self.offer.state_check,
            Request::GET_CONFIG => return (self.config(&payload), Vec::new()),
            Request::SET_CONFIG => self.write_config(&payload),
            Request::GET_INFLIGHT_FD => return self.inflight(&payload),
            Request::GET_SHMEM_CONFIG => return (self.shmem(), Vec::new()),
            Request::POSTCOPY_ADVISE => return (Vec::new(), spare_fds(1).unwrap_or_default()),
            // Bit 8: our fd serves.
            Request::SET_DEVICE_STATE_FD => {
                let save = payload.first() == Some(&0);
                self.mover = first.next().map(|pipe| move_state(pipe, save, &self.offer));
                answer = 1 << 8;
            }
            Request::CREATE_CRYPTO_SESSION => {
                let mut session = payload;
                for (to, from) in session.iter_mut().zip(7u64.to_ne_bytes()) {
                    *to = from;
                }
                return (session, Vec::new());
            }
            _ => {}
        }
        (answer.to_ne_bytes().to_vec(), Vec::new())
    }

    fn config(&self, payload: &[u8]) -> Vec<u8> {
        let Ok((head, _)) = parse_front::<ConfigHead>(payload) else { return Vec::new() };
        let size = usize::try_from(head.size).unwrap_or(usize::MAX);
        match self.offer.config.get(..size) {
            Some(bytes) => [head.as_bytes(), bytes].concat(),
            None => Vec::new(),
        }
    }

    fn write_config(&mut self, payload: &[u8]) {
        let Ok((head, bytes)) = parse_front::<ConfigHead>(payload) else { return };
        let offset = usize::try_from(head.offset).unwrap_or(usize::MAX);
        let place = self.offer.config.get_mut(offset..).unwrap_or_default();
        for (to, from) in place.iter_mut().zip(bytes) {
            *to = *from;
        }
    }

    fn inflight(&self, payload: &[u8]) -> (Vec<u8>, Vec<OwnedFd>) {
        let Ok(mut wanted) = parse::<Inflight>(payload) else { return (Vec::new(), Vec::new()) };
        wanted.mmap_size = self.offer.inflight_size;
        wanted.mmap_offset = 0;
        let file = rustix::fs::memfd_create("inflight", rustix::fs::MemfdFlags::CLOEXEC);
        let file = file.and_then(|file| {
            rustix::fs::ftruncate(&file, self.offer.inflight_size)?;
            Ok(file)
        });
        (wanted.as_bytes().to_vec(), file.into_iter().collect())
    }

    fn shmem(&self) -> Vec<u8> {
        let count = length(self.offer.shmem.len());
        let mut payload = ShmemHead { count, padding: 0 }.as_bytes().to_vec();
        for size in self.offer.shmem.iter().chain(std::iter::repeat(&0)).take(256) {
            payload.extend_from_slice(&size.to_ne_bytes());
        }
        payload
    }
}

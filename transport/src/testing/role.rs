//! The normal role of a vhost-user backend: its state, its answers, and the rules of the front end that it
//! checks. Moves no data of rings.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::thread::JoinHandle;

use zerocopy::IntoBytes;

use super::script::Offer;
use super::stream::spare_fds;
use crate::vhost_user::ProtocolFeatures;
use crate::vhost_user::message::{
    ConfigHead, Header, Inflight, ShmemHead, VringState, length, parse, parse_front,
};
use crate::vhost_user::request::{Answer, Needs, Request};

/// A request as the backend saw it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// The request.
    pub request: Request,
    /// True when need_reply was set.
    pub asked: bool,
    /// Its payload.
    pub payload: Vec<u8>,
    /// How many fds came with it.
    pub fds: usize,
}

/// The state of one ring in the backend.
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

    pub(super) fn call(&self) -> Option<&OwnedFd> {
        self.call.as_ref()
    }

    pub(super) fn kick(&self) -> Option<&OwnedFd> {
        self.kick.as_ref()
    }

    /// Takes the count of the kick eventfd.
    pub fn take_kicks(&self) -> u64 {
        let mut count = [0; 8];
        match &self.kick {
            Some(kick) if rustix::io::read(kick, &mut count).is_ok() => u64::from_ne_bytes(count),
            _ => 0,
        }
    }

    /// Signals the call eventfd.
    pub fn ring_call(&self) -> io::Result<()> {
        let call = self.call.as_ref().ok_or(io::ErrorKind::NotFound)?;
        rustix::io::write(call, &1u64.to_ne_bytes())?;
        Ok(())
    }
}

#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) offer: Offer,
    pub(super) seen: Vec<Seen>,
    pub(super) breaches: Vec<String>,
    pub(super) rings: BTreeMap<u32, RingView>,
    pub(super) features: u64,
    pub(super) negotiated: ProtocolFeatures,
    pub(super) status: u64,
    pub(super) channel: Option<UnixStream>,
    pub(super) kept: Vec<OwnedFd>,
    pub(super) inflight: Option<OwnedFd>,
    pub(super) listening: bool,
    pub(super) mover: Option<JoinHandle<Vec<u8>>>,
    pub(super) sockets: Vec<UnixStream>,
    pub(super) stopping: bool,
}

pub(super) struct Frame {
    pub(super) header: Header,
    pub(super) payload: Vec<u8>,
    pub(super) fds: Vec<OwnedFd>,
}

/// The answer to a request. `due` is set when the specification requires an answer.
pub(super) struct Reply {
    pub(super) header: Header,
    pub(super) payload: Vec<u8>,
    pub(super) fds: Vec<OwnedFd>,
    pub(super) due: bool,
}

impl Reply {
    pub(super) fn bytes(&self) -> Vec<u8> {
        [self.header.as_bytes(), &self.payload].concat()
    }

    pub(super) fn borrowed(&self) -> Vec<BorrowedFd<'_>> {
        self.fds.iter().map(AsFd::as_fd).collect()
    }
}

/// The memory table with each user address increased, as a backend in postcopy returns it.
fn moved(table: &[u8]) -> Vec<u8> {
    let mut moved = table.to_vec();
    for region in moved.get_mut(8..).unwrap_or_default().chunks_exact_mut(32) {
        if let Some(user) = region.get_mut(16..24) {
            user.fill(0x77);
        }
    }
    moved
}

/// Writes the state to the pipe, or reads it from there, on a thread.
fn move_state(pipe: OwnedFd, save: bool, offer: &Offer) -> JoinHandle<Vec<u8>> {
    use std::io::{Read, Write};
    let (state, pause) = (offer.state.clone(), offer.state_pause);
    std::thread::spawn(move || {
        std::thread::sleep(pause);
        let mut file = std::fs::File::from(pipe);
        let mut loaded = Vec::new();
        let outcome = if save { file.write_all(&state) } else { file.read_to_end(&mut loaded).map(drop) };
        if let Err(error) = outcome {
            log::debug!("scripted backend: its state: {error}");
        }
        loaded
    })
}

impl State {
    /// Records a request, executes it, and makes its answer.
    pub(super) fn take(&mut self, frame: Frame) -> Reply {
        let request = Request(frame.header.request);
        let asked = frame.header.wants_reply();
        self.judge(request, &frame);
        self.seen.push(Seen { request, asked, payload: frame.payload.clone(), fds: frame.fds.len() });
        let acks = self.negotiated.contains(ProtocolFeatures::REPLY_ACK);
        let due = match request.row().map(|row| row.answer) {
            // A memory table that is returned in postcopy is acknowledged by a separate message.
            Some(Answer::Ack) if request == Request::SET_MEM_TABLE && self.listening => {
                frame.payload.len() > 8
            }
            Some(Answer::Ack) => asked && acks,
            _ => true,
        };
        let (payload, fds) = self.perform(request, frame);
        Reply { header: Header::reply(request.0, length(payload.len())), payload, fds, due }
    }

    /// Checks the rules that the front end must keep.
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
        // The first word of each ring message holds the index. In kick and call messages, bit 8 means that no
        // fd came.
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
            // The reset also clears the negotiated features, as in the rust crate.
            Request::RESET_DEVICE => self.features = 0,
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
            Request::VRING_KICK => self.ring(&payload).0.started = true,
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
            Request::SET_MEM_TABLE | Request::SET_LOG_BASE => self.kept = first.collect(),
            Request::SET_INFLIGHT_FD => self.inflight = first.next(),
            Request::GET_SHARED_OBJECT => return (Vec::new(), spare_fds(1).unwrap_or_default()),
            Request::CHECK_DEVICE_STATE => answer = self.offer.state_check,
            Request::GET_CONFIG => return (self.config(&payload), Vec::new()),
            Request::SET_CONFIG => self.write_config(&payload),
            Request::GET_INFLIGHT_FD => return self.inflight(&payload),
            Request::GET_SHMEM_CONFIG => return (self.shmem(), Vec::new()),
            Request::POSTCOPY_ADVISE => return (Vec::new(), spare_fds(1).unwrap_or_default()),
            // Bit 8: the front end's fd is used.
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

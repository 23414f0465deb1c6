//! Between the machine and its backend: passes every message and descriptor on, keeps a trace, and can ring
//! on the backend's own channel. Debian's storage daemon does not tell of a resized disk itself.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, Shutdown, recvmsg, sendmsg, shutdown,
};

use crate::scratch::Scratch;
use crate::wait;

/// The most descriptors that a message of the protocol carries, and some.
const FDS: usize = 16;
/// Bytes before each payload.
const HEADER: usize = 12;
const SET_BACKEND_REQ_FD: u32 = 21;
const CONFIG_CHANGE_MSG: u32 = 2;
const VERSION_1: u32 = 1;

/// One request of the machine as it went by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    /// Its number in the protocol.
    pub request: u32,
    /// Bytes after the header.
    pub size: u32,
    /// Descriptors that came with it.
    pub fds: usize,
}

#[derive(Debug, Default)]
struct State {
    seen: Vec<Seen>,
    channel: Option<OwnedFd>,
    end: bool,
}

/// A listening socket in front of a backend's. Ends with the connection, or when dropped.
#[derive(Debug)]
pub struct Proxy {
    scratch: Scratch,
    state: Arc<Mutex<State>>,
    thread: Option<JoinHandle<()>>,
}

impl Proxy {
    /// Stands in for the backend that listens on `backend`, for one machine.
    ///
    /// # Panics
    /// When the socket cannot be made.
    #[must_use]
    pub fn new(backend: &Path) -> Self {
        let scratch = Scratch::new();
        let listener = UnixListener::bind(scratch.path("proxy")).unwrap();
        let state = Arc::new(Mutex::new(State::default()));
        let (shared, backend) = (Arc::clone(&state), backend.to_owned());
        let thread = thread::spawn(move || {
            while !lock(&shared).end {
                if is_readable(listener.as_fd()) {
                    let (front, _) = listener.accept().unwrap();
                    return pass_on(&front, &UnixStream::connect(&backend).unwrap(), &shared);
                }
            }
        });
        Self { scratch, state, thread: Some(thread) }
    }

    /// Connects to a machine that listens on `machine`, on behalf of the backend that listens on `backend`.
    ///
    /// # Panics
    /// When one of the two cannot be reached.
    #[must_use]
    pub fn dialling(machine: &Path, backend: &Path) -> Self {
        let state = Arc::new(Mutex::new(State::default()));
        let reach = |path: &Path| {
            wait::until("a listening socket", crate::launch::STEP, || UnixStream::connect(path).ok())
        };
        let (front, back, shared) = (reach(machine), reach(backend), Arc::clone(&state));
        let thread = thread::spawn(move || pass_on(&front, &back, &shared));
        Self { scratch: Scratch::new(), state, thread: Some(thread) }
    }

    /// Where it listens.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.scratch.path("proxy")
    }

    /// Every request so far.
    #[must_use]
    pub fn seen(&self) -> Vec<Seen> {
        lock(&self.state).seen.clone()
    }

    /// Says on the backend's channel that the configuration has changed.
    ///
    /// # Panics
    /// When the machine has given the backend no channel.
    pub fn change_config(&self) {
        let channel = wait::until("the backend's own channel", crate::launch::STEP, || {
            lock(&self.state).channel.as_ref().map(|channel| channel.try_clone().unwrap())
        });
        let message: Vec<u8> =
            [CONFIG_CHANGE_MSG, VERSION_1, 0].iter().flat_map(|word| word.to_ne_bytes()).collect();
        // The backend may have made the channel non-blocking, and the machine may be slow to read.
        let written = wait::until("room in the backend's channel", crate::launch::STEP, || {
            match rustix::io::write(&channel, &message) {
                Err(Errno::AGAIN) => None,
                written => Some(written.unwrap()),
            }
        });
        assert_eq!(written, message.len());
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!(
                "--- the machine's last requests, backwards: {:?}",
                self.seen().iter().rev().take(8).collect::<Vec<_>>()
            );
        }
        lock(&self.state).end = true;
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            eprintln!("the proxy's thread panicked");
        }
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

fn is_readable(fd: BorrowedFd<'_>) -> bool {
    let tick = Timespec::try_from(Duration::from_millis(20)).unwrap();
    let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
    poll(&mut fds, Some(&tick)).unwrap() > 0
}

fn pass_on(front: &UnixStream, back: &UnixStream, state: &Mutex<State>) {
    let tick = Timespec::try_from(Duration::from_millis(20)).unwrap();
    while !lock(state).end {
        let mut fds = [PollFd::new(front, PollFlags::IN), PollFd::new(back, PollFlags::IN)];
        poll(&mut fds, Some(&tick)).unwrap();
        let ready = [!fds[0].revents().is_empty(), !fds[1].revents().is_empty()];
        for (from, to, is_request) in [(front, back, true), (back, front, false)] {
            if ready[usize::from(!is_request)] && !pass_one(from, to, is_request, state) {
                // The other side hears of it; that it has gone too is as well.
                shutdown(to, Shutdown::Both).unwrap_or_default();
                return;
            }
        }
    }
}

/// What has come, whole messages of the machine, any part of the backend's. False when the sender has gone.
fn pass_one(from: &UnixStream, to: &UnixStream, is_request: bool, state: &Mutex<State>) -> bool {
    let mut bytes = [0; 8192];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = recvmsg(from, &mut [IoSliceMut::new(&mut bytes)], &mut control, RecvFlags::CMSG_CLOEXEC);
    let Ok(received) = received else { return false };
    assert!(!received.flags.contains(ReturnFlags::CTRUNC), "too many descriptors");
    let mut fds = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    if received.bytes == 0 {
        return false;
    }
    if is_request {
        take_down(&bytes[..received.bytes], &fds, state);
    }
    let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !borrowed.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(&borrowed)));
    }
    sendmsg(to, &[IoSlice::new(&bytes[..received.bytes])], &mut control, SendFlags::NOSIGNAL).is_ok()
}

/// Notes each request; a few that need no answer may have come together.
fn take_down(mut bytes: &[u8], fds: &[OwnedFd], state: &Mutex<State>) {
    let mut state = lock(state);
    while !bytes.is_empty() {
        // Each message in one write: many backends break on a split one.
        let split = "a request came in pieces";
        let word = |at: usize| u32::from_ne_bytes(bytes.get(at..at + 4).expect(split).try_into().unwrap());
        let (request, size) = (word(0), word(8));
        state.seen.push(Seen { request, size, fds: fds.len() });
        if request == SET_BACKEND_REQ_FD {
            state.channel = fds.first().map(|fd| fd.try_clone().unwrap());
        }
        bytes = bytes.get(HEADER + usize::try_from(size).unwrap()..).expect(split);
    }
}

//! Signals to this process, turned into bytes on sockets that the control loop watches.
//!
//! The handlers stay installed for the life of the process. A signal that was ignored when the process
//! started stays ignored, as `nohup` requires.

use std::io::{self, Read};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::process::{Signal, getpid, kill_process};
use signal_hook::{flag, low_level};
use transport::peer::socket::remove_paths;

use crate::console::terminal;
use crate::error::Error;

/// Handlers of the signals that end, stop or continue this process. Each signal has one socket, stored beside
/// the signal's number. The handlers are installed before the machine is built, so that no signal meets a
/// half-built machine.
#[derive(Debug, Default)]
pub struct Signals(Vec<(Signal, UnixStream)>);

/// The consequence of a signal for the control loop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Asked {
    /// The machine is to end; the number of the signal.
    End(i32),
    /// The process goes on after a stop: the control loop only has to look at the terminal again.
    Continued,
}

impl Signals {
    /// Installs the handlers.
    ///
    /// * The first SIGINT, SIGTERM, SIGHUP or SIGQUIT ends the machine in order.
    /// * The second one ends the process at once, even if the machine hangs.
    /// * SIGTSTP restores the terminal's settings before this process stops. At SIGCONT the terminal becomes
    ///   raw again.
    ///
    /// # Errors
    /// When the handlers cannot be installed.
    pub fn watch() -> Result<Self, Error> {
        let cannot = |error| Error::internal("cannot watch for signals").because(error);
        Self::install().map_err(cannot)
    }

    fn install() -> io::Result<Self> {
        let ignored = ignored_at_start();
        let is_ignored = |signal: Signal| {
            ignored & 1_u64.wrapping_shl(signal.as_raw().wrapping_sub(1).cast_unsigned()) != 0
        };
        let ending = Arc::new(AtomicBool::new(false));
        let mut watched = Vec::new();
        for signal in [Signal::HUP, Signal::INT, Signal::QUIT, Signal::TERM, Signal::TSTP, Signal::CONT] {
            if is_ignored(signal) {
                continue;
            }
            let (handler, ours) = UnixStream::pair()?;
            ours.set_nonblocking(true)?;
            if !matches!(signal, Signal::TSTP | Signal::CONT) {
                flag::register_conditional_default(signal.as_raw(), Arc::clone(&ending))?;
                flag::register(signal.as_raw(), Arc::clone(&ending))?;
            }
            low_level::pipe::register(signal.as_raw(), handler)?;
            watched.push((signal, ours));
        }
        Ok(Signals(watched))
    }

    /// Calls `act`, which may wait long and leaves nothing to undo. If a signal asks for the end during
    /// `act`, the process exits at once; its sockets are removed first.
    ///
    /// # Errors
    /// The errors of `act`, and when the host refuses a thread.
    pub fn during<T>(&self, act: impl FnOnce() -> Result<T, Error>) -> Result<T, Error> {
        let cannot = |error| Error::internal("cannot watch for signals").because(error);
        let (ours, theirs) = UnixStream::pair().map_err(cannot)?;
        std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().name("start".to_owned()).stack_size(256 << 10);
            thread
                .spawn_scoped(scope, move || {
                    while let Some(index) = self.wait_or_end(&theirs) {
                        if let Some(Asked::End(signal)) = self.take(index) {
                            remove_paths();
                            std::process::exit(128 + signal);
                        }
                    }
                })
                .map_err(cannot)?;
            let done = act();
            // Closes the socket whose end of file ends the thread.
            drop(ours);
            done
        })
    }

    /// Waits for a signal and gives its place among [`Signals::sockets`]. `None` when the peer of `end` was
    /// closed.
    fn wait_or_end(&self, end: &UnixStream) -> Option<usize> {
        let fds = [end].into_iter().chain(self.sockets());
        let mut fds: Vec<_> = fds.map(|socket| PollFd::new(socket, PollFlags::IN)).collect();
        while let Err(Errno::INTR) = poll(&mut fds, None) {}
        let (end, signals) = fds.split_first()?;
        let index = signals.iter().position(|fd| !fd.revents().is_empty());
        index.filter(|_| end.revents().is_empty())
    }

    /// One socket for each signal; it is readable when the signal has arrived.
    pub(crate) fn sockets(&self) -> impl Iterator<Item = &UnixStream> {
        self.0.iter().map(|(_, socket)| socket)
    }

    /// Takes the signal whose socket has this place among [`Signals::sockets`]. At SIGTSTP this process stops
    /// here.
    pub(crate) fn take(&self, index: usize) -> Option<Asked> {
        let (signal, mut socket) = self.0.get(index).map(|(signal, socket)| (*signal, socket))?;
        if let Err(error) = socket.read(&mut [0; 16]) {
            log::debug!("cannot read from the signal's socket: {error}");
        }
        match signal {
            Signal::CONT => Some(Asked::Continued),
            Signal::TSTP => {
                terminal::restore();
                if let Err(error) = kill_process(getpid(), Signal::STOP) {
                    log::debug!("cannot stop: {error}");
                }
                Some(Asked::Continued)
            }
            _ => {
                // The terminal is restored now, because the next signal ends the process at once.
                terminal::restore();
                Some(Asked::End(signal.as_raw()))
            }
        }
    }
}

/// Makes a write beyond the file size limit fail with an error. Without this, SIGXFSZ would end the process
/// silently.
pub(crate) fn survive_file_size_limit() {
    if let Err(error) = flag::register(Signal::XFSZ.as_raw(), Arc::default()) {
        log::debug!("a limit of file sizes will end this process: {error}");
    }
}

/// The signals that this process ignores, as bits. A signal with a handler of ours is not among them.
fn ignored_at_start() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0)
}

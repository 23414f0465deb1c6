//! Signals to this process, as the control loop hears of them.
//!
//! The handlers stay for the life of the process. A signal that was ignored when the process began stays ignored, as
//! whoever ran it under `nohup` wants.

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

/// Handlers of the signals that end, stop or continue a process: one socket a signal, with the signal's number. Made
/// before the machine, so that no signal finds a half-built one.
#[derive(Debug, Default)]
pub struct Signals(Vec<(Signal, UnixStream)>);

/// What a signal asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Asked {
    /// The end of the machine.
    End(i32),
    /// Nothing more than to look at the terminal again.
    Continued,
}

impl Signals {
    /// Ends the machine in order at the first SIGINT, SIGTERM, SIGHUP or SIGQUIT, and the process at the second, whatever
    /// hangs. Gives the terminal back at SIGTSTP and takes it again at SIGCONT.
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

    /// Does something that may wait long, and which nobody has to undo: a signal that asks for the end meanwhile ends the
    /// process. Its sockets are removed.
    ///
    /// # Errors
    /// Those of `act`, and when the host refuses a thread.
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
            // What the thread waits for.
            drop(ours);
            done
        })
    }

    /// Waits for a signal; `None` when `end` has been closed instead.
    fn wait_or_end(&self, end: &UnixStream) -> Option<usize> {
        let fds = [end].into_iter().chain(self.sockets());
        let mut fds: Vec<_> = fds.map(|socket| PollFd::new(socket, PollFlags::IN)).collect();
        while let Err(Errno::INTR) = poll(&mut fds, None) {}
        let (end, signals) = fds.split_first()?;
        let index = signals.iter().position(|fd| !fd.revents().is_empty());
        index.filter(|_| end.revents().is_empty())
    }

    /// What becomes readable with each signal.
    pub(crate) fn sockets(&self) -> impl Iterator<Item = &UnixStream> {
        self.0.iter().map(|(_, socket)| socket)
    }

    /// Takes what has arrived of the signal with this place among [`Signals::sockets`]. Stops this process when that was
    /// asked for.
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
                // Now, while it is certain: the next signal ends the process on the spot.
                terminal::restore();
                Some(Asked::End(signal.as_raw()))
            }
        }
    }
}

/// A file size beyond the limit becomes an error of the write, instead of the silent end of the process.
pub(crate) fn survive_file_size_limit() {
    if let Err(error) = flag::register(Signal::XFSZ.as_raw(), Arc::default()) {
        log::debug!("a limit of file sizes will end this process: {error}");
    }
}

/// The signals that are ignored, as bits; those that a handler of ours already serves are not.
fn ignored_at_start() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0)
}

//! The other end of the serial port: standard streams, a file, a socket, or a sink of the library's caller.
//!
//! * Output without a reader is kept up to a bound. With a reader that does not read, the guest is then
//!   slowed down, as by a real serial line.
//! * Input is bounded: bytes that the guest's FIFO does not take stay in the source.
//!
//! The console must never make the control loop wait.

pub mod keyboard;
pub(crate) mod outlet;
pub(crate) mod terminal;
pub(crate) mod transmit;

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::OFlags;
use transport::peer::deadline::Deadline;
use transport::peer::socket::Listener;

use crate::config::Serial;
use crate::console::keyboard::{Key, Keyboard};
use crate::console::outlet::{Outlet, reopen};
use crate::console::transmit::Transmit;
use crate::error::Error;

/// The number of bytes that one read of the source takes. At most this many bytes wait for the guest.
const CHUNK: usize = 1024;

/// The console of a machine. It stays over reboots.
pub(crate) struct Console {
    output: Arc<Transmit>,
    source: Source,
    keyboard: Keyboard,
    waiting: Vec<u8>,
}

enum Source {
    None,
    Stdin { file: File, is_terminal: bool },
    Socket { listener: Listener, client: Option<UnixStream> },
}

/// The result of a read of the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Input {
    /// The source is open; the read may have brought bytes.
    Open,
    /// The source has ended.
    Ended,
    /// The user typed Ctrl-A x.
    Quit,
}

/// The descriptors of the console that may become readable.
#[derive(Debug)]
pub(crate) enum Readable<'a> {
    /// Nothing.
    Nothing,
    /// A descriptor with typed bytes.
    Bytes(BorrowedFd<'a>),
    /// A listening socket with new clients.
    Clients(BorrowedFd<'a>),
}

impl Console {
    /// Opens the console that `serial` describes. The terminal's settings stay unchanged until
    /// [`Console::begin`].
    ///
    /// # Errors
    /// When the file, the socket or the standard streams cannot be opened.
    pub(crate) fn open(serial: &Serial) -> Result<Self, Error> {
        let (output, source) = match serial {
            Serial::Null => (Transmit::to_sink(Arc::new(std::sync::Mutex::new(io::sink()))), Source::None),
            Serial::Sink(sink) => (Transmit::to_sink(Arc::clone(sink)), Source::None),
            Serial::File(path) => {
                let outlet = Outlet::file(path).map_err(|error| {
                    Error::usage(format!("cannot write the serial output to {}", path.display()))
                        .because(error)
                })?;
                (Transmit::to_outlet(outlet), Source::None)
            }
            Serial::Stdio => {
                let cannot = |error| Error::usage("cannot use standard input and output").because(error);
                let outlet = Outlet::stream(io::stdout().as_fd()).map_err(cannot)?;
                let is_terminal = terminal::is_terminal();
                // A file description of our own can be non-blocking. A read then never waits, even if another
                // process reads the same terminal or pipe.
                let file = reopen(io::stdin().as_fd(), OFlags::RDONLY);
                let file = file.or_else(|_| io::stdin().as_fd().try_clone_to_owned()).map_err(cannot)?;
                (Transmit::to_outlet(outlet), Source::Stdin { file: File::from(file), is_terminal })
            }
            Serial::Socket(path, admission) => {
                let listener = Listener::bind_for(path, *admission)
                    .map_err(|error| Error::listening("the console", path, error))?;
                (Transmit::to_outlet(Outlet::nowhere()), Source::Socket { listener, client: None })
            }
        };
        Ok(Console { output: Arc::new(output), source, keyboard: Keyboard::default(), waiting: Vec::new() })
    }

    /// The output of the serial port.
    pub(crate) fn output(&self) -> &Arc<Transmit> {
        &self.output
    }

    /// Makes the terminal raw, if the source is a terminal and this process is in its foreground. False when
    /// the source is a terminal that must not be read now.
    pub(crate) fn begin(&self) -> bool {
        !matches!(self.source, Source::Stdin { is_terminal: true, .. }) || terminal::take()
    }

    /// The descriptor to watch for input.
    pub(crate) fn readable(&self) -> Readable<'_> {
        match &self.source {
            Source::None => Readable::Nothing,
            Source::Stdin { file, .. } => Readable::Bytes(file.as_fd()),
            Source::Socket { listener, .. } => Readable::Clients(listener.as_fd()),
        }
    }

    /// Accepts a client that waits at the socket, and gives it the output that was kept so far. True when a
    /// client was accepted.
    pub(crate) fn accept(&mut self) -> bool {
        let Source::Socket { listener, client } = &mut self.source else { return false };
        let accepted = listener.accept(&Deadline::after(Duration::ZERO));
        match accepted.and_then(|stream| Ok((stream.try_clone()?, stream))) {
            Ok((output, stream)) => {
                self.output.lead_to(Some(output.into()));
                *client = Some(stream);
                true
            }
            Err(error) => {
                log::debug!("a client of the console went before it was served: {error}");
                false
            }
        }
    }

    /// A copy of the client's socket, to be watched for input. The client stays connected over a reboot.
    pub(crate) fn client(&self) -> Option<UnixStream> {
        let Source::Socket { client, .. } = &self.source else { return None };
        client.as_ref()?.try_clone().ok()
    }

    /// The client is gone. The next client gets the bytes that this client has not read.
    pub(crate) fn client_gone(&mut self) {
        if let Source::Socket { client, .. } = &mut self.source {
            *client = None;
            self.output.lead_to(None);
        }
    }

    /// Reads at most `CHUNK` bytes from the source. [`Console::flush`] offers them to the guest.
    pub(crate) fn receive(&mut self) -> Input {
        let mut bytes = [0; CHUNK];
        let read = match &mut self.source {
            Source::None | Source::Socket { client: None, .. } => return Input::Ended,
            Source::Stdin { file, .. } => file.read(&mut bytes),
            Source::Socket { client: Some(client), .. } => client.read(&mut bytes),
        };
        let read = match read {
            Ok(0) => return Input::Ended,
            Ok(read) => bytes.get(..read).unwrap_or_default(),
            Err(error) if [io::ErrorKind::WouldBlock, io::ErrorKind::Interrupted].contains(&error.kind()) => {
                return Input::Open;
            }
            Err(error) => {
                log::warn!("console input ends: {error}");
                return Input::Ended;
            }
        };
        let terminal = matches!(self.source, Source::Stdin { is_terminal: true, .. });
        for byte in read {
            if !terminal {
                self.waiting.push(*byte);
                continue;
            }
            match self.keyboard.key(*byte) {
                Key::Nothing => {}
                Key::Byte(byte) => self.waiting.push(byte),
                Key::Quit => return Input::Quit,
            }
        }
        Input::Open
    }

    /// Offers the guest the bytes that wait. True when no bytes wait any more.
    pub(crate) fn flush(&mut self, mut offer: impl FnMut(&[u8]) -> usize) -> bool {
        let taken = offer(&self.waiting).min(self.waiting.len());
        self.waiting.drain(..taken);
        self.waiting.is_empty()
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        if matches!(self.source, Source::Stdin { is_terminal: true, .. }) {
            terminal::restore();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Admission;
    use std::io::Write;

    #[test]
    fn input_that_the_guest_does_not_take_waits() {
        let path = std::env::temp_dir().join(format!("outboard-console-{}", std::process::id()));
        let mut console = Console::open(&Serial::Socket(path.clone(), Admission::default())).unwrap();
        assert!(!console.accept(), "there is no client yet");
        let client = UnixStream::connect(&path).unwrap();
        assert!(console.accept());
        (&client).write_all(b"hello").unwrap();
        assert_eq!(console.receive(), Input::Open);
        assert!(!console.flush(|bytes| bytes.len().min(2)));
        let mut got = Vec::new();
        assert!(console.flush(|bytes| {
            got.extend_from_slice(bytes);
            bytes.len()
        }));
        assert_eq!(got, b"llo");
        drop(console);
        assert!(!path.exists(), "the socket is removed");
    }
}

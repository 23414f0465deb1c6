//! The far end of the serial port: standard streams, a file, a socket, or a sink of the caller's.
//!
//! Output never makes a vCPU wait for a socket's client: what a client does not take is dropped. Input is
//! bounded: what the guest's FIFO does not take stays in the source.

pub mod keyboard;
pub(crate) mod terminal;

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use crate::config::Serial;
use crate::console::keyboard::{Key, Keyboard};
use crate::console::terminal::RawTerminal;
use crate::error::Error;

/// Bytes read from the source at a time; also the most that waits for the guest.
const CHUNK: usize = 1024;

/// The console of a machine; outlives its reboots.
pub(crate) struct Console {
    output: Arc<Mutex<dyn Write + Send>>,
    source: Source,
    keyboard: Keyboard,
    waiting: Vec<u8>,
}

enum Source {
    None,
    Stdin { file: File, terminal: Option<RawTerminal> },
    Socket { listener: UnixListener, client: Arc<Mutex<Option<UnixStream>>>, path: PathBuf },
}

/// What reading the source brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Input {
    /// Perhaps some bytes; more may come.
    Open,
    /// The source has ended.
    Ended,
    /// The user typed Ctrl-A x.
    Quit,
}

/// Which descriptors of the console may become readable.
#[derive(Debug)]
pub(crate) enum Readable<'a> {
    /// Nothing.
    Nothing,
    /// Typed bytes.
    Bytes(BorrowedFd<'a>),
    /// New clients of the socket.
    Clients(BorrowedFd<'a>),
}

impl Console {
    /// Opens what `serial` names.
    ///
    /// # Errors
    /// When the file, the socket or the terminal cannot be had.
    pub(crate) fn open(serial: &Serial) -> Result<Self, Error> {
        let (output, source): (Arc<Mutex<dyn Write + Send>>, Source) = match serial {
            Serial::Null => (Arc::new(Mutex::new(io::sink())), Source::None),
            Serial::Sink(sink) => (Arc::clone(sink), Source::None),
            Serial::File(path) => {
                let file = File::create(path).map_err(|error| {
                    Error::usage(format!("cannot write the serial output to {}", path.display()))
                        .because(error)
                })?;
                (Arc::new(Mutex::new(file)), Source::None)
            }
            Serial::Stdio => {
                let cannot = |error| Error::usage("cannot use standard input and output").because(error);
                // Descriptors of our own, without the buffers of std: a byte is shown when it is written.
                let output = File::from(io::stdout().as_fd().try_clone_to_owned().map_err(cannot)?);
                let file = File::from(io::stdin().as_fd().try_clone_to_owned().map_err(cannot)?);
                let terminal = RawTerminal::enter().map_err(cannot)?;
                (Arc::new(Mutex::new(output)), Source::Stdin { file, terminal })
            }
            Serial::Socket(path) => {
                let cannot = |error: io::Error| {
                    let hint = if error.kind() == io::ErrorKind::AddrInUse {
                        "the file exists: is another machine using it? If not, remove it"
                    } else {
                        "give a path in a directory that exists and may be written"
                    };
                    Error::usage(format!("cannot listen for the console on {}", path.display()))
                        .because(error)
                        .hint(hint)
                };
                let listener = UnixListener::bind(path).map_err(cannot)?;
                listener.set_nonblocking(true).map_err(cannot)?;
                let client = Arc::new(Mutex::new(None));
                let output = Arc::new(Mutex::new(ToClient(Arc::clone(&client))));
                (output, Source::Socket { listener, client, path: path.clone() })
            }
        };
        Ok(Console { output, source, keyboard: Keyboard::default(), waiting: Vec::new() })
    }

    /// A writer for the serial port of one boot.
    pub(crate) fn output(&self) -> Box<dyn Write + Send> {
        Box::new(Output(Arc::clone(&self.output)))
    }

    /// What to watch.
    pub(crate) fn readable(&self) -> Readable<'_> {
        match &self.source {
            Source::None => Readable::Nothing,
            Source::Stdin { file, .. } => Readable::Bytes(file.as_fd()),
            Source::Socket { listener, .. } => Readable::Clients(listener.as_fd()),
        }
    }

    /// A client is waiting at the socket: takes it. True when there is one now.
    pub(crate) fn accept(&mut self) -> bool {
        let Source::Socket { listener, client, .. } = &self.source else { return false };
        let accepted =
            listener.accept().and_then(|(stream, _)| stream.set_nonblocking(true).map(|()| stream));
        match accepted {
            Ok(stream) => {
                *client.lock().unwrap_or_else(PoisonError::into_inner) = Some(stream);
                true
            }
            Err(error) => {
                log::debug!("a client of the console went before it was served: {error}");
                false
            }
        }
    }

    /// The socket's client, if there is one, to be watched for input; it stays over a reboot.
    pub(crate) fn client(&self) -> Option<UnixStream> {
        let Source::Socket { client, .. } = &self.source else { return None };
        client.lock().unwrap_or_else(PoisonError::into_inner).as_ref()?.try_clone().ok()
    }

    /// Reads what the source has, up to a bound, and offers it to the guest.
    pub(crate) fn receive(&mut self, mut offer: impl FnMut(&[u8]) -> usize) -> Input {
        let mut bytes = [0; CHUNK];
        let read = match &mut self.source {
            Source::None => return Input::Ended,
            Source::Stdin { file, .. } => file.read(&mut bytes),
            Source::Socket { client, .. } => {
                let mut client = client.lock().unwrap_or_else(PoisonError::into_inner);
                let read = match client.as_mut() {
                    Some(stream) => stream.read(&mut bytes),
                    None => Ok(0),
                };
                if matches!(&read, Ok(0)) {
                    *client = None;
                }
                read
            }
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
        let terminal = matches!(self.source, Source::Stdin { terminal: Some(_), .. });
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
        self.flush(&mut offer);
        Input::Open
    }

    /// Offers the guest what waits; true when nothing waits any more.
    pub(crate) fn flush(&mut self, mut offer: impl FnMut(&[u8]) -> usize) -> bool {
        let taken = offer(&self.waiting).min(self.waiting.len());
        self.waiting.drain(..taken);
        self.waiting.is_empty()
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        if let Source::Socket { path, .. } = &self.source
            && let Err(error) = std::fs::remove_file(path)
        {
            log::warn!("cannot remove the console socket {}: {error}", path.display());
        }
    }
}

/// One boot's handle on the machine's console.
struct Output(Arc<Mutex<dyn Write + Send>>);

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).flush()
    }
}

/// Writes to the socket's client, if there is one and it keeps up.
struct ToClient(Arc<Mutex<Option<UnixStream>>>);

impl Write for ToClient {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut client = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(stream) = client.as_mut() {
            match stream.write(bytes) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => *client = None,
                Ok(_) => {}
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn input_that_the_guest_does_not_take_waits() {
        let (theirs, ours) = UnixStream::pair().unwrap();
        let path = std::env::temp_dir().join(format!("outboard-console-{}", std::process::id()));
        let mut console = Console::open(&Serial::Socket(path.clone())).unwrap();
        if let Source::Socket { client, .. } = &console.source {
            *client.lock().unwrap() = Some(ours);
        }
        (&theirs).write_all(b"hello").unwrap();
        assert_eq!(console.receive(|bytes| bytes.len().min(2)), Input::Open);
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

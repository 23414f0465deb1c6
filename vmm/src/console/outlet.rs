//! Bytes on their way to a descriptor that may have no reader. A write must never wait. It must never change
//! the mode of a descriptor that this process shares with others.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FileType, Mode, OFlags, fstat, open};
use rustix::net::{SendFlags, send};
use rustix::termios::isatty;
use transport::peer::deadline::{Deadline, Waited, wait_writable};

/// The way in which a descriptor is written without waiting.
#[derive(Debug)]
enum Way {
    /// There is no descriptor yet.
    Nobody,
    /// A regular file, or a non-blocking file description of our own. A write does not wait.
    Plain(File),
    /// A socket, written with `MSG_DONTWAIT`.
    Socket(OwnedFd),
    /// Another device, or a pipe that cannot be opened again. It is polled before each write.
    Polled(File),
}

/// A file that was opened by its path. Log rotation may move the file away while it is written.
#[derive(Debug)]
struct Named {
    path: PathBuf,
    /// Device and inode.
    identity: (u64, u64),
}

/// A descriptor, and the bytes that it has not taken yet.
#[derive(Debug)]
pub(crate) struct Outlet {
    way: Way,
    named: Option<Named>,
    waiting: VecDeque<u8>,
    last: u8,
}

impl Outlet {
    fn new(way: Way, named: Option<Named>) -> Self {
        Self { way, named, waiting: VecDeque::new(), last: b'\n' }
    }

    /// An outlet without a descriptor. It keeps all bytes until [`Outlet::lead_to`] gives it one.
    pub(crate) fn nowhere() -> Self {
        Self::new(Way::Nobody, None)
    }

    /// Writes to `socket` from now on, beginning with the bytes that wait. With `None`, bytes only wait.
    pub(crate) fn lead_to(&mut self, socket: Option<OwnedFd>) {
        self.way = socket.map_or(Way::Nobody, Way::Socket);
    }

    /// Writes to a stream that other processes may share: standard output, a socket, a terminal.
    ///
    /// # Errors
    /// When it is not open, or the process has no descriptor left.
    pub(crate) fn stream(fd: BorrowedFd<'_>) -> io::Result<Self> {
        let way = match FileType::from_raw_mode(fstat(fd)?.st_mode) {
            FileType::Socket => Way::Socket(fd.try_clone_to_owned()?),
            kind if kind == FileType::Fifo || isatty(fd) => {
                // The descriptor's mode is shared with every process that has the descriptor. A new file
                // description is ours alone.
                match reopen(fd, OFlags::WRONLY) {
                    Ok(own) => Way::Plain(File::from(own)),
                    Err(_) => Way::Polled(File::from(fd.try_clone_to_owned()?)),
                }
            }
            FileType::CharacterDevice => Way::Polled(File::from(fd.try_clone_to_owned()?)),
            _ => Way::Plain(File::from(fd.try_clone_to_owned()?)),
        };
        Ok(Self::new(way, None))
    }

    /// Writes to the file at `path`, whose earlier contents are dropped. When the file is moved away, the
    /// output goes on in a new file at `path`. When the file is cut short, the output goes on at its new end.
    ///
    /// # Errors
    /// When it cannot be written.
    pub(crate) fn file(path: &Path) -> io::Result<Self> {
        let file = open_named(path, OFlags::TRUNC)?;
        let found = file.metadata()?;
        let named =
            found.is_file().then(|| Named { path: path.to_owned(), identity: (found.dev(), found.ino()) });
        Ok(Self::new(Way::Plain(file), named))
    }

    /// Takes bytes, then passes on as many as the descriptor accepts now.
    ///
    /// # Errors
    /// See [`Outlet::pass_on`].
    pub(crate) fn push(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.waiting.extend(bytes);
        self.pass_on()
    }

    /// Passes on as many bytes as the descriptor accepts now. The other bytes go on waiting.
    ///
    /// # Errors
    /// When the descriptor will not accept the bytes later, either.
    pub(crate) fn pass_on(&mut self) -> io::Result<()> {
        while !self.waiting.is_empty() {
            self.follow();
            let (front, _) = self.waiting.as_slices();
            let written = match &mut self.way {
                Way::Nobody => return Ok(()),
                Way::Plain(file) => file.write(front),
                Way::Socket(socket) => {
                    send(&*socket, front, SendFlags::DONTWAIT | SendFlags::NOSIGNAL).map_err(Into::into)
                }
                Way::Polled(file) => {
                    let mut fds = [PollFd::new(&*file, PollFlags::OUT)];
                    if poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }))? == 0 {
                        return Ok(());
                    }
                    // poll promises room for one byte only where the descriptor is a device, and for a page
                    // where it is a pipe.
                    file.write(front.get(..1).unwrap_or_default())
                }
            };
            match written {
                Ok(written) => {
                    self.last = self.waiting.drain(..written).next_back().unwrap_or(self.last);
                    if written == 0 {
                        return Ok(());
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// At the beginning of a line, checks that the file is still at its path. If it is not, the output goes
    /// on in a new file.
    fn follow(&mut self) {
        let Some(named) = self.named.as_mut().filter(|_| self.last == b'\n') else { return };
        let found = std::fs::metadata(&named.path).map(|found| (found.dev(), found.ino()));
        if found.is_ok_and(|found| found == named.identity) {
            return;
        }
        // When no new file can be opened, the output stays in the old one.
        if let Ok(file) = open_named(&named.path, OFlags::empty())
            && let Ok(found) = file.metadata()
        {
            named.identity = (found.dev(), found.ino());
            self.way = Way::Plain(file);
        }
    }

    /// Waits while the reader goes on reading: at most `silence` between two of its reads, and `limit` in
    /// all.
    ///
    /// # Errors
    /// See [`Outlet::pass_on`].
    pub(crate) fn drain(&mut self, silence: Duration, limit: Duration) -> io::Result<()> {
        let end = Deadline::after(limit);
        loop {
            self.pass_on()?;
            let left = end.remaining().filter(|_| !self.waiting.is_empty());
            let (Some(left), Some(fd)) = (left, self.fd()) else { return Ok(()) };
            if wait_writable(fd, &Deadline::after(silence.min(left)))? == Waited::TimedOut {
                return Ok(());
            }
        }
    }

    /// How many bytes wait.
    pub(crate) fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Drops the oldest waiting bytes until `rest` are left. Gives the number of dropped bytes.
    pub(crate) fn forget(&mut self, rest: usize) -> usize {
        let excess = self.waiting.len().saturating_sub(rest);
        self.waiting.drain(..excess);
        excess
    }

    /// True when there is no descriptor.
    pub(crate) fn is_nowhere(&self) -> bool {
        matches!(self.way, Way::Nobody)
    }

    /// The descriptor, which becomes writable when more bytes can be passed on.
    pub(crate) fn fd(&self) -> Option<BorrowedFd<'_>> {
        match &self.way {
            Way::Nobody => None,
            Way::Plain(file) | Way::Polled(file) => Some(file.as_fd()),
            Way::Socket(socket) => Some(socket.as_fd()),
        }
    }
}

/// Opens the pipe or terminal behind `fd` again. The result is a non-blocking file description of our own.
pub(crate) fn reopen(fd: BorrowedFd<'_>, access: OFlags) -> io::Result<OwnedFd> {
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    Ok(open(path, access | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC, Mode::empty())?)
}

/// Opens a file for writing. A FIFO is opened for reading as well: it then needs no reader, and keeps the
/// bytes until a reader comes.
fn open_named(path: &Path, how: OFlags) -> io::Result<File> {
    let is_fifo =
        std::fs::metadata(path).is_ok_and(|found| FileType::from_raw_mode(found.mode()) == FileType::Fifo);
    let access = if is_fifo { OFlags::RDWR } else { OFlags::WRONLY };
    let flags =
        access | OFlags::CREATE | OFlags::APPEND | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC | how;
    Ok(File::from(open(path, flags, Mode::from_raw_mode(0o666))?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::pipe::{PipeFlags, pipe_with};
    use std::io::Read;

    #[test]
    fn a_full_pipe_keeps_its_mode_and_takes_the_rest_when_it_is_read() {
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC).unwrap();
        let mut outlet = Outlet::stream(writer.as_fd()).unwrap();
        let text: Vec<u8> = (0..200_000_u32).map(|n| u8::try_from(n % 251).unwrap()).collect();
        for piece in text.chunks(1000) {
            outlet.push(piece).unwrap();
        }
        assert!(outlet.waiting() > 100_000);
        assert!(!rustix::fs::fcntl_getfl(&writer).unwrap().contains(OFlags::NONBLOCK));
        drop(writer);
        let mut got = Vec::new();
        let mut reader = File::from(reader);
        while got.len() < text.len() {
            let mut some = [0; 4096];
            let length = reader.read(&mut some).unwrap();
            got.extend_from_slice(&some[..length]);
            outlet.pass_on().unwrap();
        }
        assert!(got == text && outlet.waiting() == 0);
    }

    #[test]
    fn a_reader_that_has_gone_is_an_error_and_one_that_sleeps_ends_the_last_wait() {
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC).unwrap();
        let mut outlet = Outlet::stream(writer.as_fd()).unwrap();
        outlet.push(&[7; 100_000]).unwrap();
        let rest = outlet.waiting();
        outlet.drain(Duration::from_millis(20), Duration::from_secs(60)).unwrap();
        assert_eq!((outlet.waiting(), outlet.forget(5)), (rest, rest - 5));
        drop(reader);
        assert_eq!(outlet.pass_on().unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }

    #[test]
    fn a_file_that_is_moved_away_or_cut_short_is_followed_from_the_next_line_on() {
        let folder = std::env::temp_dir().join(format!("outboard-outlet-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let (path, moved) = (folder.join("console"), folder.join("console.1"));
        let mut outlet = Outlet::file(&path).unwrap();
        outlet.push(b"one\nun").unwrap();
        std::fs::rename(&path, &moved).unwrap();
        outlet.push(b"o\ntwo\n").unwrap();
        outlet.push(b"three\n").unwrap();
        assert_eq!(std::fs::read(&moved).unwrap(), b"one\nuno\ntwo\n");
        assert_eq!(std::fs::read(&path).unwrap(), b"three\n");
        File::options().write(true).truncate(true).open(&path).unwrap();
        outlet.push(b"four\n").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"four\n", "no hole");
        std::fs::remove_dir_all(&folder).unwrap();
    }
}

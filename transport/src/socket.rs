//! How a peer's unix socket is reached: by path, by abstract name, or as an inherited descriptor.
//!
//! Must never wait past the deadline: a full backlog is waited for in small steps.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use crate::deadline::Deadline;

/// How long to wait before looking again at a socket whose backlog is full: unix sockets do not tell.
const BACKLOG_PAUSE: Duration = Duration::from_millis(10);

/// The address of `path`; one that begins with `@` is an abstract name.
pub(crate) fn address(path: &Path) -> io::Result<SocketAddrUnix> {
    let address = match path.as_os_str().as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddrUnix::new_abstract_name(name)?,
        None => SocketAddrUnix::new(path)?,
    };
    Ok(address)
}

pub(crate) fn stream_socket() -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    Ok(rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?)
}

/// Connects to `path` before `deadline`. The stream is non-blocking.
pub fn connect(path: &Path, deadline: &Deadline) -> io::Result<UnixStream> {
    let address = address(path)?;
    let socket = stream_socket()?;
    loop {
        match rustix::net::connect(socket.as_fd(), &address) {
            Ok(()) => return Ok(UnixStream::from(socket)),
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => match deadline.remaining() {
                Some(left) => std::thread::sleep(left.min(BACKLOG_PAUSE)),
                None => return Err(io::ErrorKind::TimedOut.into()),
            },
            Err(errno) => return Err(errno.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;
    use std::time::Instant;

    fn soon() -> Deadline {
        Deadline::after(Duration::from_millis(100))
    }

    #[test]
    fn absent_stale_and_overlong_paths_say_which() {
        let dir = std::env::temp_dir().join(format!("outboard-socket-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let path = dir.join("s");
        assert_eq!(connect(&path, &soon()).unwrap_err().kind(), io::ErrorKind::NotFound);
        drop(UnixListener::bind(&path).unwrap());
        assert_eq!(connect(&path, &soon()).unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
        let long = dir.join("x".repeat(120));
        assert_eq!(
            connect(&long, &soon()).unwrap_err().raw_os_error(),
            Some(Errno::NAMETOOLONG.raw_os_error())
        );
        std::fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn a_full_backlog_ends_in_a_timeout() {
        let name = format!("@outboard-backlog-{}", std::process::id());
        let listener = stream_socket().unwrap();
        rustix::net::bind(&listener, &address(Path::new(&name)).unwrap()).unwrap();
        rustix::net::listen(&listener, 0).unwrap();
        let _first = connect(Path::new(&name), &soon()).unwrap();
        let begin = Instant::now();
        let mut streams = Vec::new();
        let error = loop {
            match connect(Path::new(&name), &soon()) {
                Ok(stream) => streams.push(stream),
                Err(error) => break error,
            }
        };
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert!(begin.elapsed() < Duration::from_secs(1));
    }
}

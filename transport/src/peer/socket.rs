//! How a peer's unix socket is reached: by path or abstract name, by connecting or listening.
//!
//! Must never wait past the deadline. A socket with a full backlog is tried again in small steps.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, Once, PoisonError};
use std::time::{Duration, Instant};

use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use crate::peer::deadline::{Deadline, Waited, wait_readable};

/// The pause before a socket whose backlog is full is tried again: a unix socket does not report room in its
/// backlog.
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

/// Who may be at the other end of a socket, besides our own user and root.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Admission {
    /// The permission bits of the socket's file. The default is 0600, or 0666 with `user`, as each connection
    /// is checked.
    pub mode: Option<u32>,
    /// The id of one further user.
    pub user: Option<u32>,
}

impl Admission {
    /// True when the process at the other end ran as one of these users when it connected or listened.
    fn admits(self, socket: impl AsFd) -> bool {
        let peer = rustix::net::sockopt::socket_peercred(socket).map(|peer| peer.uid);
        peer.is_ok_and(|user| {
            user.is_root() || user == rustix::process::geteuid() || self.user == Some(user.as_raw())
        })
    }
}

/// Connects to `path` before `deadline`. The stream is non-blocking.
pub fn connect(path: &Path, deadline: &Deadline, admission: Admission) -> io::Result<UnixStream> {
    let address = address(path)?;
    let socket = stream_socket()?;
    loop {
        match rustix::net::connect(socket.as_fd(), &address) {
            // A path has an owner and a mode. An abstract name has neither: any process may have taken it
            // first.
            Ok(()) if address.abstract_name().is_some() && !admission.admits(&socket) => {
                let what = "the socket of this abstract name belongs to another user";
                return Err(io::Error::new(io::ErrorKind::PermissionDenied, what));
            }
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

/// The paths of this process's listeners, each with the device and inode of its file.
static OURS: Mutex<Vec<(PathBuf, (u64, u64))>> = Mutex::new(Vec::new());

/// Removes the paths of all listeners whose files are still ours. For a process that exits without dropping
/// its listeners.
pub fn remove_paths() {
    for (path, file) in std::mem::take(&mut *OURS.lock().unwrap_or_else(PoisonError::into_inner)) {
        remove(&path, file);
    }
}

fn remove(path: &Path, file: (u64, u64)) {
    if identity(path).is_ok_and(|found| found == file)
        && let Err(error) = std::fs::remove_file(path)
    {
        log::debug!("removing {}: {error}", path.display());
    }
}

/// A socket on which we wait for the peer, as OVS and DPDK use it. Dropping the listener removes its path.
#[derive(Debug)]
pub struct Listener {
    socket: OwnedFd,
    name: PathBuf,
    /// Device and inode of the file at the path: no file but our own is removed.
    file: Option<(u64, u64)>,
    admission: Admission,
    /// Makes the log warn only once about processes that were turned away.
    turned_away: Once,
}

impl Listener {
    /// Listens on `path` (`@name` for an abstract socket), for our user and root: the file has mode 0600
    /// whatever the umask. Replaces a stale socket file, which is one without a listener.
    pub fn bind(path: &Path) -> io::Result<Self> {
        Self::bind_for(path, Admission::default())
    }

    /// As [`Listener::bind`], also for the user and with the mode in `admission`.
    pub fn bind_for(path: &Path, admission: Admission) -> io::Result<Self> {
        let address = address(path)?;
        let socket = stream_socket()?;
        match rustix::net::bind(&socket, &address) {
            Err(Errno::ADDRINUSE) if is_stale(path) => {
                std::fs::remove_file(path)?;
                rustix::net::bind(&socket, &address)?;
            }
            bound => bound?,
        }
        let is_file = address.abstract_name().is_none();
        let file = is_file.then(|| identity(path)).transpose()?;
        if let Some(file) = file {
            // No process can have connected before this: nobody listens yet.
            let mode = admission.mode.unwrap_or(if admission.user.is_some() { 0o666 } else { 0o600 });
            rustix::fs::chmod(path, Mode::from_raw_mode(mode))?;
            OURS.lock().unwrap_or_else(PoisonError::into_inner).push((path.to_owned(), file));
        }
        let listener = Self { socket, name: path.to_owned(), file, admission, turned_away: Once::new() };
        // A backlog of one: besides the peer, one further connection may wait.
        rustix::net::listen(&listener.socket, 1)?;
        Ok(listener)
    }

    /// The path, as it was given.
    pub fn path(&self) -> &Path {
        &self.name
    }

    /// Waits for the peer until `deadline`; [`io::ErrorKind::TimedOut`] when no peer connects. The stream is
    /// non-blocking. Processes of other users are turned away.
    pub fn accept(&self, deadline: &Deadline) -> io::Result<UnixStream> {
        loop {
            match rustix::net::accept_with(&self.socket, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
                Ok(stream) if self.admission.admits(&stream) => return Ok(UnixStream::from(stream)),
                Ok(_) => self.turned_away.call_once(|| {
                    log::warn!(
                        "a process of another user connected to {} and was turned away (logged once)",
                        self.name.display()
                    );
                }),
                Err(Errno::INTR | Errno::CONNABORTED) => {}
                Err(Errno::AGAIN) => match wait_readable(self.socket.as_fd(), deadline)? {
                    Waited::Ready => {}
                    Waited::TimedOut => return Err(io::ErrorKind::TimedOut.into()),
                },
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

impl AsFd for Listener {
    /// Readable when a peer waits to be accepted.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Some(file) = self.file {
            OURS.lock().unwrap_or_else(PoisonError::into_inner).retain(|(_, ours)| *ours != file);
            remove(&self.name, file);
        }
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    let found = std::fs::symlink_metadata(path)?;
    Ok((found.dev(), found.ino()))
}

/// True when `path` is a socket without a listener.
fn is_stale(path: &Path) -> bool {
    let is_socket = std::fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket());
    // A connection attempt disturbs a listener, so the kernel's list of sockets is asked first. That list has
    // only the sockets of this network namespace.
    if !is_socket || is_bound(path) {
        return false;
    }
    let soon = Deadline::after(BACKLOG_PAUSE);
    connect(path, &soon, Admission::default())
        .is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
}

fn is_bound(path: &Path) -> bool {
    let Ok(list) = std::fs::read("/proc/net/unix") else { return false };
    let path = path.as_os_str().as_bytes();
    list.split(|byte| *byte == b'\n')
        .any(|line| line.strip_suffix(path).is_some_and(|rest| rest.ends_with(b" ")))
}

/// The first pause between two attempts.
const PAUSE_FIRST: Duration = Duration::from_millis(10);

/// The longest pause between two attempts.
const PAUSE_MOST: Duration = Duration::from_secs(1);

/// When to try again to reach a backend: at once, then with growing pauses, until the user's limit is over.
#[derive(Clone, Copy, Debug)]
pub struct Attempts {
    until: Option<Instant>,
    pause: Duration,
}

impl Attempts {
    /// Tries for `limit` from now; `None` for ever.
    pub fn lasting(limit: Option<Duration>) -> Self {
        // A limit beyond the range of the clock is no limit.
        let until = limit.and_then(|limit| Instant::now().checked_add(limit));
        Self { until, pause: PAUSE_FIRST }
    }

    /// The pause before the next attempt; `None` when the limit is over.
    pub fn next_pause(&mut self) -> Option<Duration> {
        let left = match self.until {
            None => PAUSE_MOST,
            Some(until) => until.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())?,
        };
        let pause = self.pause.min(left);
        self.pause = self.pause.saturating_mul(2).min(PAUSE_MOST);
        Some(pause)
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
        assert_eq!(
            connect(&path, &soon(), Admission::default()).unwrap_err().kind(),
            io::ErrorKind::NotFound
        );
        drop(UnixListener::bind(&path).unwrap());
        assert_eq!(
            connect(&path, &soon(), Admission::default()).unwrap_err().kind(),
            io::ErrorKind::ConnectionRefused
        );
        let long = dir.join("x".repeat(120));
        assert_eq!(
            connect(&long, &soon(), Admission::default()).unwrap_err().raw_os_error(),
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
        let _first = connect(Path::new(&name), &soon(), Admission::default()).unwrap();
        let begin = Instant::now();
        let mut streams = Vec::new();
        let error = loop {
            match connect(Path::new(&name), &soon(), Admission::default()) {
                Ok(stream) => streams.push(stream),
                Err(error) => break error,
            }
        };
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert!(begin.elapsed() < Duration::from_secs(1));
    }

    #[test]
    fn a_stale_socket_is_replaced_a_living_one_and_a_file_are_not() {
        let dir = std::env::temp_dir().join(format!("outboard-listener-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let path = dir.join("s");
        drop(UnixListener::bind(&path).unwrap());
        let listener = Listener::bind(&path).unwrap();
        assert_eq!(Listener::bind(&path).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        assert_eq!(listener.accept(&soon()).unwrap_err().kind(), io::ErrorKind::TimedOut);
        let _peer = connect(&path, &soon(), Admission::default()).unwrap();
        listener.accept(&soon()).unwrap();
        drop(listener);
        assert!(!path.exists(), "the path goes with the listener");
        std::fs::write(&path, "precious").unwrap();
        assert!(Listener::bind(&path).is_err());
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
        std::fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn a_listeners_path_is_for_its_user_alone_unless_it_is_opened() {
        use std::os::unix::fs::PermissionsExt;
        let dir = std::env::temp_dir().join(format!("outboard-mode-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let path = dir.join("s");
        let _listener = Listener::bind(&path).unwrap();
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&path), 0o600);
        for (admission, wanted) in [
            (Admission { mode: Some(0o660), user: None }, 0o660),
            (Admission { mode: None, user: Some(4711) }, 0o666),
            (Admission { mode: Some(0o620), user: Some(4711) }, 0o620),
        ] {
            let path = dir.join(format!("{wanted:o}"));
            let _listener = Listener::bind_for(&path, admission).unwrap();
            assert_eq!(mode(&path), wanted);
        }
        std::fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn a_file_that_took_our_paths_place_is_not_removed() {
        let dir = std::env::temp_dir().join(format!("outboard-replaced-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let path = dir.join("s");
        let listener = Listener::bind(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "another").unwrap();
        drop(listener);
        assert!(path.exists());
        std::fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn abstract_names_leave_nothing_behind() {
        let name = format!("@outboard-abstract-{}", std::process::id());
        let listener = Listener::bind(Path::new(&name)).unwrap();
        let _peer = connect(Path::new(&name), &soon(), Admission::default()).unwrap();
        listener.accept(&soon()).unwrap();
        drop(listener);
        assert!(Listener::bind(Path::new(&name)).is_ok());
    }

    #[test]
    fn pauses_grow_to_a_second_and_end_with_the_users_time() {
        let mut attempts = Attempts::lasting(None);
        let pauses: Vec<u128> = (0..9).map(|_| attempts.next_pause().unwrap().as_millis()).collect();
        assert_eq!(pauses, [10, 20, 40, 80, 160, 320, 640, 1000, 1000]);
        let mut short = Attempts::lasting(Some(Duration::from_millis(5)));
        assert!(short.next_pause().unwrap() <= Duration::from_millis(5));
        std::thread::sleep(Duration::from_millis(6));
        assert_eq!(short.next_pause(), None);
        assert!(Attempts::lasting(Some(Duration::MAX)).next_pause().is_some());
    }
}

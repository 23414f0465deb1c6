//! Descriptors that a peer sends: which kinds are kept, and how the others are closed.
//!
//! The peer may itself serve a file system (FUSE, or an overlay on FUSE). `fstat` and `close` on a file of
//! such a file system wait for the peer, and no signal ends that wait. Two rules follow:
//!
//! 1. No call is made on a descriptor before the kernel alone has told its kind.
//! 2. A refused descriptor is closed by a thread that does nothing else.

use std::io::Read;
use std::os::fd::{AsRawFd, BorrowedFd, IntoRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{OnceLock, mpsc};

/// File systems of the host whose files never wait for a peer. An overlay is not listed, as any file system
/// may lie below.
const LOCAL: [&str; 13] = [
    "tmpfs",
    "ramfs",
    "devtmpfs",
    "hugetlbfs",
    "ext4",
    "ext3",
    "ext2",
    "xfs",
    "btrfs",
    "f2fs",
    "bcachefs",
    "zfs",
    "erofs",
];

/// Names that the kernel gives to files without a path and that are safe to close. A path would begin with a
/// slash.
const NAMELESS: [&str; 5] =
    ["anon_inode:[eventfd]", "anon_inode:[vfio-device]", "anon_inode:[userfaultfd]", "socket:[", "pipe:["];

/// The most bytes of a mount table that are read.
const MOUNTS_MOST: u64 = 4 << 20;

/// The most refused descriptors that may wait to be closed. While more wait, no descriptor of any peer is
/// accepted.
const BACKLOG_MOST: usize = 64;

/// True when no operation on `fd` waits for a peer: `fd` is a memory file, a file of a host file system, an
/// eventfd, a socket, a pipe, a dma-buf, a VFIO device or a userfaultfd. Asks the kernel only; never calls
/// into the file.
pub(super) fn is_harmless(fd: BorrowedFd<'_>) -> bool {
    // memfd, tmpfs and hugetlbfs have seals. FUSE, overlays and disks have none, and the kernel does not ask
    // them.
    if rustix::fs::fcntl_get_seals(fd).is_ok() {
        return true;
    }
    let number = fd.as_raw_fd();
    let Ok(name) = std::fs::read_link(format!("/proc/self/fd/{number}")) else { return false };
    if NAMELESS.iter().any(|known| name.as_os_str().as_bytes().starts_with(known.as_bytes())) {
        return true;
    }
    let Ok(about) = std::fs::read_to_string(format!("/proc/self/fdinfo/{number}")) else { return false };
    let value = |key: &str| about.lines().find_map(|line| line.strip_prefix(key)).map(str::trim);
    // A dma-buf lies in no mount of ours. Only the kernel writes these lines, so they can be trusted.
    value("exp_name:").is_some() || value("mnt_id:").is_some_and(is_local)
}

/// True when the mount with id `mount` is of a host file system. False for a mount of another mount
/// namespace, as it is unknown.
fn is_local(mount: &str) -> bool {
    let mut mounts = String::new();
    let table = std::fs::File::open("/proc/self/mountinfo");
    if table.and_then(|table| table.take(MOUNTS_MOST).read_to_string(&mut mounts)).is_err() {
        return false;
    }
    let line = mounts.lines().find(|line| line.split(' ').next() == Some(mount));
    let system = line.and_then(|line| line.split_once(" - ")).and_then(|(_, rest)| rest.split(' ').next());
    system.is_some_and(|system| LOCAL.contains(&system))
}

/// Descriptors that wait to be closed.
static BACKLOG: AtomicUsize = AtomicUsize::new(0);

/// True when so many refused descriptors wait to be closed that no further ones are accepted.
pub(super) fn is_overrun() -> bool {
    BACKLOG.load(Ordering::Relaxed) >= BACKLOG_MOST
}

/// Closes `fd` on the thread `closer`, as the close may never return.
pub(crate) fn close_elsewhere(fd: OwnedFd) {
    static CLOSER: OnceLock<Option<mpsc::Sender<OwnedFd>>> = OnceLock::new();
    let closer = CLOSER.get_or_init(|| {
        let (closer, refused) = mpsc::channel::<OwnedFd>();
        let close = move || {
            for fd in refused {
                drop(fd);
                BACKLOG.fetch_sub(1, Ordering::Relaxed);
            }
        };
        let started = std::thread::Builder::new().name("closer".to_owned()).spawn(close);
        started
            .inspect_err(|error| log::warn!("cannot start the thread that closes descriptors: {error}"))
            .ok()?;
        Some(closer)
    });
    BACKLOG.fetch_add(1, Ordering::Relaxed);
    let left = match closer {
        Some(closer) => closer.send(fd).err().map(|unsent| unsent.0),
        None => Some(fd),
    };
    // Without the thread the descriptor stays open: closing it here could wait for the peer.
    if let Some(fd) = left {
        log::debug!("descriptor {} stays open", fd.into_raw_fd());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{EventfdFlags, eventfd};
    use rustix::fs::{MemfdFlags, Mode, OFlags, memfd_create};
    use std::fs::File;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    #[test]
    fn memory_disk_files_eventfds_sockets_and_pipes_are_kept() {
        let path = std::env::temp_dir().join(format!("outboard-admit-{}", std::process::id()));
        let file: OwnedFd = File::create(&path).unwrap().into();
        std::fs::remove_file(&path).unwrap();
        let kept: Vec<OwnedFd> = vec![
            memfd_create("memory", MemfdFlags::CLOEXEC).unwrap(),
            eventfd(0, EventfdFlags::CLOEXEC).unwrap(),
            UnixStream::pair().unwrap().0.into(),
            rustix::pipe::pipe().unwrap().0,
            File::open("/dev/zero").unwrap().into(),
            file,
        ];
        for fd in kept {
            assert!(is_harmless(fd.as_fd()), "{fd:?}");
        }
    }

    #[test]
    fn files_of_unknown_file_systems_are_refused_and_closed_elsewhere() {
        let proc: OwnedFd = File::open("/proc/self/status").unwrap().into();
        assert!(!is_harmless(proc.as_fd()), "a file system that is not in the list");
        let named = rustix::fs::open("/proc/self/status", OFlags::PATH, Mode::empty()).unwrap();
        assert!(!is_harmless(named.as_fd()));
        let (ours, theirs) = UnixStream::pair().unwrap();
        close_elsewhere(theirs.into());
        let deadline = crate::peer::deadline::Deadline::after(std::time::Duration::from_secs(10));
        let hung_up = crate::peer::deadline::wait_readable(ours.as_fd(), &deadline).unwrap();
        assert_eq!(hung_up, crate::peer::deadline::Waited::Ready);
    }
}

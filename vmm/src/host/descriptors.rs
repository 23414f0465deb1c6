//! The only place where raw descriptors become owned ones or go into a call that takes a number:
//! - descriptors that the parent process left open for us (`socket=fd=N`);
//! - eventfds in the type that `kvm-ioctls` wants;
//! - the KVM_IOEVENTFD request that `kvm-ioctls` cannot make;
//! - the limit of open descriptors.

#![allow(unsafe_code)]

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, PoisonError};

use devices::ports::{WriteAddress, WriteMatch, WriteWidth};
use kvm_bindings::{
    KVMIO, kvm_ioeventfd, kvm_ioeventfd_flag_nr_datamatch, kvm_ioeventfd_flag_nr_deassign,
    kvm_ioeventfd_flag_nr_pio,
};
use kvm_ioctls::VmFd;
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::net::sockopt::socket_type;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iow_nr;

ioctl_iow_nr!(KVM_IOEVENTFD, KVMIO, 0x79, kvm_ioeventfd);

static TAKEN: Mutex<BTreeSet<RawFd>> = Mutex::new(BTreeSet::new());

/// Raises this process's limit of open descriptors to what its user may have. A device takes one descriptor
/// or more for each queue, and shells give 1 024. (The limit is low by default for programs that use
/// `select`.)
pub(crate) fn allow_many() {
    let limit = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }) {
        log::warn!("no more than {:?} descriptors can be open: {error}", limit.current);
    }
}

/// Takes over a connected unix stream socket, once. Call it before this process opens descriptors of its own,
/// that is, while the command line is read.
///
/// # Errors
/// When the number is not that of an open, connected stream socket, or was taken before.
pub(crate) fn inherited_stream(number: RawFd) -> io::Result<UnixStream> {
    if !std::path::Path::new(&format!("/proc/self/fd/{number}")).exists() {
        return Err(io::Error::from_raw_os_error(EBADF));
    }
    if !TAKEN.lock().unwrap_or_else(PoisonError::into_inner).insert(number) {
        return Err(io::Error::other("this descriptor is used already"));
    }
    // SAFETY: the descriptor is open, the caller refuses numbers up to 2, this process has not opened any
    // descriptor of its own yet, and the set above makes sure that each number is taken once.
    let fd = unsafe { OwnedFd::from_raw_fd(number) };
    if socket_type(&fd)? != rustix::net::SocketType::STREAM {
        return Err(io::Error::other("it is not a stream socket"));
    }
    fcntl_setfd(fd.as_fd(), FdFlags::CLOEXEC)?;
    let stream = UnixStream::from(fd);
    stream.peer_addr()?;
    Ok(stream)
}

/// A second descriptor of the same eventfd.
///
/// # Errors
/// When the process has no descriptor left.
pub(crate) fn eventfd(fd: BorrowedFd<'_>) -> io::Result<EventFd> {
    let owned = fd.try_clone_to_owned()?;
    // SAFETY: the descriptor was just made by dup, and its ownership moves to the `EventFd`.
    Ok(unsafe { EventFd::from_raw_fd(owned.into_raw_fd()) })
}

/// Signals an eventfd by the notification of an asynchronous read that completes at once. Such a notification
/// comes from the kernel's own code, so it never waits, whatever a peer that also holds the eventfd does to
/// it. A write could wait.
///
/// # Errors
/// When it is no eventfd, or the host has no asynchronous reads.
pub(crate) fn signal(fd: BorrowedFd<'_>) -> io::Result<()> {
    const NOTICE: u32 = 1;
    static READS: Mutex<Option<Reads>> = Mutex::new(None);
    let mut reads = READS.lock().unwrap_or_else(PoisonError::into_inner);
    let Reads { context, nothing } = match &mut *reads {
        Some(reads) => reads,
        none => none.insert(Reads::new()?),
    };
    // SAFETY: every field is a number, and zero is a valid number.
    let mut read: libc::iocb = unsafe { std::mem::zeroed() };
    // An empty read (operation 0) of an empty file.
    read.aio_fildes = u32::try_from(nothing.as_raw_fd()).unwrap_or(u32::MAX);
    read.aio_flags = NOTICE;
    read.aio_resfd = u32::try_from(fd.as_raw_fd()).unwrap_or(u32::MAX);
    let list = [&raw mut read];
    // SAFETY: the list holds one request. It names no buffer and is complete when the call returns.
    check(unsafe { libc::syscall(libc::SYS_io_submit, *context, 1_usize, list.as_ptr()) })?;
    let mut event = [0_u64; 4];
    // SAFETY: `event` has room for the one event that is there; the call does not wait.
    let one = unsafe {
        libc::syscall(libc::SYS_io_getevents, *context, 1_usize, 1_usize, event.as_mut_ptr(), 0_usize)
    };
    check(one)
}

/// A context for asynchronous reads of the kernel, and an empty file to read.
struct Reads {
    context: u64,
    nothing: OwnedFd,
}

impl Reads {
    fn new() -> io::Result<Self> {
        let nothing = rustix::fs::memfd_create("nothing", rustix::fs::MemfdFlags::CLOEXEC)?;
        let mut context = 0_u64;
        // SAFETY: the kernel writes the number of the context. The context lasts as long as the process.
        check(unsafe { libc::syscall(libc::SYS_io_setup, 1_u32, &raw mut context) })?;
        Ok(Self { context, nothing })
    }
}

fn check(returned: libc::c_long) -> io::Result<()> {
    if returned < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Whether an ioeventfd is added or removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ioeventfd {
    /// KVM signals the eventfd from now on.
    Assign,
    /// KVM no longer signals the eventfd.
    Deassign,
}

/// Makes KVM signal `fd` when the guest makes the write `when`, or stop doing so. `kvm-ioctls` cannot ask for
/// a width without a value.
///
/// # Errors
/// When KVM refuses.
pub(crate) fn ioeventfd(vm: &VmFd, fd: &EventFd, when: WriteMatch, what: Ioeventfd) -> io::Result<()> {
    let flag = |number: u32| 1_u32.checked_shl(number).unwrap_or(0);
    let (address, mut flags) = match when.address {
        WriteAddress::Memory(address) => (address.0, 0),
        WriteAddress::Port(port) => (u64::from(port), flag(kvm_ioeventfd_flag_nr_pio)),
    };
    if when.value.is_some() {
        flags |= flag(kvm_ioeventfd_flag_nr_datamatch);
    }
    if what == Ioeventfd::Deassign {
        flags |= flag(kvm_ioeventfd_flag_nr_deassign);
    }
    let request = kvm_ioeventfd {
        datamatch: when.value.unwrap_or(0),
        addr: address,
        len: match when.width {
            WriteWidth::Any => 0,
            WriteWidth::One => 1,
            WriteWidth::Two => 2,
            WriteWidth::Four => 4,
            WriteWidth::Eight => 8,
        },
        fd: fd.as_raw_fd(),
        flags,
        ..Default::default()
    };
    // SAFETY: the request is the structure that KVM_IOEVENTFD reads, and both descriptors are open.
    match unsafe { ioctl_with_ref(vm, KVM_IOEVENTFD(), &request) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

const EBADF: i32 = 9;

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{EventfdFlags, eventfd};

    #[test]
    fn an_eventfd_is_signalled_without_a_wait_when_it_is_full_and_blocks() {
        let fd = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        let take = || {
            let mut count = [0; 8];
            rustix::io::read(&fd, &mut count).unwrap();
            u64::from_ne_bytes(count)
        };
        for _ in 0..1000 {
            signal(fd.as_fd()).unwrap();
        }
        assert_eq!(take(), 1000);
        rustix::io::write(&fd, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        signal(fd.as_fd()).unwrap();
        signal(fd.as_fd()).unwrap();
        assert_eq!(take(), u64::MAX);
        assert!(signal(std::fs::File::open("/dev/null").unwrap().as_fd()).is_err());
    }
}

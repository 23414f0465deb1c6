//! Descriptors: files of every kind for a peer to send, and the proof that none is left open.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use transport::memory::{GuestAddr, MemoryMap, SharedRegion};

use crate::input::Input;

/// The lowest free descriptor: the next one that is opened.
fn lowest_free() -> i32 {
    File::open("/dev/null").expect("a descriptor is free").as_raw_fd()
}

/// Runs `body`, and fails when it leaves a descriptor open below those that were free.
pub fn none_left<T>(body: impl FnOnce() -> T) -> T {
    let before = lowest_free();
    let result = body();
    assert_eq!(lowest_free(), before, "a descriptor is left open");
    result
}

/// A file of `size` bytes in memory.
pub fn memory_file(size: u64) -> OwnedFd {
    let fd = memfd_create("fuzz", MemfdFlags::CLOEXEC).expect("a file in memory");
    ftruncate(&fd, size).expect("a size");
    fd
}

/// A descriptor of any kind that a peer might send.
pub fn any(input: &mut Input) -> OwnedFd {
    match input.byte() % 6 {
        0 => memory_file(0x1_0000),
        1 => memory_file(input.number() & 0xf_ffff),
        2 => eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).expect("an eventfd"),
        3 => File::open("/dev/null").expect("a device").into(),
        4 => File::open("/").expect("a directory").into(),
        _ => rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).expect("a pipe").0,
    }
}

/// Guest RAM: 4 MiB from 0, and 2 MiB above 4 GiB.
pub fn guest_memory() -> MemoryMap {
    let fd = Arc::new(memory_file(6 << 20));
    let low = SharedRegion::new(GuestAddr(0), 4 << 20, Arc::clone(&fd), 0);
    let high = SharedRegion::new(GuestAddr(4 << 30), 2 << 20, fd, 4 << 20);
    MemoryMap::new(vec![low, high]).expect("a good map")
}

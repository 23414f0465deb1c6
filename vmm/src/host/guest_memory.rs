//! How rings and DMA by message access guest memory: the kernel copies the bytes. This process must never
//! touch the memory itself.

#![allow(unsafe_code)]

use std::io;

use transport::memory::MemoryAccess;

use crate::host::mapping::Mapping;

impl Mapping {
    /// The address of `length` bytes at `offset`, if they are inside the mapping.
    fn place(&self, offset: u64, length: usize) -> io::Result<*mut u8> {
        let offset = usize::try_from(offset).ok();
        let end = offset.and_then(|offset| offset.checked_add(length));
        match (offset, end) {
            (Some(offset), Some(end)) if end <= self.region().size() => {
                Ok(self.region().as_ptr().wrapping_add(offset))
            }
            _ => Err(io::ErrorKind::InvalidInput.into()),
        }
    }
}

/// The kernel makes the copies, because a page may be gone: a peer that holds the memory's file may punch a
/// hole into huge pages. The kernel then answers EFAULT; touching the page here would end the process by
/// SIGBUS.
impl MemoryAccess for Mapping {
    fn read(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        let (from, length) = (self.place(offset, data.len())?, data.len());
        copied(from, data.as_mut_ptr(), length, libc::process_vm_readv)
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let (to, length) = (self.place(offset, data.len())?, data.len());
        copied(to, data.as_ptr().cast_mut(), length, libc::process_vm_writev)
    }

    fn store_index(&self, offset: u64, index: u16) -> io::Result<()> {
        let mut old = [0; 2];
        self.read(offset, &mut old)?;
        let step = index.wrapping_sub(u16::from_le_bytes(old));
        if offset % 4 != 2 {
            return self.write(offset, &index.to_le_bytes());
        }
        // The used index is the upper half of a word. The lower half holds the flags, which we write as well.
        // The step is added bit by bit from the lowest one: each intermediate index lies between the old and
        // the new one.
        let word = self.place(offset.saturating_sub(2), 4)?;
        (0..16).filter(|bit| step & (1 << bit) != 0).try_for_each(|bit| add_to_word(word, 16 + bit))
    }
}

type Copy = unsafe extern "C" fn(
    libc::pid_t,
    *const libc::iovec,
    libc::c_ulong,
    *const libc::iovec,
    libc::c_ulong,
    libc::c_ulong,
) -> isize;

/// Makes `copy` move `length` bytes between guest memory and a buffer of ours.
fn copied(guest: *mut u8, ours: *mut u8, length: usize, copy: Copy) -> io::Result<()> {
    let ours = libc::iovec { iov_base: ours.cast(), iov_len: length };
    let guest = libc::iovec { iov_base: guest.cast(), iov_len: length };
    let process = rustix::process::getpid().as_raw_nonzero().get();
    // SAFETY: `ours` is a slice of `length` bytes. Only `process_vm_readv` writes to it, and that caller lent
    // it mutably. `guest` is inside a mapping that nothing in this process has a reference to.
    let count = unsafe { copy(process, &raw const ours, 1, &raw const guest, 1, 0) };
    match usize::try_from(count) {
        Ok(count) if count == length => Ok(()),
        Ok(_) => Err(io::ErrorKind::UnexpectedEof.into()),
        Err(_) => Err(io::Error::last_os_error()),
    }
}

/// Adds `1 << bit` to a word of guest memory, atomically, or fails with EFAULT where the page is gone.
/// FUTEX_WAKE_OP is the system call that does both; no thread waits on the futex, so it wakes none.
fn add_to_word(word: *mut u8, bit: i32) -> io::Result<()> {
    const ADD_SHIFTED: i32 = libc::FUTEX_OP_ADD | libc::FUTEX_OP_OPARG_SHIFT;
    const OPERATION: i32 = libc::FUTEX_WAKE_OP | libc::FUTEX_PRIVATE_FLAG;
    static NOBODY: u32 = 0;
    let change = libc::FUTEX_OP(ADD_SHIFTED, bit, libc::FUTEX_OP_CMP_EQ, 0);
    let nobody = &raw const NOBODY;
    // SAFETY: the kernel accesses only `word`, which is aligned and inside a mapping that nothing in this
    // process has a reference to.
    let done = unsafe { libc::syscall(libc::SYS_futex, nobody, OPERATION, 0, 0_usize, word, change) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
#[path = "guest_memory_tests.rs"]
mod tests;

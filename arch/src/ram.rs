//! Guest RAM: one sealed memfd, and the one or two ranges of guest-physical addresses that it backs.
//!
//! The host's kernel fills RAM by `splice` and `pwrite` on the memfd. This needs no bounce buffer and causes
//! no page fault in this process, and pages that nobody writes are not allocated. hugetlbfs cannot be written
//! by system calls, so RAM of huge pages is mapped here.
//!
//! The memfd must never be resized, because peers map it.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{
    FallocateFlags, MemfdFlags, SealFlags, fallocate, fcntl_add_seals, ftruncate, memfd_create,
};
use rustix::io::{Errno, pread, pwrite};
use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_setpipe_size, pipe_with, splice};
use rustix::process::{Resource, getrlimit};
use vm_memory::volatile_memory::VolatileMemory;
use vm_memory::{Bytes, FileOffset, MmapRegion};

use crate::layout::{Gpa, HOLE_END, HOLE_START, RAM_ALIGN, RAM_MIN};
use crate::width::{to_u64, to_usize};

/// The number of bytes copied at a time by read and write, where `splice` is not possible.
const CHUNK: usize = 256 << 10;
/// The wanted capacity of the pipe between a file and the memfd. An unprivileged process may have 1 MiB.
const PIPE: usize = 1 << 20;

/// The kind of pages behind guest RAM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Hugepages {
    /// Ordinary pages.
    #[default]
    Off,
    /// Reserved huge pages of 2 MiB.
    Size2M,
    /// Reserved huge pages of 1 GiB.
    Size1G,
}

impl Hugepages {
    fn page_size(self) -> u64 {
        match self {
            Self::Off => 4 << 10,
            Self::Size2M => 2 << 20,
            Self::Size1G => 1 << 30,
        }
    }
}

/// Errors of this module.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The size is below [`RAM_MIN`].
    #[error("{size} bytes of memory are too few, at least {} MiB are needed", RAM_MIN >> 20)]
    TooSmall {
        /// Wanted size in bytes.
        size: u64,
    },
    /// The size is not a multiple of the required step.
    #[error("a memory size of {size} bytes is not a multiple of {} MiB", multiple >> 20)]
    Odd {
        /// Wanted size in bytes.
        size: u64,
        /// The required step in bytes.
        multiple: u64,
    },
    /// The host refused to allocate the memory.
    #[error("the host refused {} MiB of memory", size >> 20)]
    Refused {
        /// Wanted size in bytes.
        size: u64,
        /// Why.
        source: io::Error,
    },
    /// The host does not have enough huge pages.
    #[error("the host has not enough huge pages of {} MiB for {} MiB of memory", page >> 20, size >> 20)]
    NoHugepages {
        /// Wanted size in bytes.
        size: u64,
        /// Size of a huge page in bytes.
        page: u64,
        /// Why.
        source: io::Error,
    },
    /// A range is not inside one region of RAM.
    #[error("{len} bytes at guest address {at} are not inside the guest's memory")]
    Outside {
        /// Start of the range.
        at: Gpa,
        /// Its length in bytes.
        len: u64,
    },
    /// A file ended early, although it was longer before.
    #[error("the file ended {missing} bytes early")]
    FileEnded {
        /// How many bytes were still to come.
        missing: u64,
    },
    /// A file could not be read.
    #[error("cannot read the file")]
    Read(#[source] io::Error),
    /// Guest memory could not be read or written.
    #[error("cannot access the guest's memory")]
    Access(#[source] io::Error),
}

impl Error {
    /// Advice for the user.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::Odd { .. } | Self::TooSmall { .. } => {
                Some("memory sizes are multiples of 2 MiB, from 32M up")
            }
            Self::NoHugepages { page, .. } if *page == 1 << 30 => {
                Some("reserve them: echo N > /sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages")
            }
            Self::NoHugepages { .. } => {
                Some("reserve them: echo N > /sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")
            }
            Self::FileEnded { .. } => {
                Some("is another program writing to the file? start again when it has finished")
            }
            _ => None,
        }
    }
}

/// A range of guest-physical addresses backed by the memfd.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RamRegion {
    /// First address.
    pub guest: Gpa,
    /// Size in bytes, a multiple of 2 MiB.
    pub size: u64,
    /// Offset of its first byte in the memfd.
    pub offset: u64,
}

/// A machine's RAM.
#[derive(Debug)]
pub struct Ram {
    fd: Arc<OwnedFd>,
    regions: Vec<RamRegion>,
    /// A mapping of the whole memfd. Present only with huge pages.
    mapping: Option<MmapRegion>,
}

impl Ram {
    /// Allocates `size` bytes, sealed against resizing. `size` must be a multiple of 2 MiB and of the size of
    /// a huge page. Huge pages are reserved now; ordinary pages are allocated only when they are first used.
    pub fn allocate(size: u64, hugepages: Hugepages) -> Result<Self, Error> {
        let multiple = RAM_ALIGN.max(hugepages.page_size());
        if !size.is_multiple_of(multiple) {
            return Err(Error::Odd { size, multiple });
        }
        if size < RAM_MIN {
            return Err(Error::TooSmall { size });
        }
        let refused = |errno: Errno| Error::Refused { size, source: errno.into() };
        // The memfd counts as a file. A write beyond this limit would make the kernel send a signal that ends
        // the process.
        if getrlimit(Resource::Fsize).current.is_some_and(|limit| size > limit) {
            return Err(refused(Errno::FBIG));
        }
        let no_hugepages =
            |source: io::Error| Error::NoHugepages { size, page: hugepages.page_size(), source };

        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let (flags, refused_here): (_, &dyn Fn(Errno) -> Error) = match hugepages {
            Hugepages::Off => (flags, &refused),
            Hugepages::Size2M => {
                (flags | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB, &|e| no_hugepages(e.into()))
            }
            Hugepages::Size1G => {
                (flags | MemfdFlags::HUGETLB | MemfdFlags::HUGE_1GB, &|e| no_hugepages(e.into()))
            }
        };
        let fd = memfd_create("guest-ram", flags).map_err(refused_here)?;
        ftruncate(&fd, size).map_err(refused_here)?;
        fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL).map_err(refused)?;

        let mapping = match hugepages {
            Hugepages::Off => None,
            Hugepages::Size2M | Hugepages::Size1G => {
                let file = File::from(fd.try_clone().map_err(|source| Error::Refused { size, source })?);
                // `from_file` is not used, because it maps without reserving: the first access could then end
                // in SIGBUS.
                let mapped = MmapRegion::build(
                    Some(FileOffset::new(file, 0)),
                    to_usize(size),
                    PROT_READ | PROT_WRITE,
                    MAP_SHARED,
                );
                Some(mapped.map_err(|error| no_hugepages(io::Error::other(error)))?)
            }
        };
        Ok(Self { fd: Arc::new(fd), regions: regions_of(size), mapping })
    }

    /// The memfd.
    pub fn fd(&self) -> &Arc<OwnedFd> {
        &self.fd
    }

    /// The regions in the order of their addresses: one region, or two around the hole below 4 GiB.
    pub fn regions(&self) -> &[RamRegion] {
        &self.regions
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.regions.iter().map(|region| region.size).sum()
    }

    /// The end of RAM below the hole.
    pub fn low_end(&self) -> Gpa {
        Gpa(self.size().min(HOLE_START.0))
    }

    /// Writes `bytes` at `at`.
    pub fn write_at(&self, at: Gpa, bytes: &[u8]) -> Result<(), Error> {
        let mut offset = self.offset_of(at, bytes.len())?;
        if let Some(mapping) = &self.mapping {
            return mapping
                .as_volatile_slice()
                .write_slice(bytes, to_usize(offset))
                .map_err(|error| Error::Access(io::Error::other(error)));
        }
        let mut rest = bytes;
        while !rest.is_empty() {
            let done =
                retry(|| pwrite(&self.fd, rest, offset)).map_err(|errno| Error::Access(errno.into()))?;
            rest = advance(rest, done).ok_or_else(|| Error::Access(Errno::IO.into()))?;
            offset = offset.saturating_add(to_u64(done));
        }
        Ok(())
    }

    /// Makes `len` bytes at `at` read as zeros. Whole pages are given back to the host.
    pub fn zero(&self, at: Gpa, len: u64) -> Result<(), Error> {
        if len == 0 {
            return Ok(());
        }
        let offset = self.offset(at, len)?;
        if self.mapping.is_none() {
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            return retry(|| fallocate(&self.fd, flags, offset, len))
                .map_err(|errno| Error::Access(errno.into()));
        }
        let zeros = [0; 4096];
        let mut done = 0;
        while done < len {
            let step = to_usize(len - done).min(zeros.len());
            self.write_at(Gpa(at.0 + done), zeros.get(..step).unwrap_or(&zeros))?;
            done += to_u64(step);
        }
        Ok(())
    }

    /// Copies `len` bytes of `file`, starting at `offset`, to guest address `at`. The file position of `file`
    /// is not used and not changed.
    pub fn copy_from_file(&self, at: Gpa, file: &File, offset: u64, len: u64) -> Result<(), Error> {
        let memfd_offset = self.offset(at, len)?;
        let mut done = 0;
        if self.mapping.is_none() {
            match splice_all(file.as_fd(), offset, self.fd.as_fd(), memfd_offset, len, &mut done) {
                Ok(()) => return Ok(()),
                Err(Errno::INVAL | Errno::NOSYS | Errno::PERM | Errno::MFILE | Errno::NFILE) => {
                    log::debug!("splice into guest memory is not possible after {done} bytes, copying");
                }
                Err(Errno::NODATA) => return Err(Error::FileEnded { missing: len.saturating_sub(done) }),
                Err(errno) => return Err(Error::Read(errno.into())),
            }
        }
        let mut buffer = vec![0; to_usize(len).min(CHUNK)];
        while done < len {
            let step = to_usize(len - done).min(buffer.len());
            let chunk = buffer.get_mut(..step).unwrap_or_default();
            let got = retry(|| pread(file, &mut *chunk, offset.saturating_add(done)))
                .map_err(|errno| Error::Read(errno.into()))?;
            if got == 0 {
                return Err(Error::FileEnded { missing: len - done });
            }
            self.write_at(Gpa(at.0.saturating_add(done)), chunk.get(..got).unwrap_or_default())?;
            done += to_u64(got);
        }
        Ok(())
    }

    fn offset_of(&self, at: Gpa, len: usize) -> Result<u64, Error> {
        self.offset(at, to_u64(len))
    }

    /// The offset in the memfd of a range, which must lie inside one region.
    fn offset(&self, at: Gpa, len: u64) -> Result<u64, Error> {
        let inside = |region: &&RamRegion| {
            at >= region.guest && at.0.checked_add(len).is_some_and(|end| end <= region.guest.0 + region.size)
        };
        let region = self.regions.iter().find(inside).ok_or(Error::Outside { at, len })?;
        Ok(at.0 - region.guest.0 + region.offset)
    }
}

const PROT_READ: i32 = 1;
const PROT_WRITE: i32 = 2;
const MAP_SHARED: i32 = 1;

fn regions_of(size: u64) -> Vec<RamRegion> {
    let low = size.min(HOLE_START.0);
    let mut regions = vec![RamRegion { guest: Gpa(0), size: low, offset: 0 }];
    if size > low {
        regions.push(RamRegion { guest: HOLE_END, size: size - low, offset: low });
    }
    regions
}

/// Copies bytes through a pipe, which takes pages of the file without copying them. `done` holds the number
/// of copied bytes, also after an error. The error `NODATA` means that the file has ended.
fn splice_all(
    from: BorrowedFd<'_>,
    from_offset: u64,
    to: BorrowedFd<'_>,
    to_offset: u64,
    len: u64,
    done: &mut u64,
) -> Result<(), Errno> {
    let (pipe_out, pipe_in) = pipe_with(PipeFlags::CLOEXEC)?;
    let capacity = fcntl_setpipe_size(&pipe_in, PIPE).unwrap_or(64 << 10).max(4096);
    while *done < len {
        let wanted = to_usize(len - *done).min(capacity);
        let mut read_at = from_offset.saturating_add(*done);
        let mut held = retry(|| splice(from, Some(&mut read_at), &pipe_in, None, wanted, SpliceFlags::MOVE))?;
        if held == 0 {
            return Err(Errno::NODATA);
        }
        while held > 0 {
            let mut write_at = to_offset.saturating_add(*done);
            let moved = retry(|| splice(&pipe_out, None, to, Some(&mut write_at), held, SpliceFlags::MOVE))?;
            if moved == 0 || moved > held {
                return Err(Errno::IO);
            }
            held -= moved;
            *done += to_u64(moved);
        }
    }
    Ok(())
}

fn retry<T>(mut call: impl FnMut() -> Result<T, Errno>) -> Result<T, Errno> {
    loop {
        match call() {
            Err(Errno::INTR) => {}
            result => return result,
        }
    }
}

fn advance(bytes: &[u8], done: usize) -> Option<&[u8]> {
    if done == 0 { None } else { bytes.get(done..) }
}

//! Where a file holds nothing but zeros. A kernel's ELF file carries its cleared memory as zeros (more than a
//! quarter of Debian's); guest memory reads as zeros anyway, so that these need neither pages nor copying, which
//! would cost a tenth of the time from exec to the guest's first instruction.
//!
//! The file is looked at through a mapping: reading it would cost as much as moving it. When somebody makes the file
//! shorter in those few milliseconds the look ends in SIGBUS, as with every mapped file: whoever loads a kernel that
//! others may write to is prepared for that (`vmm` is).

use std::fs::File;
use std::ops::Range;

use rustix::mm::{MapFlags, ProtFlags};
use vm_memory::volatile_memory::{VolatileMemory, VolatileSlice};
use vm_memory::{FileOffset, MmapRegion};

const PAGE: usize = 4096;
/// What is looked at together. Measured: half as many, or twice, take more than twice the instructions.
type Words = [u64; 8];
/// Ranges below this size are not worth a look.
const WORTHWHILE: u64 = 1 << 20;
/// Shorter runs of zero pages are moved with the data around them.
const MIN_RUN: usize = 16 * PAGE;

/// A range of bytes in a file.
pub(super) type Part = Range<u64>;

/// The parts of `range` that hold data, in order; what lies between them are zeros. The whole range where looking
/// is impossible or not worthwhile. The caller has checked that the range is inside the file.
pub(super) fn data_parts(file: &File, range: Part) -> Vec<Part> {
    let len = range.end.saturating_sub(range.start);
    let mapping = if len < WORTHWHILE { None } else { map(file, range.start, len) };
    let Some(mapping) = mapping else {
        return std::iter::once(range).collect();
    };
    let parts = parts_of(&mapping.as_volatile_slice());
    let absolute = |offset: usize| u64::try_from(offset).map_or(range.end, |offset| range.start + offset);
    parts.into_iter().map(|part| absolute(part.start)..absolute(part.end)).collect()
}

/// `None` also where the range does not start at a page.
fn map(file: &File, start: u64, len: u64) -> Option<MmapRegion> {
    let len = usize::try_from(len).ok()?;
    let file = FileOffset::new(file.try_clone().ok()?, start);
    let protection = i32::try_from(ProtFlags::READ.bits()).ok()?;
    let flags = i32::try_from(MapFlags::PRIVATE.bits()).ok()?;
    MmapRegion::build(Some(file), len, protection, flags).ok()
}

fn parts_of(bytes: &VolatileSlice<'_>) -> Vec<Range<usize>> {
    let mut parts: Vec<Range<usize>> = Vec::new();
    for at in (0..bytes.len()).step_by(PAGE) {
        let end = bytes.len().min(at + PAGE);
        if is_zero(bytes, at..end) {
            continue;
        }
        match parts.last_mut() {
            Some(last) if at - last.end < MIN_RUN => last.end = end,
            _ => parts.push(at..end),
        }
    }
    parts
}

/// A part of a page at the end of the range counts as data.
fn is_zero(bytes: &VolatileSlice<'_>, page: Range<usize>) -> bool {
    if page.len() < PAGE {
        return false;
    }
    bytes.get_array_ref::<Words>(page.start, PAGE / size_of::<Words>()).is_ok_and(|page| {
        (0..page.len()).all(|n| {
            let [a, b, c, d, e, f, g, h] = page.load(n);
            a | b | c | d | e | f | g | h == 0
        })
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    fn once(part: Part) -> Vec<Part> {
        std::iter::once(part).collect()
    }

    fn file_of(bytes: &[u8]) -> File {
        let fd = rustix::fs::memfd_create("zeros", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let file = File::from(fd);
        file.write_all_at(bytes, 0).unwrap();
        file
    }

    #[test]
    fn runs_of_zero_pages_are_left_out_and_short_ones_kept() {
        let mut bytes = vec![0; 4 << 20];
        bytes[8192..(1 << 20)].fill(7);
        bytes[(1 << 20) + 5 * PAGE + 4095] = 1;
        bytes[(3 << 20) + 100] = 1;
        *bytes.last_mut().unwrap() = 1;
        bytes.truncate((4 << 20) - 1);
        bytes.push(9);
        let file = file_of(&bytes);
        let len = u64::try_from(bytes.len()).unwrap();
        let expected = [8192..(1 << 20) + 6 * 4096, 3 << 20..(3 << 20) + 4096, (4 << 20) - 4096..4 << 20];
        assert_eq!(data_parts(&file, 0..len), expected);
        assert_eq!(data_parts(&file, 4096..len), expected, "an offset into the file");
    }

    #[test]
    fn a_range_that_cannot_be_looked_at_is_one_part() {
        let file = file_of(&vec![0; 4 << 20]);
        assert_eq!(data_parts(&file, 100..(3 << 20)), once(100..3 << 20), "not at a page");
        assert_eq!(data_parts(&file, 0..4096), once(0..4096), "too short");
        assert!(data_parts(&file, 0..4 << 20).is_empty(), "all zeros");
    }
}

//! ELF64 kernels (gABI chapters 4 and 5). The program headers say which part of the file is loaded at which
//! address. A Xen note gives the PVH entry.
//!
//! Every offset and size must be checked. This module reads only headers and looks for zeros; the host's
//! kernel copies the segments.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use linux_loader::elf::{Elf64_Ehdr, Elf64_Phdr};
use vm_memory::ByteValued;

use super::{Error, Kernel, Protocol, check_range};
use crate::layout::Gpa;
use crate::ram::{self, Ram};
use crate::width::{to_u64, to_usize};

const CLASS: usize = 4;
const CLASS_64: u8 = 2;
const DATA: usize = 5;
const DATA_LITTLE_ENDIAN: u8 = 1;
const MACHINE_X86_64: u16 = 62;
const TYPE_EXECUTABLE: u16 = 2;
const TYPE_SHARED: u16 = 3;
const SEGMENT_LOAD: u32 = 1;
const SEGMENT_NOTE: u32 = 4;
const FLAG_WRITABLE: u32 = 2;
const SECTION_HEADER: usize = 64;
const SECTION_NOBITS: u32 = 8;
const SECTION_ALLOC: u32 = 2;
/// The size of the blocks in which zeros at the end of a segment are searched.
const BLOCK: usize = 16 << 10;

/// `XEN_ELFNOTE_PHYS32_ENTRY`: the physical address of the PVH entry.
const NOTE_PHYS32_ENTRY: u32 = 18;
const NOTE_NAME_XEN: &[u8] = b"Xen\0";

/// A limit that is above the number of program headers of any kernel.
const MAX_SEGMENTS: u16 = 256;
/// The limit for a segment of notes. The notes of a kernel take some hundred bytes; a longer segment is not
/// searched.
const MAX_NOTES: u64 = 64 << 10;
/// The longest command line: `COMMAND_LINE_SIZE` of x86 without the final NUL.
const CMDLINE_MAX: u64 = 2047;

/// A section of the file that has an address in memory.
struct Section {
    /// Its virtual address.
    start: u64,
    /// The section has no contents in the file (`.bss`). The bytes that the file holds in its place have no
    /// meaning.
    empty: bool,
}

pub(super) fn load(ram: &Ram, file: &File, size: u64, head: &[u8]) -> Result<Kernel, Error> {
    let header = parse_header(head, size)?;
    let segments = read_segments(file, size, &header)?;
    let loads: Vec<_> = segments.iter().filter(|s| s.p_type == SEGMENT_LOAD && s.p_memsz > 0).collect();

    // Every segment is checked before the first one is loaded.
    let mut end = 0;
    for segment in &loads {
        if segment.p_filesz > segment.p_memsz {
            return Err(Error::Damaged("a segment is larger in the file than in memory"));
        }
        check_in_file("a segment", segment.p_offset, segment.p_filesz, size)?;
        let Some(segment_end) = segment.p_paddr.checked_add(segment.p_memsz) else {
            return Err(Error::Damaged("a segment's address overflows"));
        };
        check_range(ram, segment.p_paddr, segment_end)?;
        end = end.max(segment_end);
    }
    if loads.is_empty() {
        return Err(Error::Damaged("it has no segment to load"));
    }
    let (protocol, start) = match pvh_entry(file, size, &segments)? {
        Some(entry) => (Protocol::Pvh, entry),
        None => (Protocol::Linux64, header.e_entry),
    };
    if !loads.iter().any(|s| start >= s.p_paddr && start - s.p_paddr < s.p_memsz) {
        return Err(Error::EntryOutside { entry: Gpa(start) });
    }

    let sections = read_sections(file, &header);
    for segment in &loads {
        load_segment(ram, file, segment, &sections).map_err(Error::KernelCopy)?;
    }
    Ok(Kernel {
        protocol,
        start: Gpa(start),
        end: Gpa(end),
        header: None,
        cmdline_max: CMDLINE_MAX,
        initramfs_end: u64::MAX,
    })
}

/// Copies the part of a segment that is in the file, and clears the rest.
///
/// Linux's `vmlinux` stores much of its cleared memory as zeros. These zeros need neither a copy nor pages of
/// the host. Therefore the space of sections without contents, and zeros at the end of a writable segment,
/// are cleared instead of copied.
fn load_segment(
    ram: &Ram,
    file: &File,
    segment: &Elf64_Phdr,
    sections: &[Section],
) -> Result<(), ram::Error> {
    let memory = |at: u64| Gpa(segment.p_paddr + at);
    let copy =
        |from: u64, to: u64| ram.copy_from_file(memory(from), file, segment.p_offset + from, to - from);
    let within =
        |section: &Section| section.start.checked_sub(segment.p_vaddr).filter(|at| *at < segment.p_filesz);
    let mut done = 0;
    for empty in sections.iter().filter(|section| section.empty).filter_map(within) {
        if empty < done {
            continue;
        }
        let contents = sections.iter().filter(|section| !section.empty).filter_map(within);
        let next = contents.filter(|at| *at >= empty).min().unwrap_or(segment.p_filesz);
        copy(done, empty)?;
        ram.zero(memory(empty), next - empty)?;
        done = next;
    }
    let mut end = segment.p_filesz;
    if segment.p_flags & FLAG_WRITABLE != 0 {
        let start = segment.p_offset + done;
        end -= trailing_zeros(file, start..start + (end - done)).map_err(ram::Error::Read)?;
    }
    copy(done, end)?;
    ram.zero(memory(end), segment.p_memsz - end)
}

/// The number of zeros at the end of `range`, in whole [`BLOCK`]s.
fn trailing_zeros(file: &File, range: Range<u64>) -> std::io::Result<u64> {
    let mut block = [0; BLOCK];
    let step = to_u64(BLOCK);
    let mut end = range.end;
    while end - range.start >= step {
        file.read_exact_at(&mut block, end - step)?;
        // All bytes are zero if the first byte is zero and every other byte equals the byte before it.
        if block[0] != 0 || block[1..] != block[..BLOCK - 1] {
            break;
        }
        end -= step;
    }
    Ok(range.end - end)
}

/// The sections that have an address in memory. None if the file has no usable section headers.
fn read_sections(file: &File, header: &Elf64_Ehdr) -> Vec<Section> {
    let mut bytes = vec![0; usize::from(header.e_shnum) * SECTION_HEADER];
    if usize::from(header.e_shentsize) != SECTION_HEADER
        || file.read_exact_at(&mut bytes, header.e_shoff).is_err()
    {
        return Vec::new();
    }
    let parse = |section: &[u8]| {
        let loaded = le32(section, 8)? & SECTION_ALLOC != 0;
        let start = u64::from(le32(section, 20)?) << 32 | u64::from(le32(section, 16)?);
        loaded.then_some(Section { start, empty: le32(section, 4)? == SECTION_NOBITS })
    };
    bytes.chunks_exact(SECTION_HEADER).filter_map(parse).collect()
}

fn parse_header(head: &[u8], size: u64) -> Result<Elf64_Ehdr, Error> {
    match (head.get(CLASS), head.get(DATA)) {
        (Some(&CLASS_64), Some(&DATA_LITTLE_ENDIAN)) => {}
        (Some(&1), _) => return Err(Error::WrongElf("a 32-bit one")),
        (Some(&CLASS_64), Some(_)) => return Err(Error::WrongElf("a big-endian one")),
        _ => return Err(Error::Damaged("its ELF class is unknown")),
    }
    let mut header = Elf64_Ehdr::default();
    let bytes = header.as_mut_slice();
    let wanted = bytes.len();
    match head.get(..wanted) {
        Some(from) => bytes.copy_from_slice(from),
        None => return Err(Error::Truncated { what: "the ELF header", end: 64, size }),
    }
    if header.e_machine != MACHINE_X86_64 {
        return Err(Error::WrongElf("for another kind of CPU"));
    }
    if header.e_type != TYPE_EXECUTABLE && header.e_type != TYPE_SHARED {
        return Err(Error::WrongElf("an object or a core file"));
    }
    Ok(header)
}

fn read_segments(file: &File, size: u64, header: &Elf64_Ehdr) -> Result<Vec<Elf64_Phdr>, Error> {
    let entry = size_of::<Elf64_Phdr>();
    if usize::from(header.e_phentsize) != entry {
        return Err(Error::Damaged("its program headers have an unknown size"));
    }
    if header.e_phnum == 0 || header.e_phnum > MAX_SEGMENTS {
        return Err(Error::Damaged("it has no program headers, or too many"));
    }
    let mut bytes = vec![0; usize::from(header.e_phnum) * entry];
    let len = u64::from(header.e_phnum) * u64::from(header.e_phentsize);
    check_in_file("the program headers", header.e_phoff, len, size)?;
    file.read_exact_at(&mut bytes, header.e_phoff).map_err(Error::Kernel)?;
    let parse = |bytes: &[u8]| {
        let mut segment = Elf64_Phdr::default();
        segment.as_mut_slice().copy_from_slice(bytes);
        segment
    };
    Ok(bytes.chunks_exact(entry).map(parse).collect())
}

fn check_in_file(what: &'static str, offset: u64, len: u64, size: u64) -> Result<(), Error> {
    match offset.checked_add(len) {
        Some(end) if end <= size => Ok(()),
        end => Err(Error::Truncated { what, end: end.unwrap_or(u64::MAX), size }),
    }
}

fn pvh_entry(file: &File, size: u64, segments: &[Elf64_Phdr]) -> Result<Option<u64>, Error> {
    for segment in segments.iter().filter(|s| s.p_type == SEGMENT_NOTE && s.p_filesz <= MAX_NOTES) {
        check_in_file("a note", segment.p_offset, segment.p_filesz, size)?;
        let mut notes = vec![0; to_usize(segment.p_filesz)];
        file.read_exact_at(&mut notes, segment.p_offset).map_err(Error::Kernel)?;
        let align = if segment.p_align == 8 { 8 } else { 4 };
        if let Some(entry) = find_pvh_note(&notes, align) {
            return Ok(Some(entry));
        }
    }
    Ok(None)
}

/// Searches notes for the PVH entry. Stops at a note that does not fit into `notes`.
fn find_pvh_note(mut notes: &[u8], align: usize) -> Option<u64> {
    loop {
        let name_len = to_usize(le32(notes, 0)?);
        let desc_len = to_usize(le32(notes, 4)?);
        let kind = le32(notes, 8)?;
        let name = notes.get(12..)?.get(..name_len)?;
        let desc_at = 12_usize.checked_add(name_len)?.checked_next_multiple_of(align)?;
        let desc = notes.get(desc_at..)?.get(..desc_len)?;
        if kind == NOTE_PHYS32_ENTRY && name == NOTE_NAME_XEN {
            // Older versions of Linux wrote a pointer here, newer ones a 32-bit value.
            return match desc.len() {
                4 => le32(desc, 0).map(u64::from),
                8 => Some(u64::from(le32(desc, 4)?) << 32 | u64::from(le32(desc, 0)?)),
                _ => None,
            };
        }
        notes = notes.get(desc_at.checked_add(desc_len)?.checked_next_multiple_of(align)?..)?;
    }
}

fn le32(bytes: &[u8], at: usize) -> Option<u32> {
    let four = bytes.get(at..)?.first_chunk::<4>()?;
    Some(u32::from_le_bytes(*four))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn note(name: &[u8], kind: u32, desc: &[u8], align: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        for word in [name.len(), desc.len(), usize::try_from(kind).unwrap()] {
            bytes.extend(u32::try_from(word).unwrap().to_le_bytes());
        }
        bytes.extend(name);
        bytes.resize(bytes.len().next_multiple_of(align), 0);
        bytes.extend(desc);
        bytes.resize(bytes.len().next_multiple_of(align), 0);
        bytes
    }

    #[test]
    fn the_pvh_note_is_found_behind_others_with_either_alignment_and_width() {
        for align in [4, 8] {
            let mut notes = note(b"GNU\0", 3, &[1; 20], align);
            notes.extend(note(b"Linux\0", 18, &[2; 4], align));
            notes.extend(note(b"Xen\0", 5, b"linux\0", align));
            assert_eq!(find_pvh_note(&notes, align), None);
            let mut narrow = notes.clone();
            narrow.extend(note(b"Xen\0", 18, &0x100_0040_u32.to_le_bytes(), align));
            assert_eq!(find_pvh_note(&narrow, align), Some(0x100_0040));
            notes.extend(note(b"Xen\0", 18, &0x100_0040_u64.to_le_bytes(), align));
            assert_eq!(find_pvh_note(&notes, align), Some(0x100_0040));
        }
    }

    #[test]
    fn notes_that_lie_about_their_sizes_end_the_search() {
        let good = note(b"Xen\0", 18, &7_u32.to_le_bytes(), 4);
        for cut in 0..good.len() {
            assert_eq!(find_pvh_note(&good[..cut], 4), None, "cut at {cut}");
        }
        for at in [0, 4] {
            let mut bad = good.clone();
            bad[at..at + 4].copy_from_slice(&u32::MAX.to_le_bytes());
            assert_eq!(find_pvh_note(&bad, 4), None);
        }
        assert_eq!(find_pvh_note(&[0; 64], 4), None);
    }
}

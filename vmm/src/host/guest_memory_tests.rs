use super::*;

use std::os::fd::OwnedFd;

use rustix::fs::{FallocateFlags, MemfdFlags, fallocate, ftruncate, memfd_create};

#[test]
fn guest_memory_is_copied_by_the_kernel_and_never_touched() {
    let file: OwnedFd = memfd_create("ram", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&file, 0x3000).unwrap();
    let memory = Mapping::shared(&file, 0x1000, 0x2000).unwrap();
    memory.write(0xffe, b"word").unwrap();
    let mut data = [0; 4];
    memory.read(0xffe, &mut data).unwrap();
    assert_eq!(&data, b"word");
    rustix::io::pread(&file, &mut data, 0x1ffe).unwrap();
    assert_eq!(&data, b"word");
    for at in [0x1ffd, 0x2000, u64::MAX] {
        assert!(memory.read(at, &mut data).is_err(), "{at:#x}");
        assert!(memory.write(at, &data).is_err(), "{at:#x}");
    }
    // Stands for a hole in huge pages: pages that answer a touch with SIGBUS.
    ftruncate(&file, 0x2000).unwrap();
    assert!(memory.read(0xffe, &mut data).is_err());
    assert!(memory.write(0x1000, &data).is_err());
    assert_eq!(memory.store_index(0x1002, 1).unwrap_err().raw_os_error(), Some(libc::EFAULT));
    memory.read(0xffc, &mut data).unwrap();
}

#[test]
fn a_ring_index_goes_from_the_old_value_to_the_new_one_and_nowhere_else() {
    let memory = Mapping::anonymous(0x1000).unwrap();
    memory.write(0, &[7, 0, 0xfe, 0xff]).unwrap();
    for (index, wire) in
        [(0xffff, [7, 0, 0xff, 0xff]), (3, [7, 0, 3, 0]), (3, [7, 0, 3, 0]), (0x100, [7, 0, 0, 1])]
    {
        memory.store_index(2, index).unwrap();
        let mut word = [0; 4];
        memory.read(0, &mut word).unwrap();
        assert_eq!(word, wire, "{index:#x}");
    }
    memory.store_index(4, 0x1234).unwrap();
    let mut half = [0; 2];
    memory.read(4, &mut half).unwrap();
    assert_eq!(half, [0x34, 0x12]);
}

#[test]
fn huge_pages_are_written_and_a_hole_in_them_is_no_signal() {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
    let file = memfd_create("huge", flags)
        .and_then(|file| fallocate(&file, FallocateFlags::empty(), 0, 4 << 20).map(|()| file));
    let Some((file, memory)) =
        file.ok().and_then(|file| Mapping::shared(&file, 0, 4 << 20).ok().map(|memory| (file, memory)))
    else {
        eprintln!("skipped: no huge pages to spare on this host");
        return;
    };
    assert!(rustix::io::pwrite(&file, b"word", 0).is_err(), "no system call writes them");
    memory.write((2 << 20) - 2, b"word").unwrap();
    memory.store_index(2, 0xffff).unwrap();
    let mut data = [0; 4];
    memory.read((2 << 20) - 2, &mut data).unwrap();
    assert_eq!(&data, b"word");
    // The second page no longer exists.
    ftruncate(&file, 2 << 20).unwrap();
    assert!(memory.read(2 << 20, &mut data).is_err());
    assert!(memory.write(2 << 20, &data).is_err());
    assert!(memory.store_index((2 << 20) + 2, 1).is_err());
}

#[test]
fn memory_that_is_left_out_of_cores_says_so_to_the_kernel() {
    let file: OwnedFd = memfd_create("left-out-of-cores", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&file, 0x2000).unwrap();
    let memory = Mapping::shared(&file, 0, 0x2000).unwrap();
    let flags = || {
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let ours = maps.split_once("memfd:left-out-of-cores").unwrap().1.to_owned();
        ours.lines().find(|line| line.starts_with("VmFlags:")).unwrap().to_owned()
    };
    assert!(!flags().contains(" dd"));
    memory.leave_out_of_cores().unwrap();
    assert!(flags().contains(" dd"), "{}", flags());
}

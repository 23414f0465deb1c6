
#[test]
fn huge_pages_are_written_and_a_hole_in_them_is_no_signal() {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
    let file = memfd_create("huge", flags).and_then(|file| ftruncate(&file, 4 << 20).map(|()| file));
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
    // The second page is gone for good.
    ftruncate(&file, 2 << 20).unwrap();
    assert!(memory.read(2 << 20, &mut data).is_err());
    assert!(memory.write(2 << 20, &data).is_err());
    assert!(memory.store_index((2 << 20) + 2, 1).is_err());
}

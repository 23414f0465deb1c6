use super::*;

use std::os::fd::AsRawFd;

use transport::memory::GuestAddr;

use crate::testing::{Recorder, Shown};

const BASE: u64 = 0x1_0000_0000;

fn area(shmid: u8, shm_offset: u64, len: u64, flags: u64) -> ShmemArea {
    ShmemArea { shmid, padding: [0; 7], fd_offset: 0, shm_offset, len, flags }
}

fn file(size: u64) -> OwnedFd {
    let fd = rustix::fs::memfd_create("window", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&fd, size).unwrap();
    fd
}

/// A machine with region 1 of 16 KiB, and a connection whose queues run.
fn rig() -> (Recorder, Outlets, Tenancy) {
    let (machine, regions) = (Recorder::default(), Outlets::new(vec![0, 0x4000]));
    let place = SharedMemory { base: GuestAddr(BASE), length: 0x4000 };
    regions.put(Arc::new(FixedOutlet::new(machine.ports().memory, vec![None, Some(place)])));
    let tenancy = regions.tenancy();
    tenancy.begin();
    (machine, regions, tenancy)
}

fn shown(machine: &Recorder) -> Vec<(u64, u64, u64, bool)> {
    machine
        .shown()
        .iter()
        .map(|Shown { at, offset, size, read_only }| (at.0, *offset, *size, *read_only))
        .collect()
}

#[test]
fn pieces_of_files_appear_and_disappear_as_the_backend_asks() {
    let (machine, _regions, tenancy) = rig();
    let second = ShmemArea { fd_offset: 0x1000, ..area(1, 0x3000, 0x1000, 0) };
    tenancy.map(&area(1, 0x1000, 0x2000, 1), file(0x2000)).unwrap();
    tenancy.map(&second, file(0x2000)).unwrap();
    assert_eq!(shown(&machine), [(BASE + 0x1000, 0, 0x2000, false), (BASE + 0x3000, 0x1000, 0x1000, true)]);
    tenancy.unmap(&area(1, 0x1000, 0x2000, 0)).unwrap();
    assert_eq!(shown(&machine).len(), 1);
    tenancy.unmap(&area(1, 0, 0x4000, 0)).unwrap();
    assert_eq!(shown(&machine), []);
    // The same place again, with a file that ends within its last page.
    tenancy.map(&area(1, 0x1000, 0x1801, 1), file(0x1801)).unwrap();
    assert_eq!(shown(&machine), [(BASE + 0x1000, 0, 0x2000, false)]);
}

#[test]
fn pieces_outside_the_region_over_others_empty_or_wrapping_are_refused_and_leave_nothing() {
    let (machine, _regions, tenancy) = rig();
    tenancy.map(&area(1, 0x1000, 0x1000, 1), file(0x1000)).unwrap();
    let beyond_file = ShmemArea { fd_offset: 0x1000, ..area(1, 0, 0x1000, 1) };
    for bad in [
        area(0, 0, 0x1000, 1),
        area(2, 0, 0x1000, 1),
        area(255, 0, 0x1000, 1),
        area(1, 0, 0, 1),
        area(1, 0x3000, 0x2000, 1),
        area(1, 0x4000, 0x1000, 1),
        area(1, 0x1000, 0x1000, 1),
        area(1, 0, 0x2000, 1),
        area(1, 0x800, 0x800, 1),
        area(1, u64::MAX - 0xfff, 0x1000, 1),
        area(1, 0x1000, u64::MAX - 0xfff, 1),
        area(1, 0, 0x1000, 2),
        beyond_file,
    ] {
        assert_eq!(tenancy.map(&bad, file(0x1000)), Err(Refused), "{bad:?}");
        assert_eq!(shown(&machine).len(), 1, "{bad:?}");
    }
    for not_a_file in
        [std::os::unix::net::UnixStream::pair().unwrap().0.into(), std::fs::File::open("/").unwrap().into()]
    {
        assert_eq!(tenancy.map(&area(1, 0, 0x1000, 1), not_a_file), Err(Refused));
    }
    // The outcome is the same whether the BAR is decoded now or later.
    let own = file(0x1000);
    let read_only = std::fs::File::open(format!("/proc/self/fd/{}", own.as_raw_fd())).unwrap();
    assert_eq!(tenancy.map(&area(1, 0, 0x1000, 1), read_only.try_clone().unwrap().into()), Err(Refused));
    tenancy.map(&area(1, 0, 0x1000, 0), read_only.into()).unwrap();
    tenancy.unmap(&area(1, 0, 0x1000, 0)).unwrap();
    for bad in
        [area(1, 0, 0x1000, 0), area(1, 0, 0, 0), area(7, 0x1000, 0x1000, 0), area(1, 0x1000, u64::MAX, 0)]
    {
        assert_eq!(tenancy.unmap(&bad), Err(Refused), "{bad:?}");
    }
    assert_eq!(shown(&machine).len(), 1);
    // The refused maps left no trace.
    tenancy.map(&area(1, 0x2000, 0x1000, 1), file(0x1000)).unwrap();
}

#[test]
fn maps_go_with_a_reset_a_connection_and_a_board() {
    let (machine, regions, tenancy) = rig();
    let again = |tenancy: &Tenancy| tenancy.map(&area(1, 0, 0x1000, 1), file(0x1000));
    again(&tenancy).unwrap();
    tenancy.end();
    assert_eq!((shown(&machine).len(), again(&tenancy)), (0, Err(Refused)), "the queues stand");
    tenancy.begin();
    again(&tenancy).unwrap();
    let next = regions.tenancy();
    assert_eq!((shown(&machine).len(), again(&tenancy)), (0, Err(Refused)), "a late request of the lost one");
    tenancy.begin();
    assert_eq!(again(&tenancy), Err(Refused));
    next.begin();
    again(&next).unwrap();
    tenancy.end();
    assert_eq!(shown(&machine).len(), 1, "the lost one ends nothing");
    regions.remove();
    assert_eq!((shown(&machine).len(), again(&next)), (0, Err(Refused)), "no machine");
}

#[test]
fn map_that_vanished_is_gone_and_its_place_can_be_freed() {
    let (machine, _regions, tenancy) = rig();
    tenancy.map(&area(1, 0, 0x1000, 1), file(0x1000)).unwrap();
    machine.vanish_all();
    assert_eq!(shown(&machine), []);
    tenancy.unmap(&area(1, 0, 0x1000, 0)).unwrap();
    tenancy.map(&area(1, 0, 0x1000, 1), file(0x1000)).unwrap();
}

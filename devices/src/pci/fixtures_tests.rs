use std::sync::Arc;

use transport::vhost_user::vring::Kick;

use super::*;
use crate::testing::{Recorder, Shown};

const BAR: u8 = 2;

fn at(base: u64) -> Vec<Decoded> {
    let bar = |index, base| Decoded {
        bar: BarIndex::new(index).unwrap(),
        space: Space::Memory,
        base,
        size: 0x10_0000,
    };
    vec![bar(0, 0xc800_0000), bar(BAR, base)]
}

fn memory(offset: u64, size: u64) -> Fixture {
    let fd = rustix::fs::memfd_create("bar", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let piece = FileRange { fd: Arc::new(fd), offset, size };
    Fixture::Memory { piece, access: Access::ReadWrite, vanished: Arc::new(|| ()) }
}

fn doorbell() -> Fixture {
    let fd = Kick::new().unwrap().as_fd().try_clone_to_owned().unwrap();
    Fixture::Doorbell { fd, width: WriteWidth::Any, value: None }
}

fn fixtures(machine: &Recorder) -> Fixtures {
    Fixtures::new(BarIndex::new(BAR).unwrap(), machine.ports())
}

#[test]
fn fixtures_go_where_the_bar_goes() {
    let machine = Recorder::default();
    let mut fixtures = fixtures(&machine);
    fixtures.add(0x2000, memory(0x5000, 0x3000)).unwrap();
    fixtures.add(0x1000, doorbell()).unwrap();
    assert!(machine.shown().is_empty() && machine.doorbells().is_empty(), "the BAR is nowhere");
    // The last place overlaps the one before it.
    for base in [0xc000_0000, 0x80_0000_0000, 0x80_0000_1000] {
        fixtures.place(&at(base)).unwrap();
        let shown = Shown { at: GuestAddr(base + 0x2000), offset: 0x5000, size: 0x3000, read_only: false };
        assert_eq!(machine.shown(), [shown]);
        assert_eq!(machine.doorbells(), [WriteMatch::anything(GuestAddr(base + 0x1000))]);
    }
    fixtures.place(&at(0)[..1]).unwrap();
    assert!(machine.shown().is_empty() && machine.doorbells().is_empty());
}

#[test]
fn what_is_added_to_a_placed_bar_is_there_at_once_and_goes_when_removed() {
    let machine = Recorder::default();
    let mut fixtures = fixtures(&machine);
    fixtures.place(&at(0xc000_0000)).unwrap();
    let id = fixtures.add(0x1000, doorbell()).unwrap();
    let other = fixtures.add(0x2000, doorbell()).unwrap();
    assert_eq!(machine.doorbells().len(), 2);
    fixtures.remove(id);
    assert_eq!(machine.doorbells(), [WriteMatch::anything(GuestAddr(0xc000_2000))]);
    assert!(fixtures.add(0x2000, doorbell()).is_err(), "taken");
    fixtures.remove(other);
    fixtures.add(0x2000, doorbell()).unwrap();
    fixtures.clear();
    assert!(machine.doorbells().is_empty());
}

#[test]
fn a_refused_fixture_does_not_keep_the_others_from_their_places() {
    let machine = Recorder::default();
    let mut fixtures = fixtures(&machine);
    for page in [1, 2, 3] {
        fixtures.add(page * 0x1000, doorbell()).unwrap();
    }
    machine.refuse_doorbell(WriteMatch::anything(GuestAddr(0xc000_2000)));
    fixtures.place(&at(0xc000_0000)).unwrap_err();
    let bound: Vec<_> = [1, 3].map(|n| WriteMatch::anything(GuestAddr(0xc000_0000 + n * 0x1000))).into();
    assert_eq!(machine.doorbells(), bound);
    fixtures.place(&at(0xc100_0000)).unwrap();
    assert_eq!(machine.doorbells().len(), 3, "another place suits them all");
}

#[test]
fn what_was_refused_is_there_once_the_bar_in_its_way_has_moved() {
    let machine = Recorder::default();
    let (mut one, mut other) = (fixtures(&machine), fixtures(&machine));
    one.add(0, memory(0, 0x1000)).unwrap();
    other.add(0, memory(0x1000, 0x1000)).unwrap();
    // The guest swaps two BARs while they are decoded.
    one.place(&at(0xc000_0000)).unwrap();
    other.place(&at(0xc000_0000)).unwrap_err();
    one.place(&at(0xc100_0000)).unwrap();
    other.place(&at(0xc000_0000)).unwrap();
    assert_eq!(machine.shown().len(), 2);
    other.place(&at(0xc000_0000)).unwrap();
    assert_eq!(machine.shown().len(), 2, "and is not there twice");
}

#[test]
fn in_a_bar_of_ports_only_doorbells_are_possible() {
    let machine = Recorder::default();
    let mut fixtures = fixtures(&machine);
    fixtures.add(0, memory(0, 0x1000)).unwrap();
    fixtures.add(0x10, doorbell()).unwrap();
    let decoded = Decoded { bar: BarIndex::new(BAR).unwrap(), space: Space::Io, base: 0xc000, size: 0x20 };
    fixtures.place(&[decoded]).unwrap();
    assert!(machine.shown().is_empty());
    let doorbells = machine.doorbells();
    assert_eq!((doorbells.len(), doorbells[0].address), (1, WriteAddress::Port(0xc010)));
}

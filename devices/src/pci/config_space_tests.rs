use super::*;
use crate::pci::bar::{BarKind, BarSpec, Room, Window, Windows};

const WINDOWS: Windows = Windows {
    memory32: Window { base: 0xc000_0000, size: 0x1000_0000 },
    memory64: Window { base: 0x80_0000_0000, size: 0x40_0000_0000 },
    io: Window { base: 0xc000, size: 0x4000 },
};

fn space() -> ConfigSpace {
    let identity = Identity {
        vendor: 0x1af4,
        device: 0x1042,
        revision: 1,
        class: 0x01_8000,
        subsystem_vendor: 0x1af4,
        subsystem: 0x40,
    };
    let spec = BarSpec { index: BarIndex::new(0).unwrap(), kind: BarKind::Memory64, size: 0x4000 };
    let mut bars = Bars::new(&[spec], WINDOWS).unwrap();
    bars.assign(&mut Room::new(WINDOWS));
    ConfigSpace::new(identity, bars, 1)
}

fn dword(space: &ConfigSpace, offset: u16) -> u32 {
    let mut data = [0; 4];
    space.read(offset, &mut data);
    u32::from_le_bytes(data)
}

#[test]
fn header_says_who_the_function_is() {
    let space = space();
    assert_eq!(dword(&space, 0), 0x1042_1af4);
    assert_eq!(dword(&space, 4), 0);
    assert_eq!(dword(&space, 8), 0x0180_0001);
    assert_eq!(dword(&space, 0x0c), 0, "type 0, one function");
    assert_eq!(dword(&space, 0x10), 0xc000_0004);
    assert_eq!(dword(&space, 0x2c), 0x0040_1af4);
    assert_eq!(dword(&space, 0x3c), 0x100);
    let mut class = [0; 2];
    space.read(0x0a, &mut class);
    assert_eq!(class, [0x80, 0x01], "a part of a dword");
}

#[test]
fn only_writable_bits_change() {
    let mut space = space();
    for offset in (0..=255).filter(|offset| bar_register(offset & !3).is_none()) {
        let before = space.bytes;
        space.write(offset, &[0xff]);
        let changed: Vec<_> = (0..256).filter(|at| space.bytes[*at] != before[*at]).collect();
        let expected: &[usize] = match offset {
            4 => &[4],
            5 => &[5],
            0x3c => &[0x3c],
            _ => &[],
        };
        assert_eq!(changed, expected, "offset {offset:#x}");
    }
    assert_eq!(space.command(), Command(0x0547));
}

#[test]
fn command_and_bars_change_the_decoding_and_nothing_else_does() {
    let mut space = space();
    assert_eq!(space.decoded(), []);
    assert_eq!(space.write(offset::COMMAND, &[2, 0]), Change::Decoding);
    assert_eq!(space.decoded()[0].base, 0xc000_0000);
    assert_eq!(space.write(0x12, &[0x10, 0xc8]), Change::Decoding, "the upper half of a register");
    assert_eq!(space.decoded()[0].base, 0xc810_0000);
    assert_eq!(space.write(0x14, &[1, 0, 0, 0]), Change::Decoding);
    assert_eq!(space.decoded(), [], "outside the windows");
    assert_eq!(space.write(0x10, &[0, 0, 0, 0]), Change::Decoding);
    assert_eq!(space.write(0x14, &[0x81]), Change::Decoding);
    assert_eq!(space.decoded()[0].base, 0x81_0000_0000);
    assert_eq!(space.write(offset::INTERRUPT_LINE, &[7]), Change::Other);
}

#[test]
fn capabilities_form_a_list_and_end_at_256_bytes() {
    let mut space = space();
    assert_eq!(space.add_capability(9, &[1, 2, 3], &[0, 0xf0]), Ok(0x40));
    assert_eq!(space.add_capability(0x11, &[0; 10], &[]), Ok(0x48));
    assert_eq!(space.word(offset::STATUS), 0x10);
    assert_eq!((dword(&space, 0x34), dword(&space, 0x40), dword(&space, 0x48)), (0x40, 0x0201_4809, 0x11));
    space.write(0x40, &[0, 0, 0xff, 0xff]);
    assert_eq!(dword(&space, 0x40), 0xf201_4809);
    let mut added = 2;
    while space.add_capability(9, &[0; 18], &[]).is_ok() {
        added += 1;
    }
    assert_eq!(space.add_capability(9, &[0; 18], &[]), Err(NoRoom(20)));
    let mut found = 0;
    let mut at = dword(&space, 0x34);
    while at != 0 {
        found += 1;
        at = dword(&space, u16::try_from(at).unwrap()) >> 8 & 0xff;
    }
    assert_eq!(found, added);
}

#[test]
fn beyond_its_end_a_space_reads_zero_and_takes_nothing() {
    let mut space = space();
    assert_eq!(space.write(0x100, &[0xff; 4]), Change::Other);
    assert_eq!(space.write(0xffc, &[0xff; 4]), Change::Other);
    assert_eq!((dword(&space, 0x100), dword(&space, 0xffc)), (0, 0));
}

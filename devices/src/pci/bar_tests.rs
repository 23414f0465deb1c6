use super::*;

const WINDOWS: Windows = Windows {
    memory32: Window { base: 0xc000_0000, size: 0x1000_0000 },
    memory64: Window { base: 0x80_0000_0000, size: 0x40_0000_0000 },
    io: Window { base: 0xc000, size: 0x4000 },
};
const ALL_ON: Command = Command(Command::IO | Command::MEMORY);

fn bar(index: u8, kind: BarKind, size: u64) -> BarSpec {
    BarSpec { index: BarIndex::new(index).unwrap(), kind, size }
}

fn bars(specs: &[BarSpec]) -> Bars {
    Bars::new(specs, WINDOWS).unwrap()
}

#[test]
fn sizing_reads_back_the_size_and_the_kind() {
    let mut bars = bars(&[
        bar(0, BarKind::Memory32, 0x4000),
        bar(1, BarKind::Io, 0x20),
        bar(2, BarKind::Prefetchable64, 1 << 33),
        bar(6, BarKind::Rom, 0x800),
    ]);
    for (register, read) in
        [(0, 0xffff_c000), (1, 0xffff_ffe1), (2, 0x0000_000c), (3, 0xffff_fffe), (4, 0), (6, 0xffff_f001)]
    {
        bars.write(register, u32::MAX);
        assert_eq!(bars.read(register), read, "register {register}");
    }
}

#[test]
fn sizes_are_rounded_up_to_powers_of_two_and_pages() {
    let bars =
        bars(&[bar(0, BarKind::Memory32, 0x3000), bar(1, BarKind::Memory64, 8), bar(3, BarKind::Io, 5)]);
    let sizes: Vec<_> = BarIndex::ALL.iter().filter_map(|index| bars.size(*index)).collect();
    assert_eq!(sizes, [0x4000, 0x1000, 8]);
}

#[test]
fn registers_that_cannot_be_are_refused() {
    let refused = |specs: &[BarSpec]| Bars::new(specs, WINDOWS).unwrap_err();
    let zero = BarIndex::new(0).unwrap();
    for size in [0, (1 << 31) + 1, u64::MAX] {
        assert_eq!(refused(&[bar(0, BarKind::Memory32, size)]), BarError::Size { index: zero, size });
    }
    assert!(matches!(refused(&[bar(0, BarKind::Memory64, 1 << 63)]), BarError::Size { .. }));
    assert!(matches!(refused(&[bar(0, BarKind::Io, 0x4001)]), BarError::Size { .. }));
    let wide = |index| bar(index, BarKind::Memory64, 0x1000);
    let narrow = |index| bar(index, BarKind::Memory32, 0x1000);
    for specs in [[narrow(0), narrow(0)], [wide(0), narrow(1)], [narrow(1), wide(0)], [narrow(0), wide(5)]] {
        assert!(matches!(refused(&specs), BarError::Overlap(_)), "{specs:?}");
    }
    assert!(matches!(refused(&[bar(6, BarKind::Memory32, 0x1000)]), BarError::Kind(BarIndex::ROM)));
    assert!(matches!(refused(&[bar(0, BarKind::Rom, 0x1000)]), BarError::Kind(_)));
}

#[test]
fn power_on_places_are_aligned_apart_and_inside_their_windows() {
    let mut room = Room::new(WINDOWS);
    let mut taken: Vec<Decoded> = Vec::new();
    for _ in 0..31 {
        let mut bars = bars(&[
            bar(0, BarKind::Memory32, 0x1000),
            bar(1, BarKind::Memory64, 0x8_0000),
            bar(3, BarKind::Memory64, 1 << 32),
            bar(5, BarKind::Io, 0x100),
        ]);
        bars.assign(&mut room);
        let decoded = bars.decoded(ALL_ON);
        assert_eq!(decoded.len(), 4);
        assert!(decoded[1].base < 1 << 32, "a small wide BAR is where every guest reaches it");
        for now in decoded {
            assert_eq!(now.base % now.size, 0);
            let apart = |other: &Decoded| {
                other.space != now.space
                    || now.base + now.size <= other.base
                    || other.base + other.size <= now.base
            };
            assert!(taken.iter().all(apart), "{now:x?}");
            taken.push(now);
        }
    }
}

#[test]
fn what_finds_no_place_stays_where_nothing_is_decoded() {
    let mut room = Room::new(WINDOWS);
    let mut large = bars(&[bar(0, BarKind::Memory32, 1 << 30)]);
    large.assign(&mut room);
    assert_eq!((large.read(0), large.decoded(ALL_ON)), (0, vec![]));
}

#[test]
fn only_what_the_command_register_allows_is_decoded() {
    let mut bars =
        bars(&[bar(0, BarKind::Memory32, 0x1000), bar(1, BarKind::Io, 0x20), bar(6, BarKind::Rom, 0x1000)]);
    bars.assign(&mut Room::new(WINDOWS));
    let decoded =
        |bars: &Bars, bits| bars.decoded(Command(bits)).iter().map(|d| d.bar.get()).collect::<Vec<_>>();
    assert_eq!(decoded(&bars, 0), [0_u8; 0]);
    assert_eq!(decoded(&bars, Command::IO), [1]);
    assert_eq!(decoded(&bars, Command::MEMORY), [0]);
    bars.write(6, bars.read(6) | 1);
    assert_eq!(decoded(&bars, Command::MEMORY), [0, 6]);
}

#[test]
fn addresses_outside_the_windows_are_never_decoded() {
    let mut bars = bars(&[bar(0, BarKind::Memory64, 0x1000)]);
    for (base, inside) in [
        (0_u64, false),
        (0xbfff_f000, false),
        (0xc000_0000, true),
        (0xcfff_f000, true),
        (0xd000_0000, false),
        (0xfee0_0000, false),
        (0x80_0000_0000, true),
        (0xbf_ffff_f000, true),
        (0xc0_0000_0000, false),
        (0xffff_ffff_ffff_f000, false),
    ] {
        bars.write(0, u32::try_from(base & 0xffff_ffff).unwrap());
        bars.write(1, u32::try_from(base >> 32).unwrap());
        assert_eq!(bars.decoded(ALL_ON).len() == 1, inside, "{base:#x}");
    }
}

#[test]
fn the_kind_of_a_device_s_register_is_in_its_low_bits() {
    for (value, kind) in [
        (0xfe00_0000, Some(BarKind::Memory32)),
        (0xfe00_0008, Some(BarKind::Prefetchable32)),
        (0xfe00_0004, Some(BarKind::Memory64)),
        (0xfe00_000c, Some(BarKind::Prefetchable64)),
        (0xc001, Some(BarKind::Io)),
        (2, None),
        (6, None),
    ] {
        assert_eq!(BarKind::from_register(value), kind, "{value:#x}");
    }
}

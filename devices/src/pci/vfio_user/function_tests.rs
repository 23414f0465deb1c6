//! What a faulty server may say: the lines "PCI shape", "Region info" and "Interrupts" of the fault list.

// Headers are taken apart into bytes.
#![allow(clippy::cast_possible_truncation)]

use super::*;
use crate::pci::BarKind;
use crate::pci::vfio_user::bars::LARGEST;

/// Extended headers and their offsets.
type Headers<'a> = &'a [(usize, u32)];

/// A configuration space under construction.
#[derive(Clone)]
struct Space {
    config: Vec<u8>,
    bars: [u64; 6],
    interrupts: [u32; 3],
}

impl Space {
    /// A plain endpoint with one BAR of each kind and MSI-X in BAR 2.
    fn new() -> Self {
        let space = Space { config: vec![0; 0x1000], bars: [0; 6], interrupts: [1, 32, 2048] };
        space
            .put32(0, 0x5678_1234)
            .put32(8, 0x0108_0201)
            .put32(0x2c, 0xbeef_cafe)
            .bar(0, 0x1, 0x20)
            .bar(1, 0x0, 0x3000)
            .bar(2, 0xc, 0x4000)
            .capability(0x40, id::MSI_X, 0)
            .put16(0x42, 15)
            .put32(0x44, 0x2000 | 2)
            .put32(0x48, 0x3000 | 2)
    }

    fn put8(mut self, at: usize, value: u8) -> Self {
        self.config[at] = value;
        self
    }

    fn put16(mut self, at: usize, value: u16) -> Self {
        self.config[at..at + 2].copy_from_slice(&value.to_le_bytes());
        self
    }

    fn put32(mut self, at: usize, value: u32) -> Self {
        self.config[at..at + 4].copy_from_slice(&value.to_le_bytes());
        self
    }

    fn bar(mut self, index: usize, register: u32, size: u64) -> Self {
        self.bars[index] = size;
        self.put32(0x10 + index * 4, register)
    }

    /// Puts a capability at `at` and lets the list begin there.
    fn capability(self, at: u8, id: u8, next: u8) -> Self {
        let linked = self.put16(6, 0x10).put8(0x34, at);
        linked.put8(at.into(), id).put8(usize::from(at) + 1, next)
    }

    fn link(self, at: u8, id: u8, next: u8) -> Self {
        self.put8(at.into(), id).put8(usize::from(at) + 1, next)
    }

    fn judge(&self) -> Result<FunctionShape, Unfit> {
        FunctionShape::judge(&Said { config: &self.config, bars: &self.bars, interrupts: &self.interrupts })
    }

    /// The dword that the guest reads at `at`.
    fn shown(&self, at: u16) -> u32 {
        let shape = self.judge().unwrap();
        let from = usize::from(at);
        let mut data = self.config[from..from + 4].to_vec();
        shape.overlay.cover(at, &mut data);
        u32_at(&data, 0).unwrap()
    }

    /// The capabilities that a guest finds when it walks the list.
    fn walked(&self) -> Vec<(u8, u8)> {
        let mut at = self.shown(0x34) as u8;
        let mut walked = Vec::new();
        if self.shown(4) & 0x10_0000 == 0 {
            return walked;
        }
        while at != 0 {
            assert!(walked.len() < 64, "{walked:x?}");
            let [id, next, ..] = self.shown(at.into()).to_le_bytes();
            walked.push((at, id));
            at = next;
        }
        walked
    }

    fn walked_extended(&self) -> Vec<(u16, u16)> {
        let mut at = 0x100;
        let mut walked = Vec::new();
        while at != 0 {
            assert!(walked.len() < 1024, "{walked:x?}");
            let header = self.shown(at);
            if header == 0 {
                break;
            }
            walked.push((at, header as u16));
            at = (header >> 20) as u16;
        }
        walked
    }

    fn msix_oddity(&self) -> Vec<Oddity> {
        let shape = self.judge().unwrap();
        assert_eq!(shape.msix, None);
        assert!(!self.walked().iter().any(|(_, id)| *id == id::MSI_X));
        shape.oddities
    }
}

#[test]
fn a_plain_endpoint_is_shown_as_it_is() {
    let space = Space::new();
    let shape = space.judge().unwrap();
    assert_eq!(shape.oddities, []);
    assert_eq!(shape.identity.to_string(), "1234:5678 class 010802");
    assert_eq!((space.shown(0), space.shown(8), space.shown(0x2c)), (0x5678_1234, 0x0108_0201, 0xbeef_cafe));
    let sizes: Vec<_> =
        shape.bars.iter().flatten().map(|bar| (bar.index.get(), bar.kind, bar.size)).collect();
    assert_eq!(
        sizes,
        [(0, BarKind::Io, 0x20), (1, BarKind::Memory32, 0x4000), (2, BarKind::Prefetchable64, 0x4000)]
    );
    let msix = shape.msix.unwrap();
    assert_eq!((msix.at, msix.vectors), (0x40, 16));
    assert_eq!(msix.table, InBar { bar: BarIndex::ALL[2], offset: 0x2000, size: 256 });
    assert_eq!(msix.pba, InBar { bar: BarIndex::ALL[2], offset: 0x3000, size: 8 });
    assert_eq!(space.walked(), [(0x40, id::MSI_X)]);
}

#[test]
fn sizes_of_the_configuration_space_that_none_has_are_refused() {
    for size in [0, 4, 0xff, 0x101, 0xfff, 0x2000] {
        let mut space = Space::new();
        space.config.resize(size, 0);
        assert_eq!(space.judge(), Err(Unfit::ConfigSize(size)), "{size:#x}");
    }
    let mut small = Space::new();
    small.config.truncate(0x100);
    assert_eq!(small.judge().unwrap().overlay.size(), 0x100);
}

#[test]
fn functions_that_are_absent_or_bridges_are_refused() {
    for ids in [0, 0xffff_ffff, 0x0000_ffff, 0xffff_0000, 0x1234_ffff] {
        assert_eq!(Space::new().put32(0, ids).judge(), Err(Unfit::Absent(ids)));
    }
    for header_type in [1, 2, 0x81, 0x82, 0x7f, 0xff] {
        assert_eq!(Space::new().put8(0xe, header_type).judge(), Err(Unfit::HeaderType(header_type)));
    }
    let multifunction = Space::new().put8(0xe, 0x80);
    assert_eq!(multifunction.shown(0xc) & 0xff_0000, 0);
}

#[test]
fn bars_are_as_large_as_their_regions_rounded_up() {
    for (region, size) in [(1, 0x1000), (8, 0x1000), (0x3000, 0x4000), (0x1000, 0x1000), (LARGEST, LARGEST)] {
        let shape = Space::new().bar(4, 0x4, region).judge().unwrap();
        let bar = shape.bars[4].unwrap();
        assert_eq!((bar.size, bar.region), (size, region));
    }
    assert_eq!(Space::new().bar(4, 0x4, 0).judge().unwrap().bars[4], None);
    let ports = Space::new().bar(1, 0x1, 0x3000).judge().unwrap().bars[1].unwrap();
    assert_eq!(
        (ports.kind, ports.size),
        (BarKind::Io, 0x4000),
        "as the sample server of libvfio-user has them"
    );
    for region in [LARGEST + 1, 1 << 52, 1 << 63, u64::MAX] {
        let refused = Unfit::Bar(BarError::Size { index: BarIndex::ALL[4], size: region });
        assert_eq!(Space::new().bar(4, 0x4, region).judge(), Err(refused));
    }
    for (register, region) in [(0, (1 << 31) + 1), (1, 0x4001)] {
        let judged = Space::new().bar(4, register, region).judge();
        assert!(matches!(judged, Err(Unfit::Bar(BarError::Size { .. }))), "{judged:?}");
    }
}

#[test]
fn a_64_bit_bar_needs_two_registers_and_hides_what_is_said_of_the_second() {
    assert_eq!(
        Space::new().bar(5, 0x4, 0x1000).judge(),
        Err(Unfit::Bar(BarError::Overlap(BarIndex::ALL[5])))
    );
    assert!(Space::new().bar(5, 0x4, 0).judge().is_ok());
    assert_eq!(Space::new().bar(3, 0x4, 1 << 63).judge().unwrap().bars[3], None);
}

#[test]
fn capability_lists_are_cut_where_they_stop_making_sense() {
    let first = (0x40, id::MSI_X);
    // The next pointer leads into the header, to an unaligned offset, back to itself, into itself, and behind
    // the bytes that are known to be taken.
    for next in [0x04, 0x3c, 0x51, 0x52, 0x40, 0x44, 0x48] {
        let space = Space::new().link(0x40, id::MSI_X, next);
        assert_eq!(space.walked(), [first], "{next:#x}");
        assert_eq!(space.judge().unwrap().oddities, [Oddity::ChainCut(next.into())]);
    }
    let looping = Space::new().link(0x40, id::MSI_X, 0x60).link(0x60, 9, 0x70).link(0x70, 9, 0x60);
    assert_eq!(looping.walked(), [first, (0x60, 9), (0x70, 9)]);
    // MSI-X has 12 bytes, MSI 24 at most.
    let past_the_end = Space::new().link(0x40, id::MSI_X, 0xf8).link(0xf8, id::MSI, 0).put16(0xfa, 0x180);
    assert_eq!(past_the_end.walked(), [first]);
    let full = (0x40..0xfc).step_by(4).fold(Space::new(), |space, at| space.link(at, 9, at + 4));
    assert_eq!(full.link(0xfc, 9, 0x40).walked().len(), 48);
    for header in [0, 0x3f, 0x41] {
        assert_eq!(Space::new().put8(0x34, header).walked(), [], "{header:#x}");
    }
    assert_eq!(Space::new().put16(6, 0).walked(), [], "a list that the status register denies");
}

#[test]
fn a_second_msix_is_hidden() {
    let twice = Space::new().link(0x40, id::MSI_X, 0x60).link(0x60, id::MSI_X, 0x70).link(0x70, 9, 0);
    assert_eq!(twice.walked(), [(0x40, id::MSI_X), (0x70, 9)]);
}

#[test]
fn extended_lists_are_cut_where_they_stop_making_sense() {
    let header = |id: u32, next: u32| id | 1 << 16 | next << 20;
    let table: [(Headers<'_>, &[(u16, u16)]); 8] = [
        (&[(0x100, header(1, 0x140)), (0x140, header(3, 0))], &[(0x100, 1), (0x140, 3)]),
        (&[(0x100, header(1, 0x100))], &[(0x100, 1)]),
        (&[(0x100, header(1, 0x140)), (0x140, header(3, 0x100))], &[(0x100, 1), (0x140, 3)]),
        (&[(0x100, header(1, 0x40))], &[(0x100, 1)]),
        (&[(0x100, header(1, 0x142))], &[(0x100, 1)]),
        (&[(0x100, header(1, 0xffc)), (0xffc, u32::MAX)], &[(0x100, 1)]),
        (&[(0x100, u32::MAX)], &[]),
        (&[(0x100, 0)], &[]),
    ];
    for (headers, expected) in table {
        let space = headers.iter().fold(Space::new(), |space, (at, header)| space.put32(*at, *header));
        assert_eq!(space.walked_extended(), expected, "{headers:x?}");
    }
    let all = (0x100..0xffc)
        .step_by(4)
        .fold(Space::new(), |space, at| space.put32(at, header(9, u32::try_from(at).unwrap() + 4)));
    assert_eq!(all.put32(0xffc, header(9, 0x100)).walked_extended().len(), 960);
}

#[test]
fn extended_capabilities_that_nobody_could_serve_are_hidden() {
    let header = |id: u16, next: u32| u32::from(id) | 1 << 16 | next << 20;
    let space = Space::new()
        .put32(0x100, header(extended_id::SR_IOV, 0x140))
        .put32(0x140, header(extended_id::RESIZABLE_BAR, 0x180))
        .put32(0x180, header(3, 0));
    assert_eq!(space.walked_extended(), [(0x100, 0xffff), (0x180, 3)]);
}

#[test]
fn msix_is_ours_wherever_the_capability_says_it_is() {
    let in_bar = |table: u32, pba: u32| Space::new().put32(0x44, table).put32(0x48, pba);
    let memory = |kind, size, region| (kind, size, region);
    for (space, bar, expected) in [
        // SPDK's virtio functions: the register of the BAR that holds the pending bits reads as one of ports.
        (in_bar(0x2002, 0), 0, memory(BarKind::Memory32, 0x1000, 0x20)),
        (in_bar(0, 0x3002), 0, memory(BarKind::Memory32, 0x1000, 0x20)),
        // A BAR that is absent, and BARs that are too small.
        (in_bar(4, 0x3002), 4, memory(BarKind::Memory32, 0x1000, 0)),
        (in_bar(0x2_0000 | 4, 0x3002), 4, memory(BarKind::Memory32, 0x4_0000, 0)),
        (in_bar(0x3f08 | 2, 0x2002), 2, memory(BarKind::Prefetchable64, 0x8000, 0x4000)),
        (in_bar(0x2002, 0x4000 | 2), 2, memory(BarKind::Prefetchable64, 0x8000, 0x4000)),
    ] {
        let shape = space.judge().unwrap();
        assert_eq!(shape.oddities, []);
        let shown = shape.bars[bar].unwrap();
        assert_eq!((shown.kind, shown.size, shown.region), expected, "{shape:x?}");
        assert_eq!(space.walked(), [(0x40, id::MSI_X)]);
        let msix = shape.msix.unwrap();
        for place in [msix.table, msix.pba] {
            assert!(place.end() <= shape.bars[usize::from(place.bar.get())].unwrap().size);
        }
    }
}

#[test]
fn msix_that_cannot_work_is_hidden() {
    let in_bar = |table: u32, pba: u32| Space::new().put32(0x44, table).put32(0x48, pba);
    let nowhere = "its table or its pending bits are where no memory BAR can be";
    let overlap = "its table and its pending bits overlap";
    let cases = [
        // The upper half of BAR 2, and numbers that no BAR has.
        (in_bar(3, 0x3002), nowhere),
        (in_bar(6, 0x3002), nowhere),
        (in_bar(7, 0x3002), nowhere),
        (in_bar(0x2002, 3), nowhere),
        // A BAR is never grown to this size.
        (in_bar(0xffff_fff8 | 2, 0x2002), nowhere),
        (in_bar(0x2002, 0x10_0000 | 2), nowhere),
        (in_bar(0x2002, 0x2002), overlap),
        (in_bar(0x2002, 0x20f8 | 2), overlap),
    ];
    for (space, why) in cases {
        assert_eq!(space.msix_oddity(), [Oddity::MsixHidden(why)]);
    }
    let none = Space { interrupts: [1, 1, 0], ..Space::new() };
    assert_eq!(none.msix_oddity(), [Oddity::MsixHidden("the server has no interrupts for it")]);
    // Table and pending bits side by side do not overlap.
    assert!(in_bar(0x2002, 0x2100 | 2).judge().unwrap().msix.is_some());
}

#[test]
fn no_more_vectors_are_shown_than_there_are_interrupts() {
    for (count, vectors) in [(1, 1), (15, 15), (16, 16), (2049, 16), (u32::MAX, 16)] {
        let space = Space { interrupts: [0, 0, count], ..Space::new() };
        assert_eq!(space.judge().unwrap().msix.unwrap().vectors, vectors);
        assert_eq!(space.shown(0x40) >> 16, u32::from(vectors - 1));
    }
    let all = Space { interrupts: [0, 0, u32::MAX], ..Space::new() }.put16(0x42, 0x7ff).bar(2, 4, 0x1_0000);
    let msix = all.put32(0x48, 0xa002).judge().unwrap().msix.unwrap();
    assert_eq!((msix.vectors, msix.table.size, msix.pba.size), (2048, 0x8000, 256));
}

#[test]
fn msi_has_as_many_vectors_as_the_server_serves() {
    let msi = |control: u16, count: u32| {
        let space = Space { interrupts: [0, count, 0], ..Space::new() };
        space.capability(0x50, id::MSI, 0).put16(0x52, control)
    };
    for (control, count, vectors) in [
        (0, 1, 1),
        (5 << 1, 32, 32),
        (5 << 1, 31, 16),
        (5 << 1, 1, 1),
        (7 << 1, u32::MAX, 32),
        (2 << 1, 100, 4),
    ] {
        let shape = msi(control | 0x180, count).judge().unwrap().msi.unwrap();
        assert_eq!((shape.at, shape.spec), (0x50, MsiSpec { vectors, wide: true, maskable: true }));
        assert_eq!(msi(control, count).shown(0x50) >> 17 & 7, vectors.ilog2());
    }
    assert_eq!(msi(0, 0).judge().unwrap().oddities, [Oddity::MsiHidden]);
    assert_eq!(msi(0, 0).walked(), []);
}

#[test]
fn a_pin_without_an_interrupt_is_hidden() {
    for (pin, count, shown) in [(0, 1, 0), (1, 1, 1), (4, u32::MAX, 4), (1, 0, 0), (5, 1, 0), (255, 1, 0)] {
        let space = Space { interrupts: [count, 0, 16], ..Space::new() }.put8(0x3d, pin);
        assert_eq!(space.shown(0x3c) >> 8 & 0xff, shown, "pin {pin}, {count} interrupts");
        assert_eq!(space.judge().unwrap().oddities.len(), usize::from(u32::from(pin) != shown));
    }
}

#[test]
fn an_express_function_is_shown_as_part_of_the_root_complex() {
    let express = Space::new().capability(0x50, id::EXPRESS, 0).put16(0x52, 2).put32(0x5c, 0x1234);
    assert_eq!(express.shown(0x50) >> 16, 0x92);
    assert_eq!(express.shown(0x5c), 0, "no link");
    assert_eq!(express.judge().unwrap().resets, []);
    assert_eq!(express.put32(0x54, 1 << 28).judge().unwrap().resets, [(0x59, 0x80)]);
    let features = Space::new().capability(0x50, id::ADVANCED_FEATURES, 0).put16(0x52, 0x0306);
    assert_eq!(features.judge().unwrap().resets, [(0x54, 1)]);
}

#[test]
fn noise_is_judged_without_panic_and_shown_without_loops() {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut byte = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[3]
    };
    for round in 0..2000_u32 {
        let mut space = Space::new();
        let from = if round % 2 == 0 { 0x10 } else { 0x34 };
        space.config[from..].iter_mut().for_each(|at| *at = byte());
        space.bars.iter_mut().for_each(|bar| *bar = (1 << (byte() % 32)) + u64::from(byte()) % 3);
        let space = space.put16(6, 0x10).put8(0xe, 0x80);
        if space.judge().is_ok() {
            space.walked();
            space.walked_extended();
        }
    }
}

#[test]
fn no_more_vectors_are_shown_than_the_machine_has_routes() {
    let space = Space { interrupts: [1, 32, 2048], ..Space::new() }.put16(0x42, 0x7ff).bar(2, 4, 0x1_0000);
    let space =
        space.put32(0x48, 0xa002).link(0x40, id::MSI_X, 0x50).link(0x50, id::MSI, 0).put16(0x52, 5 << 1);
    let mut shape = space.judge().unwrap();
    assert_eq!(shape.vectors(), 2048);
    shape.limit_vectors(4096);
    assert_eq!((shape.vectors(), shape.oddities.len()), (2048, 0));
    shape.limit_vectors(131);
    assert_eq!(
        (shape.vectors(), shape.msix.unwrap().table.size, shape.msix.unwrap().pba.size),
        (131, 131 * 16, 24)
    );
    let read = |shape: &FunctionShape, at| {
        let mut data = [0; 4];
        shape.overlay.cover(at, &mut data);
        u32_at(&data, 0).unwrap()
    };
    assert_eq!((read(&shape, 0x40) >> 16 & 0x7ff, read(&shape, 0x50) >> 17 & 7), (130, 5));
    shape.limit_vectors(20);
    assert_eq!((read(&shape, 0x40) >> 16 & 0x7ff, read(&shape, 0x50) >> 17 & 7), (19, 4));
    assert_eq!(shape.oddities.len(), 3);
    shape.limit_vectors(0);
    assert_eq!(shape.vectors(), 1, "as nothing else can be said");
}
